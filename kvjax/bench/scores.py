"""Measure what compression adds to one layer of a prefill: scores, allocation, packing.

B batch, T prompt tokens, N query heads, K KV heads, H head dim.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.bench.timing import timed
from kvjax.compression.compress import compress, probe_request
from kvjax.config import CompressionConfig
from kvjax.kernels.prefill_attention import prefill_attention
from kvjax.kernels.window_scores import accumulated_scores, window_scores
from kvjax.model_interface import Probe
from kvjax.models.config import ModelConfig
from kvjax.spelling import spelled

WINDOW = 32


def measure(
    model: ModelConfig,
    configs: Sequence[CompressionConfig],
    *,
    batch: int,
    prompt: int,
    dtype: Any,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row each for attention, the two kinds of scores, and every method's compression."""
    keys = jax.random.split(jax.random.key(0), 3)
    n, k, h = model.num_heads, model.num_kv_heads, model.head_dim
    q_BTNH, k_BTKH, v_BTKH = (
        jax.random.normal(key, (batch, prompt, heads, h), dtype)
        for key, heads in zip(keys, (n, k, k), strict=True)
    )
    lengths = jnp.full((batch,), prompt, jnp.int32)
    at_BW = jnp.broadcast_to(jnp.arange(prompt - WINDOW, prompt), (batch, WINDOW))
    last_BWNH, one = q_BTNH[:, -WINDOW:], k_BTKH.nbytes
    rows: list[dict[str, Any]] = []

    def add(name: str, read: int, function: Callable, *arrays: Any) -> Any:
        timing, out = timed(function, *arrays, repeats=repeats)
        seconds = timing.median
        rows.append({"what": name, "seconds": seconds, "bytes": read, "rate": read / seconds})
        return out

    attention = add(
        "prefill attention", 3 * one, prefill_attention, q_BTNH, k_BTKH, v_BTKH, lengths
    )
    # Two passes over the keys.
    add("window scores", 2 * one, window_scores, last_BWNH, at_BW, k_BTKH, lengths)
    add("accumulated scores", one, accumulated_scores, q_BTNH, k_BTKH, attention[1], lengths)
    sums_BNT = jnp.zeros((batch, n, prompt), jnp.float32)
    for config in configs:
        queries = probe_request(config, prompt).queries
        probe = Probe(queries=q_BTNH[:, prompt - queries :], column_sums=sums_BNT)
        # Of the accumulated scores only what follows them: they have a row of their own.
        run = partial(_one_layer, config=config)
        add(spelled(config), 2 * one, run, k_BTKH, v_BTKH, probe, lengths)
    for row in rows:
        row["of_attention"] = row["seconds"] / rows[0]["seconds"]
    return rows


def _one_layer(k_BTKH, v_BTKH, probe, lengths, *, config):
    return compress([k_BTKH], [v_BTKH], [probe], config, lengths=lengths)
