"""What a model sees of the images of a batch: features in place of tokens, and M-RoPE's positions.

B batch, T tokens, D model dim, X features of all images, one after the other.
"""

from typing import Any, no_type_check

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@no_type_check  # jax maps trees to other leaves than arrays
class Rotary(struct.PyTreeNode):
    """Where the rotary embedding has a prompt's tokens, which is not where they are (M-RoPE).

    Masks, eviction and packing go by true positions, always.

    Attributes:
      positions: `[B, T, 3]` time, row and column of each token.
      shift: `[B]` rotary minus true position of whatever follows the prompt.
    """

    positions: Int[Array, "B T 3"]
    shift: Int[Array, " B"]


@no_type_check  # jax maps trees to other leaves than arrays
class Images(struct.PyTreeNode):
    """The images of a batch, on their way into the model.

    Attributes:
      pixels: arrays of all images, as the model's `see` reads them.
      places: `[B, T]` which feature each token takes, -1 for a token of text.
      rotary: rotary positions, or None where they are the true ones.
    """

    pixels: Any
    places: Int[Array, "B T"]
    rotary: Rotary | None = None


@no_type_check  # jax maps trees to other leaves than arrays
class Seen(struct.PyTreeNode):
    """What a prompt's tokens are beside text: nothing by default.

    Attributes:
      features: `[X, D]` of all images, in the model's own space.
      places, rotary: as of `Images`.
    """

    features: Float[Array, "X D"] | None = None
    places: Int[Array, "B T"] | None = None
    rotary: Rotary | None = None

    def put(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Embedded tokens, with features where an image is."""
        if self.features is None or self.places is None:
            return x_BTD
        taken_BTD = jnp.take(self.features, jnp.maximum(self.places, 0), axis=0)
        return jnp.where(self.places[..., None] >= 0, taken_BTD.astype(x_BTD.dtype), x_BTD)

    @property
    def shift(self) -> Int[Array, " B"] | None:
        """Rotary minus true position after the prompt, or None where they are the same."""
        return None if self.rotary is None else self.rotary.shift


NOTHING = Seen()


def see(model: Any, images: Images | None) -> Seen:
    """Run the model's tower over all images at once; plain decoders have none to see."""
    if images is None:
        return NOTHING
    return Seen(model.see(images.pixels), images.places, images.rotary)
