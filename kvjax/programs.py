"""The compiled programs: everything in one, and the same stages apart.

A cache that the caller holds is never donated; tails and answers inside a stream are. A program
runs on the mesh that its first argument, the model or a cache, lies on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int, Key

from kvjax import sharding, stages
from kvjax.cache import Cache, Tail, forget, with_room
from kvjax.config import CompressionConfig, Recompress
from kvjax.loose import Ratio, loosen
from kvjax.precision import in_32_bits
from kvjax.recompress import evict
from kvjax.seen import Images
from kvjax.split import settled
from kvjax.stages import Answer, Rules


class Program:
    """A jitted function, traced and run on the mesh that its first argument lies on, in 32 bits."""

    def __init__(self, function: Callable, **settings: Any):
        self._jitted = jax.jit(function, **settings)

    def __call__(self, first: Any, *arguments: Any, **named: Any) -> Any:
        mesh = sharding.mesh_of(first)
        with in_32_bits(), sharding.using(mesh):
            return self._jitted(first, *sharding.known(arguments, mesh), **named)

    def lower(self, first: Any, *arguments: Any, **named: Any) -> jax.stages.Lowered:
        """As `jax.jit`'s."""
        mesh = sharding.mesh_of(first)
        with in_32_bits(), sharding.using(mesh):
            return self._jitted.lower(first, *sharding.known(arguments, mesh), **named)

    def _cache_size(self) -> int:
        """As `jax.jit`'s: programs that it was compiled to."""
        return self._jitted._cache_size()  # type: ignore[attr-defined]


@partial(Program, static_argnames=("config", "new_tokens", "tail_slots", "whole", "recompress"))
def generate_program(
    model: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, ""],
    rules: Rules,
    images: Images | None = None,
    *,
    config: CompressionConfig,
    new_tokens: int,
    tail_slots: int,
    whole: bool,
    recompress: Recompress | None = None,
) -> tuple[Answer, Int[Array, "B L K"], Cache | None]:
    """Prefill, compress and decode; the cache comes back, answer included, where `whole`."""
    logits, cache = stages.prefill_compress(model, tokens, lengths, key, config, images)
    answer = stages.start_answer(logits, tokens, lengths, key, rules, new_tokens)
    cache, kept = with_room(cache, tail_slots), stages.kept_entries(cache)
    ratio = None
    if recompress is not None:
        heads = model.config.num_heads
        cache, ratio = loosen(cache, recompress, heads, new_tokens, config.fraction)
    return _finish(model, cache, kept, answer, rules, whole, recompress, ratio)


@partial(Program, static_argnames=("new_tokens", "tail_slots", "whole", "recompress"))
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
    cache = settled(cache)
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
    answer, kept = sharding.replicated((answer, kept))
    if not whole:
        return answer, kept, None
    cache = stages.feed_last(model, cache, answer)
    return answer, kept, _readable(cache.replace(tail=forget(cache.tail)))


def _readable(cache: Cache) -> Cache:
    """The cache, with what a host looks at whole on every device."""
    lengths = sharding.replicated((cache.prompt_lengths, cache.next_positions))
    return cache.replace(prompt_lengths=lengths[0], next_positions=lengths[1])


@partial(Program, static_argnames="config")
def prefill_compress_program(
    model: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, ""],
    images: Images | None = None,
    *,
    config: CompressionConfig,
) -> tuple[Float[Array, "B V"], Cache]:
    """The first stage of a stream."""
    logits, cache = stages.prefill_compress(model, tokens, lengths, key, config, images)
    return logits, _readable(cache)


@partial(Program, static_argnames="tail_slots")
def ask_program(
    model: Any,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    tail_slots: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """The first stage of a stream that continues a cache."""
    return stages.extend_prompt(model, tokens, lengths, with_room(settled(cache), tail_slots))


feed_last_program = Program(stages.feed_last)


@partial(Program, static_argnames="room")
def start_answer_program(
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, ""],
    rules: Rules,
    *,
    room: int,
) -> Answer:
    """The stage of a stream that draws the first token of each row."""
    answer = stages.start_answer(logits, tokens, lengths, key, rules, room)
    return sharding.replicated(answer)


@partial(Program, static_argnames="steps", donate_argnames=("tail", "answer"))
def decode_program(
    model: Any, cache: Cache, tail: Tail, answer: Answer, rules: Rules, *, steps: int
) -> tuple[Tail, Int[Array, " B"], Answer]:
    """The repeated stage of a stream: `steps` more tokens; `cache` comes without a tail."""
    cache, answer = stages.decode(model, cache.replace(tail=tail), answer, rules, steps)
    return cache.tail, cache.next_positions, sharding.replicated(answer)


@partial(Program, static_argnames=("recompress", "heads", "new_tokens", "fraction"))
def loosen_program(
    cache: Cache, *, recompress: Recompress, heads: int, new_tokens: int, fraction: float
) -> tuple[Cache, Ratio | None]:
    """The first stage of a stream that is compressed while it is decoded."""
    return loosen(cache, recompress, heads, new_tokens, fraction)


@partial(Program, static_argnames=("recompress", "windows"), donate_argnames="cache")
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
    return sum(program._cache_size() for program in _PROGRAMS)
