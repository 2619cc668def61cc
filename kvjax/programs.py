"""The compiled programs: everything in one, and the same stages apart.

A cache that the caller holds is never donated; tails and answers inside a stream are.
"""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int, Key

from kvjax import stages
from kvjax.cache import Cache, Tail, forget, with_room
from kvjax.config import CompressionConfig, Recompress
from kvjax.loose import Ratio, loosen
from kvjax.recompress import evict
from kvjax.stages import Answer, Rules


@partial(jax.jit, static_argnames=("config", "new_tokens", "tail_slots", "whole", "recompress"))
def generate_program(
    model: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, ""],
    rules: Rules,
    *,
    config: CompressionConfig,
    new_tokens: int,
    tail_slots: int,
    whole: bool,
    recompress: Recompress | None = None,
) -> tuple[Answer, Int[Array, "B L K"], Cache | None]:
    """Prefill, compress and decode; the cache comes back, answer included, where `whole`."""
    logits, cache = stages.prefill_compress(model, tokens, lengths, key, config)
    answer = stages.start_answer(logits, tokens, lengths, key, rules, new_tokens)
    cache, kept = with_room(cache, tail_slots), stages.kept_entries(cache)
    ratio = None
    if recompress is not None:
        heads = model.config.num_heads
        cache, ratio = loosen(cache, recompress, heads, new_tokens, config.fraction)
    return _finish(model, cache, kept, answer, rules, whole, recompress, ratio)


@partial(jax.jit, static_argnames=("new_tokens", "tail_slots", "whole", "recompress"))
def answer_program(
    model: Any,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, ""],
    rules: Rules,
    *,
    new_tokens: int,
    tail_slots: int,
    whole: bool,
    recompress: Recompress | None = None,
) -> tuple[Answer, Int[Array, "B L K"], Cache | None]:
    """A question to a cache that the caller holds (never donated: it can be asked again)."""
    kept = stages.kept_entries(cache)
    if recompress is not None:
        cache, _ = loosen(cache, recompress, model.config.num_heads)
    logits, cache = stages.extend_prompt(model, tokens, lengths, with_room(cache, tail_slots))
    answer = stages.start_answer(logits, tokens, lengths, key, rules, new_tokens)
    return _finish(model, cache, kept, answer, rules, whole, recompress, None)


def _finish(model, cache, kept, answer, rules, whole, recompress, ratio):
    if recompress is None:
        cache, answer = stages.decode(model, cache, answer, rules, answer.tokens.shape[1] - 1)
    else:
        cache, answer = stages.decode_in_segments(model, cache, answer, rules, recompress, ratio)
    if not whole:
        return answer, kept, None
    cache = stages.feed_last(model, cache, answer)
    return answer, kept, cache.replace(tail=forget(cache.tail))


@partial(jax.jit, static_argnames="config")
def prefill_compress_program(
    model: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, ""],
    *,
    config: CompressionConfig,
) -> tuple[Float[Array, "B V"], Cache]:
    """The first stage of a stream."""
    return stages.prefill_compress(model, tokens, lengths, key, config)


@partial(jax.jit, static_argnames="tail_slots")
def ask_program(
    model: Any,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    tail_slots: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """The first stage of a stream that continues a cache."""
    return stages.extend_prompt(model, tokens, lengths, with_room(cache, tail_slots))


start_answer_program = jax.jit(stages.start_answer, static_argnames="room")
feed_last_program = jax.jit(stages.feed_last)


@partial(jax.jit, static_argnames="steps", donate_argnames=("tail", "answer"))
def decode_program(
    model: Any, cache: Cache, tail: Tail, answer: Answer, rules: Rules, *, steps: int
) -> tuple[Tail, Int[Array, " B"], Answer]:
    """The repeated stage of a stream: `steps` more tokens; `cache` comes without a tail."""
    cache, answer = stages.decode(model, cache.replace(tail=tail), answer, rules, steps)
    return cache.tail, cache.next_positions, answer


@partial(jax.jit, static_argnames=("recompress", "heads", "new_tokens", "fraction"))
def loosen_program(
    cache: Cache, *, recompress: Recompress, heads: int, new_tokens: int, fraction: float
) -> tuple[Cache, Ratio | None]:
    """The first stage of a stream that is compressed while it is decoded."""
    return loosen(cache, recompress, heads, new_tokens, fraction)


@partial(jax.jit, static_argnames=("recompress", "windows"), donate_argnames="cache")
def evict_program(
    cache: Cache,
    ratio: Ratio | None,
    *,
    recompress: Recompress,
    windows: tuple[int | None, ...],
) -> Cache:
    """What such a stream does after every segment; its own cache comes in and goes out."""
    return evict(cache, ratio, recompress, windows)


_PROGRAMS = (
    generate_program,
    answer_program,
    prefill_compress_program,
    ask_program,
    start_answer_program,
    decode_program,
    feed_last_program,
    loosen_program,
    evict_program,
)


def compilations() -> int:
    """Programs that `generate`, `stream` and `compress_prompt` have compiled in this process."""
    return sum(program._cache_size() for program in _PROGRAMS)  # type: ignore[attr-defined]
