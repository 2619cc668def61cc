"""The compiled programs: everything in one, and the same stages apart.

A cache that the caller holds is never donated; tails and answers inside a stream are. A program
runs on the mesh that its first argument, the model or a cache, lies on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from kvjax import sharding
from kvjax.cache.ratio import Ratio
from kvjax.cache.state import Cache, reshard, with_own_entries, with_room
from kvjax.cache.sums import begin
from kvjax.cache.tail import Tail, remember, resized
from kvjax.compression.recompress import evict
from kvjax.config import CompressionConfig, Recompress
from kvjax.exact import in_32_bits
from kvjax.generation import decode, prefill
from kvjax.generation.decode import Answer, Held, Rules
from kvjax.generation.prefill import Prefilled
from kvjax.model_interface import Images, Model


class Program:
    """A jitted function, traced and run on the mesh that its first argument lies on, in 32 bits."""

    def __init__(self, function: Callable, **settings: Any):
        self._jitted = jax.jit(function, **settings)

    def __call__(self, first: Any, *arguments: Any, **named: Any) -> Any:
        mesh = sharding.mesh_of(first)
        with in_32_bits(), sharding.using(mesh):
            return self._jitted(first, *sharding.put_on_mesh(arguments, mesh), **named)

    def lower(self, first: Any, *arguments: Any, **named: Any) -> jax.stages.Lowered:
        """As `jax.jit`'s."""
        mesh = sharding.mesh_of(first)
        with in_32_bits(), sharding.using(mesh):
            return self._jitted.lower(first, *sharding.put_on_mesh(arguments, mesh), **named)

    def _cache_size(self) -> int:
        """As `jax.jit`'s: programs that it was compiled to."""
        return self._jitted._cache_size()  # type: ignore[attr-defined]


class Structure:
    """How a pytree is put together; equal to itself without a look, so that calls are cheap."""

    def __init__(self, treedef: Any):
        self.treedef, self._hash = treedef, hash(treedef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        same = self is other
        return same or (isinstance(other, Structure) and self.treedef == other.treedef)


@no_type_check  # jax maps trees to other leaves than arrays
class Flat(struct.PyTreeNode):
    """A model taken apart once, for a program that is called again and again with it.

    To take a Flax module of 32 layers apart costs a millisecond of Python at every call.
    """

    leaves: tuple[Array, ...]
    structure: Structure = struct.field(pytree_node=False)


def flat(model: Model) -> Flat:
    """The model, taken apart."""
    leaves, treedef = jax.tree.flatten(model)
    return Flat(tuple(leaves), Structure(treedef))


def whole(model: Model | Flat) -> Model:
    """The model, put together again."""
    if not isinstance(model, Flat):
        return model
    return jax.tree.unflatten(model.structure.treedef, model.leaves)


@partial(Program, static_argnames=("config", "new_tokens", "tail_slots", "whole", "recompress"))
def generate_program(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, "*row"],
    rules: Rules,
    images: Images | None = None,
    rope_length: Int[Array, " B"] | None = None,
    *,
    config: CompressionConfig,
    new_tokens: int,
    tail_slots: int,
    whole: bool,
    recompress: Recompress | None = None,
) -> tuple[Answer, Held, Cache | None]:
    """Prefill, compress and decode; the cache comes back, answer included, where `whole`."""
    logits, cache = prefill.prefill_compress(
        model, tokens, lengths, key, config, images, rope_length
    )
    cache = with_room(cache, tail_slots)
    prompt = logits, tokens, lengths, key
    return _answer(model, cache, prompt, rules, new_tokens, whole, recompress, config.fraction)


@partial(Program, static_argnames=("config", "windows"))
def compress_program(
    prompts: Prefilled,
    key: Key[Array, "*row"],
    *,
    windows: tuple[int | None, ...],
    config: CompressionConfig,
) -> Cache:
    """A cache of prompts that were read before."""
    return _readable(prefill.compress_prefilled(prompts, windows, key, config))


@partial(Program, static_argnames=("new_tokens", "tail_slots", "whole", "recompress"))
def answer_program(
    model: Model,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, "*row"],
    rules: Rules,
    *,
    new_tokens: int,
    tail_slots: int,
    whole: bool,
    recompress: Recompress | None = None,
) -> tuple[Answer, Held, Cache | None]:
    """A question to a cache that the caller holds (never donated: it can be asked again)."""
    logits, cache = _ask(model, cache, tokens, lengths, tail_slots, recompress)
    prompt = logits, tokens, lengths, key
    return _answer(model, cache, prompt, rules, new_tokens, whole, recompress)


def _ask(model, cache, tokens, lengths, tail_slots, recompress):
    cache = with_room(reshard(cache), tail_slots)
    if recompress is not None and recompress.queries:
        tail = remember(cache.tail, recompress.queries, model.config.num_heads)
        cache = cache.replace(tail=tail)
    if recompress is not None and recompress.sums:
        cache = begin(with_own_entries(cache))
    taken = cache.tail.cursor
    logits, cache = prefill.extend_prompt(model, tokens, lengths, cache)
    # What follows takes the slots of the question's padding.
    tail = cache.tail.replace(cursor=taken + lengths.max().astype(jnp.int32))
    return logits, cache.replace(tail=tail)


def _answer(model, cache, prompt, rules, new_tokens, whole, recompress, fraction=None):
    """Everything after a prompt, or after a question (whose cache has no fraction to keep)."""
    answer = decode.start_answer(*prompt, rules, new_tokens)
    asked = fraction is None
    rest = new_tokens, 1.0 if asked else fraction, asked
    cache, ratio, held = decode.open_answer(model, cache, recompress, *rest)
    if recompress is None:
        cache, answer = decode.decode(model, cache, answer, rules, new_tokens - 1)
    else:
        cache, answer = decode.decode_in_segments(model, cache, answer, rules, recompress, ratio)
    answer, held = sharding.replicated((answer, held))
    if not whole:
        return answer, held, None
    return answer, held, _readable(decode.close_answer(model, cache, answer, ratio, recompress))


def _readable(cache: Cache) -> Cache:
    """The cache, with what a host looks at whole on every device."""
    whole = cache.prompt_lengths, cache.next_positions, cache.tail.cursor
    lengths, following, cursor = sharding.replicated(whole)
    tail = cache.tail.replace(cursor=cursor)
    return cache.replace(prompt_lengths=lengths, next_positions=following, tail=tail)


@partial(Program, static_argnames="config")
def prefill_compress_program(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, "*row"],
    images: Images | None = None,
    rope_length: Int[Array, " B"] | None = None,
    *,
    config: CompressionConfig,
) -> tuple[Float[Array, "B V"], Cache]:
    """The first stage of a stream."""
    logits, cache = prefill.prefill_compress(
        model, tokens, lengths, key, config, images, rope_length
    )
    return logits, _readable(cache)


@partial(Program, static_argnames=("tail_slots", "recompress"))
def ask_program(
    model: Model,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    tail_slots: int,
    recompress: Recompress | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """The first stage of a stream that continues a cache."""
    return _ask(model, cache, tokens, lengths, tail_slots, recompress)


@partial(Program, static_argnames="room")
def start_answer_program(
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, "*row"],
    rules: Rules,
    *,
    room: int,
) -> Answer:
    """The stage of a stream that draws the first token of each row."""
    answer = decode.start_answer(logits, tokens, lengths, key, rules, room)
    return sharding.replicated(answer)


@partial(Program, static_argnames=("recompress", "new_tokens", "fraction", "asked"))
def open_answer_program(
    model: Model,
    cache: Cache,
    *,
    recompress: Recompress,
    new_tokens: int,
    fraction: float,
    asked: bool,
) -> tuple[Cache, Ratio | None, Held]:
    """The stage before a stream is decoded, where it is compressed again on the way."""
    rest = recompress, new_tokens, fraction, asked
    cache, ratio, held = decode.open_answer(model, cache, *rest)
    return cache, ratio, sharding.replicated(held)


@partial(Program, static_argnames="steps", donate_argnames=("tail", "answer"))
def decode_program(
    model: Model | Flat, cache: Cache, tail: Tail, answer: Answer, rules: Rules, *, steps: int
) -> tuple[Tail, Int[Array, " B"], Answer]:
    """The repeated stage of a stream: `steps` more tokens; `cache` comes without a tail."""
    cache, answer = decode.decode(whole(model), cache.replace(tail=tail), answer, rules, steps)
    return cache.tail, cache.next_positions, sharding.replicated(answer)


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


@partial(Program, static_argnames="recompress")
def close_answer_program(
    model: Model,
    cache: Cache,
    answer: Answer,
    ratio: Ratio | None,
    *,
    recompress: Recompress | None,
) -> Cache:
    """The last stage of a stream whose cache is handed back."""
    return _readable(decode.close_answer(model, cache, answer, ratio, recompress))


@partial(Program, static_argnames="slots")
def resize_program(tail: Tail, *, slots: int) -> Tail:
    """A copy of a tail with other empty slots: what lies between two turns, and no more."""
    return resized(tail, slots)


_PROGRAMS = (
    generate_program,
    answer_program,
    compress_program,
    prefill_compress_program,
    ask_program,
    start_answer_program,
    open_answer_program,
    decode_program,
    evict_program,
    close_answer_program,
)


def compilations() -> int:
    """Programs that `generate`, `stream` and `compress_prompt` have compiled in this process."""
    return sum(program._cache_size() for program in _PROGRAMS)
