"""Measure the whole path: prefill, compression, decoding.

Prefill is bound by arithmetic, and compression should vanish beside it; a decode step is bound by
memory.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.bench.decode import decode_step, held_bytes
from kvjax.bench.timing import peak_bytes, timed
from kvjax.cache.state import with_room
from kvjax.config import CompressionConfig
from kvjax.generation.prefill import prefill, prefill_compress
from kvjax.model_interface import ProbeRequest
from kvjax.models.decoder import Decoder
from kvjax.spelling import spelled


def measure(
    model: Decoder,
    configs: Sequence[CompressionConfig],
    *,
    batch: int,
    prompt: int,
    new: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a method: seconds of prefill, of prefill with compression, of a decode step."""
    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt))
    tokens, lengths = jnp.asarray(drawn, jnp.int32), jnp.full((batch,), prompt, jnp.int32)

    def read(model, tokens, lengths):
        # Nothing of the cache leaves the program: prefill alone.
        return prefill(model, tokens, lengths, ProbeRequest()).logits

    rows = []
    for config in configs:
        run = partial(prefill_compress, config=config)
        # The two in turn, so that both see the same machine.
        alone, _ = timed(read, model, tokens, lengths, repeats=repeats)
        whole, (_, cache) = timed(run, model, tokens, lengths, jax.random.key(0), repeats=repeats)
        cache = with_room(cache, new)
        step = decode_step(model, cache, new, repeats)
        rows.append(
            {
                "method": spelled(config),
                "batch": batch,
                "prefill": alone.median,
                "prefill_least": alone.least,
                "prefill_and_compress": whole.median,
                "prefill_and_compress_least": whole.least,
                "step": step.median,
                "step_least": step.least,
                "tokens_per_second": batch * new / (whole.median + step.median * (new - 1)),
                "cache_bytes": cache.nbytes,
                "held_bytes": held_bytes(cache),
                "peak_bytes": peak_bytes(),
            }
        )
    return rows
