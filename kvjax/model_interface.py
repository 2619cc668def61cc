"""What passes between a model and the engine, and what a model has that the engine calls.

B batch, T prompt tokens, W observed queries, N query heads, K KV heads, H head dim, D model dim,
X features of all images, one after the other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, no_type_check, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


# ---------------------------------------------------------------------------- probes
@no_type_check  # jax maps trees to other leaves than arrays
class Probe(struct.PyTreeNode):
    """What attention hands to compression: small, and never an attention matrix.

    Everything is None unless asked for (`ProbeRequest`).

    Attributes:
      queries: `[B, W, N, H]`, the last W queries of each row after RoPE, right-aligned:
        `queries[:, -1]` is the prompt's last token (a row shorter than W repeats its first
        query on the left).
      column_sums: `[B, N, T]` fp32, attention that each key received from all queries of the
        prompt.
      future_mean, future_cov: `[B, N, H]` and `[B, N, H, H]` fp32, mean and covariance of the
        queries to come, estimated from the prompt's.
      output_norms: `[B, K, T]` fp32, L1 norm of each value's part in the layer's output, the mean
        over the query heads of a KV head.
      reconstruction: `[B, K, T]` fp32 in [0, 1], most attention that an entry gets while the
        prompt is repeated (KVzip).
    """

    queries: Float[Array, "B W N H"] | None = None
    column_sums: Float[Array, "B N T"] | None = None
    future_mean: Float[Array, "B N H"] | None = None
    future_cov: Float[Array, "B N H H"] | None = None
    output_norms: Float[Array, "B K T"] | None = None
    reconstruction: Float[Array, "B K T"] | None = None


@dataclass(frozen=True)
class Repeat:
    """How KVzip repeats a prompt (static).

    Attributes:
      chunk: tokens repeated at once.
      instructions: token ids before the first chunk, and before each of the others.
      sinks: first positions that a chunk's attention is shared with.
    """

    chunk: int
    instructions: tuple[tuple[int, ...], tuple[int, ...]]
    sinks: int


@dataclass(frozen=True)
class ProbeRequest:
    """What a prefill is asked to leave in the `Probe` (static).

    Attributes:
      queries: how many of the last ones.
      column_sums, output_norms: whether.
      future: positions after the prompt to expect queries at; 0 for none.
      skipped: first queries of the prompt that the expectation leaves out.
      repeat: how to repeat the prompt, or None.
    """

    queries: int = 0
    column_sums: bool = False
    output_norms: bool = False
    future: int = 0
    skipped: int = 0
    repeat: Repeat | None = None

    def __or__(self, other: "ProbeRequest") -> "ProbeRequest":
        """Both requests at once; where they repeat or skip differently, the first one's way."""
        return ProbeRequest(
            queries=max(self.queries, other.queries),
            column_sums=self.column_sums or other.column_sums,
            output_norms=self.output_norms or other.output_norms,
            future=max(self.future, other.future),
            skipped=self.skipped if self.future else other.skipped,
            repeat=self.repeat or other.repeat,
        )


# ---------------------------------------------------------------------------- images
@no_type_check  # jax maps trees to other leaves than arrays
class Rotary(struct.PyTreeNode):
    """How the rotary embedding turns a prompt, where true positions alone do not say it.

    Masks, eviction and packing go by true positions, always.

    Attributes:
      positions: `[B, T, 3]` time, row and column of each token (M-RoPE), or None for true ones.
      shift: `[B]` rotary minus true position of whatever follows the prompt, or None for 0.
      length: `[B]` tokens that a row's frequencies are chosen for, where a model scales them by the
        length of a text (dynamic NTK, LongRoPE), or None.
    """

    positions: Int[Array, "B T 3"] | None = None
    shift: Int[Array, " B"] | None = None
    length: Int[Array, " B"] | None = None


@no_type_check  # jax maps trees to other leaves than arrays
class Images(struct.PyTreeNode):
    """The images of a batch, on their way into the model.

    Attributes:
      pixels: arrays of all images, as the model's `encode_images` reads them.
      places: `[B, T]` which feature each token takes, -1 for a token of text.
      rotary: rotary positions, or None where they are the true ones.
    """

    pixels: Any
    places: Int[Array, "B T"]
    rotary: Rotary | None = None


@no_type_check  # jax maps trees to other leaves than arrays
class ImageFeatures(struct.PyTreeNode):
    """What a prompt's tokens are beside text: nothing by default.

    Attributes:
      vectors: `[X, D]` of all images, in the model's own space.
      places: as of `Images`.
      rotary: how tokens are turned, or None where true positions say it.
    """

    vectors: Float[Array, "X D"] | None = None
    places: Int[Array, "B T"] | None = None
    rotary: Rotary | None = None

    def put(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Embedded tokens, with features where an image is."""
        if self.vectors is None or self.places is None:
            return x_BTD
        taken_BTD = jnp.take(self.vectors, jnp.maximum(self.places, 0), axis=0)
        return jnp.where(self.places[..., None] >= 0, taken_BTD.astype(x_BTD.dtype), x_BTD)

    @property
    def shift(self) -> Int[Array, " B"] | None:
        """Rotary minus true position after the prompt, or None where they are the same."""
        return None if self.rotary is None else self.rotary.shift

    @property
    def rope_length(self) -> Int[Array, " B"] | None:
        """Tokens that each row's frequencies are chosen for, or None where all rows' are alike."""
        return None if self.rotary is None else self.rotary.length

    def turned_for(self, rope_length: Int[Array, " B"] | None) -> "ImageFeatures":
        """The same with frequencies chosen for this many tokens a row; None changes nothing."""
        if rope_length is None:
            return self
        rotary = Rotary() if self.rotary is None else self.rotary
        return self.replace(rotary=rotary.replace(length=rope_length))


NO_IMAGES = ImageFeatures()


# ---------------------------------------------------------------------------- models
@runtime_checkable
class ModelShape(Protocol):
    """Sizes of a model and the tokens that end its answers (`kvjax.models.config.ModelConfig`).

    `sliding_windows` has one entry a layer, None where it sees everything; `context` is most tokens
    of a prompt with its answer; `rope_by_length` says whether rows' rotary frequencies depend on
    their length (`Rotary.length`); `stated_sampling` has pairs of what a checkpoint suggests, ()
    for nothing.
    """

    @property
    def architecture(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def rope_by_length(self) -> bool: ...
    @property
    def stated_sampling(self) -> tuple[tuple[str, Any], ...]: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def sliding_windows(self) -> tuple[int | None, ...]: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


@runtime_checkable
class ModelEmbedding(Protocol):
    """Tokens to hidden states; the table's dtype is the cache's."""

    @property
    def table_VD(self) -> Any: ...
    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]: ...


@runtime_checkable
class ModelLayer(Protocol):
    """One layer: hidden states after a prompt, keys after RoPE, values and the probe asked for."""

    def prefill(
        self,
        x_BTD: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        request: ProbeRequest,
        rotary: Rotary | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T K H"], Float[Array, "B T K H"], Probe]: ...


@runtime_checkable
class Model(Protocol):
    """A decoder as the engine calls it, a pytree that `jax.jit` takes as an argument.

    `kvjax.models.decoder.Decoder` documents `logits` and `extend`, whose `cache` is a
    `kvjax.cache.state.Cache`.
    """

    @property
    def config(self) -> ModelShape: ...
    @property
    def embed(self) -> ModelEmbedding: ...
    @property
    def layers(self) -> Iterable[ModelLayer]: ...
    def logits(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]: ...
    def extend(
        self,
        tokens_BT: Int[Array, "B T"],
        counts: Int[Array, " B"],
        cache: Any,
        features: ImageFeatures = NO_IMAGES,
    ) -> tuple[Float[Array, "B T D"], Any]: ...


@runtime_checkable
class VisionModel(Model, Protocol):
    """A vision-language model: `isinstance(model, VisionModel)` says whether a model is one.

    `image_config` says how pictures become pixels, `vision_config` which token stands for an image.
    """

    image_config: Any
    vision_config: Any

    def encode_images(self, pixels: Any) -> Float[Array, "X D"]: ...


def encode_images(model: Model, images: Images | None) -> ImageFeatures:
    """Run the model's tower over all images at once; a model that reads text alone is given none.

    Raises:
      TypeError: images for a model that reads text alone.
    """
    if images is None:
        return NO_IMAGES
    if not isinstance(model, VisionModel):
        raise TypeError(f"images for a {type(model).__name__}, expected a vision-language model")
    return ImageFeatures(model.encode_images(images.pixels), images.places, images.rotary)
