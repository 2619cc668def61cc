"""LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744): a decoder behind CLIP and a projector.

I images, S pixels of a side, P patches, E values of a patch, C width of the tower, D model dim,
X features of all images, F the projector's width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.layers import parameter, with_bias
from kvjax.models.vision.clip import IMAGES, Clip
from kvjax.models.vision.config import VisionConfig


class Projector(nnx.Module):
    """From the tower's width to the decoder's: two linear maps with GELU between them."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, d = config.hidden_size * len(config.feature_layers), config.projector_size
        self.up_CF = parameter(rngs, (c, d), c, dtype)
        self.down_FD = parameter(rngs, (d, d), d, dtype)
        bias = config.projector_bias
        self.up_bias_F = nnx.Param(jnp.zeros((d,), dtype)) if bias else None
        self.down_bias_D = nnx.Param(jnp.zeros((d,), dtype)) if bias else None

    def __call__(self, x_IPC: Float[Array, "I P C"]) -> Float[Array, "I P D"]:
        up_IPF = with_bias(x_IPC @ self.up_CF[...], self.up_bias_F)
        gelu_IPF = jax.nn.gelu(up_IPF, approximate=False)
        return with_bias(gelu_IPF @ self.down_FD[...], self.down_bias_D)


class Llava(Decoder):
    """A `Decoder` of any family with a CLIP tower.

    Args:
      config: of the decoder.
      vision_config: of the tower and the projector.
      dtype: of the weights, the activations and the cache.
      rngs: for random weights.

    `image_config`, how pictures are made into pixels, is for the caller to set (`kvjax.load` does).
    """

    def __init__(
        self,
        config: ModelConfig,
        vision_config: VisionConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.vision_config = vision_config
        self.image_config: Any = None
        self.tower = Clip(vision_config, dtype=dtype, rngs=rngs)
        self.projector = Projector(vision_config, dtype=dtype, rngs=rngs)

    def encode_images(self, pixels: Float[Array, "I 3 S S"]) -> Float[Array, "X D"]:
        """Features of all images, one image after the other, in the decoder's space.

        `pixels` are after the image processor: colour, row, column.
        """

        def project(patches):
            return self.projector(self.tower(patches))

        size, side = self.vision_config.patch_size, self.vision_config.image_size
        cut = pixels.reshape(-1, 3, side // size, size, side // size, size)
        cut = cut.transpose(0, 2, 4, 1, 3, 5)  # image, the patch's row and column, what is in it
        patches_IPE = cut.reshape(cut.shape[0], self.vision_config.patches, -1)
        if patches_IPE.shape[0] <= IMAGES:
            features_IPD = project(patches_IPE)
        else:
            features_IPD = lax.map(
                lambda one: project(one[None])[0], patches_IPE, batch_size=IMAGES
            )
        return features_IPD.reshape(-1, features_IPD.shape[-1])
