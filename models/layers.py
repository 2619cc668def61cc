"""RMSNorm, RoPE and the gated MLP.

B batch, T tokens, D model dim, F MLP dim, H head dim.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvjax.models.config import ModelConfig
from kvjax.models.rope_scaling import DynamicNtk, LongRope, RopeScaling, Yarn

# A longer prompt goes through the MLP in parts: its activations, F wide, are most of what prefill
# needs memory for.
MLP_TOKENS = 8192
_LANES = 128  # parts are whole tiles on a TPU


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> nnx.Param:
    """A normal weight of variance 1 / fan_in."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in fp32; `size` names the axis D or H."""

    def __init__(self, size: int, eps: float, *, axis: str = "D", dtype: DTypeLike = jnp.float32):
        self.eps = eps
        self.axis = axis
        setattr(self, f"scale_{axis}", nnx.Param(jnp.ones((size,), dtype)))

    def __call__(self, x: Float[Array, "*shape X"]) -> Float[Array, "*shape X"]:
        scale = getattr(self, f"scale_{self.axis}")[...]
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * scale


class MLP(nnx.Module):
    """SiLU-gated MLP; biases where the config has them."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_DF = parameter(rngs, (d, f), d, dtype)
        self.up_DF = parameter(rngs, (d, f), d, dtype)
        self.down_FD = parameter(rngs, (f, d), f, dtype)
        bias = config.mlp_bias
        self.gate_bias_F = nnx.Param(jnp.zeros((f,), dtype)) if bias else None
        self.up_bias_F = nnx.Param(jnp.zeros((f,), dtype)) if bias else None
        self.down_bias_D = nnx.Param(jnp.zeros((d,), dtype)) if bias else None

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_BTF = with_bias(x_BTD @ self.gate_DF[...], self.gate_bias_F)
        up_BTF = with_bias(x_BTD @ self.up_DF[...], self.up_bias_F)
        return with_bias((jax.nn.silu(gate_BTF) * up_BTF) @ self.down_FD[...], self.down_bias_D)


def in_parts(
    function: Callable[[Array], Array], x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Apply what treats every token alike, to some MLP_TOKENS tokens at a time."""
    batch, tokens, _ = x_BTD.shape
    parts = -(-tokens * batch // MLP_TOKENS)
    size = -(-tokens // (parts * _LANES)) * _LANES
    if size >= tokens:  # also of many short rows
        return function(x_BTD)

    def step(part, x_BTD):
        old = lax.dynamic_slice_in_dim(x_BTD, part * size, size, axis=1)
        # On a mesh `function` sums over devices and adds the sum to `old`. TPU compilers take that
        # for mere accumulation, move the sum behind the loop and let the loop start from zeros,
        # which `function` then reads. The barrier hides it from them.
        new = function(lax.optimization_barrier(old))
        return lax.dynamic_update_slice_in_dim(x_BTD, new, part * size, axis=1)

    whole = tokens // size
    x_BTD = lax.fori_loop(0, whole, step, x_BTD)
    if whole * size == tokens:
        return x_BTD
    rest = function(x_BTD[:, whole * size :])
    return lax.dynamic_update_slice_in_dim(x_BTD, rest, whole * size, axis=1)


def with_bias(x: Array, bias: nnx.Param | None) -> Array:
    """x + bias, or x where there is none."""
    return x if bias is None else x + bias[...]


def rope_frequencies(
    config: ModelConfig, rope_length: Int[Array, " B"] | None = None
) -> Float[Array, " half"] | Float[Array, "B half"]:
    """Angle per position of each rotated pair, H / 2 of them, after the config's scaling.

    Formulas are those of transformers 5 (modeling_rope_utils).

    Args:
      config: the architecture.
      rope_length: tokens that each row's frequencies are chosen for, where they depend on the
        length of a text (`config.rope_by_length`); without effect elsewhere.

    Returns:
      `[half]`, the same for all rows, or `[B, half]` where they depend on `rope_length`.

    Raises:
      ValueError: no `rope_length` where one is needed.
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, Yarn):
        return _yarn_frequencies(frequencies, scaling, config)
    if isinstance(scaling, DynamicNtk | LongRope):
        if rope_length is None:
            raise ValueError(
                "rope_length=None, expected the tokens that each row's frequencies are chosen for"
                f" (the model's rope_type is {scaling.kind!r})"
            )
        if isinstance(scaling, DynamicNtk):
            return _dynamic_frequencies(exponent, scaling, config, rope_length)
        factors = jnp.asarray([scaling.short_factor, scaling.long_factor], jnp.float32)
        longer_B = rope_length > scaling.original_max_position_embeddings
        return frequencies / jnp.where(longer_B[:, None], factors[1], factors[0])
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: Array, scaling: RopeScaling) -> Array:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, the band between blended."""
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = jnp.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn_frequencies(frequencies: Array, scaling: Yarn, config: ModelConfig) -> Array:
    """YaRN: pairs of few turns are slowed by `factor`, of many kept, a ramp over pairs between."""

    def pair_of(turns: float) -> float:
        """The pair, not a whole one, that turns so often within the original length."""
        each = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(each) / (2 * math.log(config.rope_theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # transformers bounds pairs by H - 1, not by their number.
    first, last = max(first, 0), min(last, config.head_dim - 1)
    last += 0.001 if first == last else 0.0
    pairs = jnp.arange(config.head_dim // 2, dtype=jnp.float32)
    slowed = jnp.clip((pairs - first) / (last - first), 0.0, 1.0)
    return slowed * frequencies / scaling.factor + (1 - slowed) * frequencies


def _dynamic_frequencies(
    exponent: Array, scaling: DynamicNtk, config: ModelConfig, rope_length: Int[Array, " B"]
) -> Float[Array, "B half"]:
    """Dynamic NTK: the base grows with the length beyond the original one."""
    original, dim = scaling.original_max_position_embeddings, config.head_dim
    beyond_B = jnp.maximum(rope_length - original, 0).astype(jnp.float32)
    # factor * n / original - (factor - 1), which is exactly 1 up to the original length.
    stretch_B = 1.0 + scaling.factor * (beyond_B / original)
    base_B = config.rope_theta * stretch_B ** (dim / (dim - 2))
    return 1.0 / base_B[:, None] ** exponent


def pair_positions(
    rotary: Int[Array, "B T 3"], section: tuple[int, int, int]
) -> Int[Array, "B T half"]:
    """Of a token's time, row and column, the one that each pair turns with (M-RoPE)."""
    return jnp.take(rotary, np.repeat(np.arange(3), section), axis=-1)


def rotate(
    x: Float[Array, "B T X H"],
    positions: Int[Array, "B T"] | Int[Array, "B T half"],
    frequencies: Float[Array, " half"] | Float[Array, "B half"],
    factor: float = 1.0,
) -> Float[Array, "B T X H"]:
    """Rotary embedding in Hugging Face's half-split layout, angles in fp32.

    `positions` of tokens, or of each of their pairs. What comes out is `factor` times as long.
    """
    positions = positions if positions.ndim == 3 else positions[..., None]
    frequencies = frequencies if frequencies.ndim == 1 else frequencies[:, None]
    angles = (positions.astype(jnp.float32) * frequencies)[..., None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor != 1.0:
        cos, sin = factor * cos, factor * sin
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)
