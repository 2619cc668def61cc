"""CLIP's vision transformer (Radford et al. 2021), the tower of LLaVA.

I images, P patches and the class token, E values of a patch, C width of the tower, F MLP dim,
N heads, H head dim, X = N H.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kvjax.models.layers import parameter
from kvjax.models.vision.config import VisionConfig

# Images that pass through the tower together: attention of 577 x 577 for each, in every head.
IMAGES = 8


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in fp32."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.eps = eps
        self.scale_C = nnx.Param(jnp.ones((size,), dtype))
        self.bias_C = nnx.Param(jnp.zeros((size,), dtype))

    def __call__(self, x: Float[Array, "*shape C"]) -> Float[Array, "*shape C"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - x32.mean(-1, keepdims=True)
        x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.scale_C[...] + self.bias_C[...]


class ClipLayer(nnx.Module):
    """Pre-norm attention among all patches, and an MLP, each with a residual."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, f = config.hidden_size, config.intermediate_size
        self.heads = config.num_heads
        self.hidden_act = config.hidden_act
        norm = partial(LayerNorm, c, config.layer_norm_eps, dtype=dtype)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.q_CX = parameter(rngs, (c, c), c, dtype)
        self.k_CX = parameter(rngs, (c, c), c, dtype)
        self.v_CX = parameter(rngs, (c, c), c, dtype)
        self.q_bias_X = nnx.Param(jnp.zeros((c,), dtype))
        self.k_bias_X = nnx.Param(jnp.zeros((c,), dtype))
        self.v_bias_X = nnx.Param(jnp.zeros((c,), dtype))
        self.o_XC = parameter(rngs, (c, c), c, dtype)
        self.o_bias_C = nnx.Param(jnp.zeros((c,), dtype))
        self.up_CF = parameter(rngs, (c, f), c, dtype)
        self.up_bias_F = nnx.Param(jnp.zeros((f,), dtype))
        self.down_FC = parameter(rngs, (f, c), f, dtype)
        self.down_bias_C = nnx.Param(jnp.zeros((c,), dtype))

    def __call__(self, x_IPC: Float[Array, "I P C"]) -> Float[Array, "I P C"]:
        x_IPC = x_IPC + self._attention(self.attention_norm(x_IPC))
        up_IPF = self.mlp_norm(x_IPC) @ self.up_CF[...] + self.up_bias_F[...]
        if self.hidden_act == "quick_gelu":
            up_IPF = up_IPF * jax.nn.sigmoid(1.702 * up_IPF)
        else:
            up_IPF = jax.nn.gelu(up_IPF, approximate=False)
        return x_IPC + up_IPF @ self.down_FC[...] + self.down_bias_C[...]

    def _attention(self, x_IPC: Float[Array, "I P C"]) -> Float[Array, "I P C"]:
        def project(weight, bias):
            y_IPX = x_IPC @ weight[...] + bias[...]
            return y_IPX.reshape(*y_IPX.shape[:2], self.heads, -1)

        q_IPNH = project(self.q_CX, self.q_bias_X)
        k_IPNH = project(self.k_CX, self.k_bias_X)
        v_IPNH = project(self.v_CX, self.v_bias_X)
        logits_INPQ = jnp.einsum(
            "IPNH,IQNH->INPQ", q_IPNH, k_IPNH, preferred_element_type=jnp.float32
        )
        weights_INPQ = jax.nn.softmax(logits_INPQ * q_IPNH.shape[-1] ** -0.5, axis=-1)
        out_IPNH = jnp.einsum("INPQ,IQNH->IPNH", weights_INPQ.astype(x_IPC.dtype), v_IPNH)
        return out_IPNH.reshape(x_IPC.shape) @ self.o_XC[...] + self.o_bias_C[...]


class Clip(nnx.Module):
    """The tower, as deep as its features are taken from: what lies above is never read."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, patch = config.hidden_size, 3 * config.patch_size**2
        self.config = config
        self.patch_EC = parameter(rngs, (patch, c), patch, dtype)
        self.class_C = parameter(rngs, (c,), 1, dtype)
        self.positions_PC = parameter(rngs, (config.patches + 1, c), 1, dtype)
        self.first_norm = LayerNorm(c, config.layer_norm_eps, dtype=dtype)
        self.layers = nnx.List(
            [ClipLayer(config, dtype=dtype, rngs=rngs) for _ in range(max(config.depths))]
        )

    def __call__(self, patches_IPE: Float[Array, "I P E"]) -> Float[Array, "I U Z"]:
        """Features of images, of each of `config.feature_layers` side by side.

        Args:
          patches_IPE: pixels after normalising, patch by patch in rows from the top left; of a
            patch all red values, then green, then blue, each in rows.
        """
        x_IPC = patches_IPE.astype(self.patch_EC.dtype) @ self.patch_EC[...]
        first_IPC = jnp.broadcast_to(self.class_C[...], (x_IPC.shape[0], 1, x_IPC.shape[2]))
        x_IPC = jnp.concatenate([first_IPC, x_IPC], axis=1) + self.positions_PC[...]
        hidden = [self.first_norm(x_IPC)]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]))
        features = jnp.concatenate([hidden[depth] for depth in self.config.depths], axis=-1)
        return features if self.config.keeps_class else features[:, 1:]
