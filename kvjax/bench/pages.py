"""Measure a decode step through a server's pages beside one on a cache of its own.

Both hold the same entries of as many rows, and a tail of the same slots. The server reads them
through a table of pages, from one pool, in dispatches of a few steps; `kvjax.generate` has an array
of each row's slots (or of each head's, where that is how a method is kept), in one loop.

R rows.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.bench import decode
from kvjax.cache.slot_layers import compacted
from kvjax.compression.room import slots_of
from kvjax.config import CompressionConfig
from kvjax.generation.programs import flat
from kvjax.models.decoder import Decoder
from kvjax.serve import programs
from kvjax.serve.pages import Shape, with_table
from kvjax.serve.programs import Prompt, State
from kvjax.serve.rows import empty_rows
from kvjax.spelling import spelled

_STEPS = 8  # of a dispatch


def measure(
    model: Decoder,
    config: CompressionConfig,
    *,
    batch: int,
    prompt: int,
    new: int,
    dtype: Any,
    owners: str,
    repeats: int,
) -> dict[str, Any]:
    """Seconds of a step both ways, and bytes of what each holds.

    Args:
      model: any.
      config: what is kept of a prompt.
      batch: rows R.
      prompt, new: tokens; `new` is rounded up to whole dispatches.
      dtype: of keys and values.
      owners: one of `decode.OWNERS`.
      repeats: timed runs of each.
    """
    new = -(-new // _STEPS) * _STEPS
    made = partial(
        decode.synthetic_cache, model.config, config, prompt=prompt, new=new, dtype=dtype,
        owners=owners,
    )  # fmt: skip
    own = made(batch=batch)
    one = made(batch=1)
    slots = compacted(slots_of(one)) if one.slots is None else one.slots
    fill = partial(_filled, model, slots, batch, prompt, new)
    loop, arrays = decode.decode_loop(model, own, new)
    compiled = jax.jit(loop).lower(*arrays).compile()
    contiguous, paged = [], []
    for run in range(repeats + 1):  # in turn, so that both meet the same machine
        seconds = _dispatches(model, fill, new // _STEPS)
        if run:  # the first one compiles
            paged.append(seconds)
            contiguous.append(_once(compiled, arrays) / (new - 1))
    return {
        "method": spelled(config),
        "batch": batch,
        "step": float(np.median(paged)),
        "step_least": min(paged),
        "contiguous": float(np.median(contiguous)),
        "contiguous_least": min(contiguous),
        "of_contiguous": float(np.median(paged) / np.median(contiguous)),
        "cache_bytes": own.nbytes,
        "held_bytes": decode.held_bytes(own),
    }


def _once(compiled: Callable, arrays: tuple[Any, ...]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    return time.perf_counter() - began


def _filled(model: Decoder, slots: Any, rows: int, prompt: int, new: int) -> State:
    """The state of a server in which each row holds these entries."""
    held_L = np.asarray(slots.counts[0].sum(-1))
    config, each = model.config, int((-(-held_L // slots.page)).sum())
    shape = Shape(
        rows=rows, layers=config.num_layers, kv_heads=config.num_kv_heads,
        width=int(-(-held_L.max() // slots.page)), pages=rows * each, page=slots.page,
    )  # fmt: skip
    quantize = slots.scales is not None
    state = programs.open_program(
        flat(model), shape=shape, tail_slots=new, quantize=quantize, recompress=None
    )
    logits = jnp.zeros((1, config.vocab_size), jnp.float32)
    read = Prompt(logits=logits, slots=with_table(slots), sizes=jnp.asarray(held_L, jnp.int32))
    one = empty_rows(1, config.vocab_size, rope_by_length=config.rope_by_length)
    one = one.replace(
        position=one.position + prompt, prompt=one.prompt + prompt, limit=one.limit + 2 * new,
        running=~one.running, values=one.values._replace(top_p=one.values.top_p + 1),
        rope_length=None if one.rope_length is None else one.rope_length + prompt + new,
    )  # fmt: skip
    for row in range(rows):
        hold = np.int32(0)
        state, _ = programs.admit_program(*state, read, np.int32(row), one, _NO_EOS, hold, top=0)
    return state


_NO_EOS = np.array([-1], np.int32)


def _dispatches(model: Decoder, fill: Callable[[], State], count: int) -> float:
    """Seconds of a step, the mean over so many dispatches that follow each other."""
    weights = flat(model)
    pages, rows, tail = jax.block_until_ready(fill())
    began = time.perf_counter()
    for _ in range(count):
        rows, tail, drawn = programs.decode_program(
            weights, pages, rows, tail, _NO_EOS, steps=_STEPS, top=0
        )
    jax.block_until_ready(drawn)
    return (time.perf_counter() - began) / (count * _STEPS)
