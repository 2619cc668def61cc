"""Measure how widely each head spreads its attention: Ada-KV's motivation.

B prompts, T tokens, W queries, N query heads, K KV heads, G = N // K, L layers, H head dim.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.generation import prefill
from kvjax.inputs.prompts import pad
from kvjax.model_interface import Model, ProbeRequest


def entries_needed(
    model: Model, prompts: Sequence[Sequence[int]], *, share: float = 0.9, queries: int = 32
) -> Float[np.ndarray, "L N"]:
    """Keys, most attended first, that hold `share` of a query's attention.

    Args:
      model: a decoder without sliding windows.
      prompts: token ids, each at least `queries` tokens long.
      share: of a query's attention, between 0 and 1.
      queries: the last ones of each prompt, over which and over prompts the mean is taken.

    Raises:
      ValueError: a share out of range, or a prompt that is too short.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share!r}, expected a number between 0 and 1")
    shortest = min(len(prompt) for prompt in prompts)
    if shortest < queries:
        raise ValueError(f"a prompt has {shortest} tokens, expected at least queries={queries}")
    tokens, lengths = pad(prompts)
    read = _prefill(model, tokens, lengths, queries)
    layers = zip(read.probes, read.keys, strict=True)
    counts = [_count(probe.queries, k, jnp.asarray(lengths), share) for probe, k in layers]
    return np.asarray(jnp.stack(counts))


@jax.jit(static_argnames="queries")
def _prefill(model, tokens, lengths, queries):
    return prefill.prefill(model, tokens, lengths, ProbeRequest(queries=queries))


@jax.jit(static_argnames="share")
def _count(
    q_BWNH: Float[Array, "B W N H"],
    k_BTKH: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    share: float,
) -> Float[Array, " N"]:
    batch, width, heads, head_dim = q_BWNH.shape
    tokens, kv_heads = k_BTKH.shape[1:3]
    q_BWKGH = q_BWNH.reshape(batch, width, kv_heads, -1, head_dim)
    s_BKGWT = jnp.einsum("BWKGH,BTKH->BKGWT", q_BWKGH, k_BTKH) * head_dim**-0.5
    positions_BW = lengths[:, None] - width + jnp.arange(width)
    seen_BWT = jnp.arange(tokens) <= positions_BW[..., None]
    s_BKGWT = jnp.where(seen_BWT[:, None, None], s_BKGWT, -jnp.inf)
    p_BKGWT = jnp.sort(jax.nn.softmax(s_BKGWT), axis=-1, descending=True)
    # The first key always counts, and every further one that the share is not reached without.
    count_BKGW = 1 + (jnp.cumsum(p_BKGWT, axis=-1) < share).sum(-1)
    return count_BKGW.mean((0, 3)).reshape(heads)
