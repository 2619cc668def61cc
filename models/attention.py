"""Grouped-query attention over a prompt (prefill) and over the cache (extend).

B batch, T tokens, N query heads, K KV heads, H head dim, D model dim, W observed queries; X = N H
and Y = K H, heads side by side. Weights are matrices: those with three axes compilers copied into
other layouts, on a CPU at every decode step.
"""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvjax.cache.attend import attend
from kvjax.cache.state import Cache
from kvjax.cache.sums import attend_and_add
from kvjax.cache.tail import write_layer
from kvjax.kernels.prefill_attention import prefill_attention
from kvjax.kernels.prefill_attention.training import training_attention
from kvjax.kernels.window_scores import accumulated_scores
from kvjax.model_interface import Probe, ProbeRequest, Rotary
from kvjax.models.config import ModelConfig
from kvjax.models.layers import (
    RMSNorm,
    pair_positions,
    parameter,
    rope_frequencies,
    rotate,
    with_bias,
)
from kvjax.models.observe import expected_queries, last_queries, output_norms
from kvjax.sharding import by_device, constrain


class Attention(nnx.Module):
    """Attention of one layer; biases, q/k norm and sliding window as the config says."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
        d = config.hidden_size
        self.config = config
        self.layer = layer
        self.window = config.sliding_windows[layer]
        self.q_DX = parameter(rngs, (d, n * h), d, dtype)
        self.k_DY = parameter(rngs, (d, k * h), d, dtype)
        self.v_DY = parameter(rngs, (d, k * h), d, dtype)
        self.o_XD = parameter(rngs, (n * h, d), n * h, dtype)
        bias = config.qkv_bias
        self.q_bias_X = nnx.Param(jnp.zeros((n * h,), dtype)) if bias else None
        self.k_bias_Y = nnx.Param(jnp.zeros((k * h,), dtype)) if bias else None
        self.v_bias_Y = nnx.Param(jnp.zeros((k * h,), dtype)) if bias else None
        self.o_bias_D = nnx.Param(jnp.zeros((d,), dtype)) if config.o_bias else None
        norm = partial(RMSNorm, h, config.rms_norm_eps, axis="H", dtype=dtype)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Whole sequences without a cache, differentiable: for training."""
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        length_B = None
        if self.config.rope_by_length:
            length_B = jnp.full(x_BTD.shape[:1], x_BTD.shape[1])
        q_BTNH, k_BTKH = self._rotate(q_BTNH, k_BTKH, positions, length_B)
        out_BTNH = training_attention(q_BTNH, k_BTKH, v_BTKH, window=self.window)
        return self._output(out_BTNH)

    def prefill(
        self,
        x_BTD: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        request: ProbeRequest,
        rotary: Rotary | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T K H"], Float[Array, "B T K H"], Probe]:
        """A whole prompt: the output, its keys (after RoPE) and values, and what was asked for.

        `rotary` has what the rotary embedding turns by, where that is not the true positions at
        frequencies that are the same for all rows.
        """
        batch, tokens, _ = x_BTD.shape
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
        shift_B = length_B = None
        if rotary is not None:
            shift_B, length_B = rotary.shift, rotary.length
            if rotary.positions is not None:
                assert self.config.mrope_section is not None  # what makes it differ from positions
                positions = pair_positions(rotary.positions, self.config.mrope_section)
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        probe = Probe()
        if request.future:
            frequencies = rope_frequencies(self.config, length_B)
            ahead = request.future, request.skipped, shift_B, self.config.attention_factor
            mean, cov = expected_queries(q_BTNH, lengths, frequencies, *ahead)
            probe = probe.replace(future_mean=mean, future_cov=cov)
        q_BTNH, k_BTKH = self._rotate(q_BTNH, k_BTKH, positions, length_B)
        prompt = q_BTNH, k_BTKH, v_BTKH, lengths
        read = partial(prefill_attention, window=self.window)
        out_BTNH, lse_BNT = by_device(read, "BTNH,BTKH,BTKH,B->BTNH,BNT", *prompt)
        if request.queries:
            probe = probe.replace(queries=last_queries(q_BTNH, lengths, request.queries))
        if request.column_sums:
            count = partial(accumulated_scores, window=self.window)
            seen = q_BTNH, k_BTKH, lse_BNT, lengths
            sums = by_device(count, "BTNH,BTKH,BNT,B->BNT", *seen)
            probe = probe.replace(column_sums=sums)
        if request.output_norms:
            norms = by_device(output_norms, "BTKH,XD->BKT", v_BTKH, self.o_XD[...])
            probe = probe.replace(output_norms=norms)
        return self._output(out_BTNH), k_BTKH, v_BTKH, probe

    def extend(
        self, x_BTD: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """New tokens at `positions` (-1: padding), whose tail slots are already claimed."""
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        shift, turned_BT = cache.rotary_shift, positions
        if shift is not None:
            turned_BT = positions + shift[:, None]
        q_BTNH, k_BTKH = self._rotate(q_BTNH, k_BTKH, turned_BT, cache.rope_length)
        cache = cache.replace(tail=write_layer(cache.tail, self.layer, k_BTKH, v_BTKH, q_BTNH))
        if cache.tail.slot_sums is None:
            out_BTNH = attend(q_BTNH, positions, cache, self.layer, self.window)
        else:
            held = cache, self.layer, self.window
            out_BTNH, cache = attend_and_add(q_BTNH, positions, *held)
        return self._output(out_BTNH), cache

    def _project(self, x_BTD):
        heads = (*x_BTD.shape[:2], -1, self.config.head_dim)
        q_BTNH = with_bias(x_BTD @ self.q_DX[...], self.q_bias_X).reshape(heads)
        k_BTKH = with_bias(x_BTD @ self.k_DY[...], self.k_bias_Y).reshape(heads)
        v_BTKH = with_bias(x_BTD @ self.v_DY[...], self.v_bias_Y).reshape(heads)
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return constrain(q_BTNH, "BTNH"), constrain(k_BTKH, "BTKH"), constrain(v_BTKH, "BTKH")

    def _rotate(self, q_BTNH, k_BTKH, positions, rope_length=None):
        frequencies = rope_frequencies(self.config, rope_length)
        turned = positions, frequencies, self.config.attention_factor
        return rotate(q_BTNH, *turned), rotate(k_BTKH, *turned)

    def _output(self, out_BTNH):
        out_BTX = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
        return constrain(with_bias(out_BTX @ self.o_XD[...], self.o_bias_D), "BTD")
