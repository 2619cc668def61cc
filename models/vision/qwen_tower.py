"""The vision tower of Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923, section 2.1) and its merger.

P patches of all images, E values of a patch, C width of the tower, N heads, H head dim, A = N H,
Z = 3 A, F MLP dim, J = C times the patches of a token, U tokens of all images, D model dim.
Q a block of queries, S a block of keys.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvjax.models.layers import RMSNorm, parameter, rotate
from kvjax.models.vision.qwen_config import QwenVisionConfig
from kvjax.models.vision.qwen_layout import QwenPatches

EPS = 1e-6  # of every norm, whatever the decoder's
THETA = 10000.0
QUERY_BLOCK = 128
KEY_BLOCK = 256
_PADDING = jnp.iinfo(jnp.int32).max


def segment_attention(
    q: Float[Array, "P N H"],
    k: Float[Array, "P N H"],
    v: Float[Array, "P N H"],
    segments: Int[Array, " P"],
) -> Float[Array, "P N H"]:
    """Attention of every patch to all patches of its segment, before and after it.

    Blocks of queries are mapped; each walks over the blocks of keys that its segments reach to, so
    that windows cost what they hold, and memory is a block's scores (the online softmax of
    `kernels/prefill_attention/reference.py`).

    Args:
      q, k, v: after the rotary embedding.
      segments: numbers that never fall.
    """
    patches = q.shape[0]
    block = math.lcm(QUERY_BLOCK, KEY_BLOCK)
    query_block, key_block, padded = QUERY_BLOCK, KEY_BLOCK, -(-patches // block) * block
    if patches <= KEY_BLOCK:
        query_block = key_block = padded = patches
    more = padded - patches
    q_NPH, k_NPH, v_NPH = (
        jnp.pad(x, ((0, more), (0, 0), (0, 0))).transpose(1, 0, 2) for x in (q, k, v)
    )
    segment_P = jnp.pad(segments, (0, more), constant_values=_PADDING)
    first_P = jnp.searchsorted(segment_P, segment_P, side="left") // key_block
    last_P = -(-jnp.searchsorted(segment_P, segment_P, side="right") // key_block)

    def attend_block(index):
        start = index * query_block
        q_NQH = lax.dynamic_slice_in_dim(q_NPH, start, query_block, axis=1)
        segment_Q = lax.dynamic_slice_in_dim(segment_P, start, query_block)
        first, last = first_P[start], last_P[start + query_block - 1]
        return _online_softmax(q_NQH, k_NPH, v_NPH, segment_Q, segment_P, first, last, key_block)

    out_XNQH = lax.map(attend_block, jnp.arange(padded // query_block))
    out_PNH = out_XNQH.transpose(0, 2, 1, 3).reshape(padded, *q.shape[1:])
    return out_PNH[:patches].astype(v.dtype)


def _online_softmax(q_NQH, k_NPH, v_NPH, segment_Q, segment_P, first, last, key_block):
    """One block of queries over blocks of keys first..last - 1."""

    def step(index, carry):
        peak_NQ, total_NQ, acc_NQH = carry
        offset = index * key_block
        k_NSH = lax.dynamic_slice_in_dim(k_NPH, offset, key_block, axis=1)
        v_NSH = lax.dynamic_slice_in_dim(v_NPH, offset, key_block, axis=1)
        segment_S = lax.dynamic_slice_in_dim(segment_P, offset, key_block)
        s_NQS = jnp.einsum("NQH,NSH->NQS", q_NQH, k_NSH, preferred_element_type=jnp.float32)
        same_QS = segment_Q[:, None] == segment_S
        s_NQS = jnp.where(same_QS, s_NQS * q_NQH.shape[-1] ** -0.5, -jnp.inf)
        new_NQ = jnp.maximum(peak_NQ, s_NQS.max(-1))
        anchor_NQ = jnp.where(new_NQ == -jnp.inf, 0.0, new_NQ)
        p_NQS = jnp.exp(s_NQS - anchor_NQ[..., None])
        decay_NQ = jnp.exp(peak_NQ - anchor_NQ)
        pv_NQH = jnp.einsum(
            "NQS,NSH->NQH", p_NQS.astype(v_NSH.dtype), v_NSH, preferred_element_type=jnp.float32
        )
        total_NQ = total_NQ * decay_NQ + p_NQS.sum(-1)
        return new_NQ, total_NQ, acc_NQH * decay_NQ[..., None] + pv_NQH

    shape = q_NQH.shape[:2]
    nothing = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(q_NQH.shape, jnp.float32)
    _, total_NQ, acc_NQH = lax.fori_loop(first, last, step, nothing)
    return acc_NQH / total_NQ[..., None]  # every patch sees itself


class TowerLayer(nnx.Module):
    """Pre-norm attention within segments and a gated MLP, each with a residual; all with biases."""

    def __init__(self, config: QwenVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, f = config.hidden_size, config.intermediate_size
        self.heads = config.num_heads
        self.attention_norm = RMSNorm(c, EPS, axis="C", dtype=dtype)
        self.mlp_norm = RMSNorm(c, EPS, axis="C", dtype=dtype)
        self.qkv_CZ = parameter(rngs, (c, 3 * c), c, dtype)
        self.qkv_bias_Z = nnx.Param(jnp.zeros((3 * c,), dtype))
        self.o_AC = parameter(rngs, (c, c), c, dtype)
        self.o_bias_C = nnx.Param(jnp.zeros((c,), dtype))
        self.gate_CF = parameter(rngs, (c, f), c, dtype)
        self.gate_bias_F = nnx.Param(jnp.zeros((f,), dtype))
        self.up_CF = parameter(rngs, (c, f), c, dtype)
        self.up_bias_F = nnx.Param(jnp.zeros((f,), dtype))
        self.down_FC = parameter(rngs, (f, c), f, dtype)
        self.down_bias_C = nnx.Param(jnp.zeros((c,), dtype))

    def __call__(
        self, x_PC: Float[Array, "P C"], places: Int[Array, "P 2"], segments: Int[Array, " P"]
    ) -> Float[Array, "P C"]:
        x_PC = x_PC + self._attention(self.attention_norm(x_PC), places, segments)
        y_PC = self.mlp_norm(x_PC)
        gate_PF = jax.nn.silu(y_PC @ self.gate_CF[...] + self.gate_bias_F[...])
        up_PF = y_PC @ self.up_CF[...] + self.up_bias_F[...]
        return x_PC + (gate_PF * up_PF) @ self.down_FC[...] + self.down_bias_C[...]

    def _attention(self, x_PC, places, segments):
        qkv_PZ = x_PC @ self.qkv_CZ[...] + self.qkv_bias_Z[...]
        q_PNH, k_PNH, v_PNH = jnp.moveaxis(qkv_PZ.reshape(len(x_PC), 3, self.heads, -1), 1, 0)
        q_PNH, k_PNH = rotate_places(q_PNH, places), rotate_places(k_PNH, places)
        out_PNH = segment_attention(q_PNH, k_PNH, v_PNH, segments)
        return out_PNH.reshape(x_PC.shape) @ self.o_AC[...] + self.o_bias_C[...]


def rotate_places(x: Float[Array, "P N H"], places: Int[Array, "P 2"]) -> Float[Array, "P N H"]:
    """Rotary embedding in two dimensions, both at the same H / 4 frequencies.

    Half of the pairs turn with the row, the other half with the column.
    """
    pairs = x.shape[-1] // 4
    frequencies = THETA ** -(jnp.arange(pairs, dtype=jnp.float32) / pairs)
    turned = rotate(x[None], jnp.repeat(places, pairs, axis=-1)[None], jnp.tile(frequencies, 2))
    return turned[0]


class Merger(nnx.Module):
    """Norm, then the patches of a token side by side through two linear maps with GELU between."""

    def __init__(self, config: QwenVisionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, d = config.hidden_size, config.projector_size
        j = c * config.merged
        self.norm = RMSNorm(c, EPS, axis="C", dtype=dtype)
        self.up_JF = parameter(rngs, (j, j), j, dtype)
        self.up_bias_F = nnx.Param(jnp.zeros((j,), dtype))
        self.down_FD = parameter(rngs, (j, d), j, dtype)
        self.down_bias_D = nnx.Param(jnp.zeros((d,), dtype))

    def __call__(self, x_PC: Float[Array, "P C"]) -> Float[Array, "U D"]:
        x_UJ = self.norm(x_PC).reshape(-1, self.up_JF.shape[0])
        up_UF = jax.nn.gelu(x_UJ @ self.up_JF[...] + self.up_bias_F[...], approximate=False)
        return up_UF @ self.down_FD[...] + self.down_bias_D[...]


class QwenTower(nnx.Module):
    """From patches to tokens of the decoder's width.

    Args:
      config: of the tower.
      dtype: of the weights and the activations.
      rngs: for random weights.
    """

    def __init__(self, config: QwenVisionConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        values, c = config.patch_values, config.hidden_size
        self.patch_EC = parameter(rngs, (values, c), values, dtype)
        self.layers = nnx.List(
            [TowerLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.merger = Merger(config, dtype=dtype, rngs=rngs)

    def __call__(self, patches: QwenPatches) -> Float[Array, "U D"]:
        """Tokens of all images, one image after the other, each in rows (see `lay_out`)."""
        x_PC = patches.pixels.astype(self.patch_EC.dtype) @ self.patch_EC[...]
        for index, layer in enumerate(self.layers):
            full = index in self.config.full_layers
            x_PC = layer(x_PC, patches.places, patches.frames if full else patches.windows)
        return self.merger(x_PC)[patches.order]
