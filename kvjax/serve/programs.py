"""The compiled programs of a server: all that it runs on the device.

A prompt is prefilled and compressed by a program of its bucket and method, and admitted by one of
the same shapes; one program decodes all rows, one releases some. What a program gets of the state
it overwrites, but for the model and the pages that decoding reads.

R rows, L layers, K KV heads, T tokens (the bucket), V vocabulary, O steps, U slots of the tail,
E end-of-sequence ids.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, no_type_check

import jax
import jax.monitoring
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax import sharding
from kvjax.cache.slot_layers import compacted
from kvjax.cache.slot_moves import reshard_slots
from kvjax.cache.slots import Slots
from kvjax.cache.state import Cache
from kvjax.cache.sums import settle
from kvjax.cache.tail import Tail, empty_tail, remember
from kvjax.compression.recompress import make_room
from kvjax.compression.room import slots_of
from kvjax.config import CompressionConfig, Recompress
from kvjax.generation.prefill import extend_prompt, prefill_compress_at_once
from kvjax.generation.programs import Flat, Program, whole
from kvjax.model_interface import NO_IMAGES
from kvjax.serve import pages as paged
from kvjax.serve.eviction import emptied, evicted, joined, parted, row_of
from kvjax.serve.pages import Lease, Pages, Shape
from kvjax.serve.rows import Drawn, Rows, draw, empty_rows, nothing_drawn, set_row


class State(NamedTuple):
    """What the device holds of all rows."""

    pages: Pages
    rows: Rows
    tail: Tail


@no_type_check  # jax maps trees to other leaves than arrays
class Prompt(struct.PyTreeNode):
    """A prompt that was prefilled and compressed, and is not admitted yet.

    Attributes:
      logits: `[1, V]` after it.
      slots: its entries, in the first slots of each layer.
      sizes: `[L]` slots that each layer may come to use, growth included.
    """

    logits: Float[Array, "1 V"]
    slots: Slots
    sizes: Int[Array, " L"]


# The model is kept for its mesh: nothing else says on which devices the state is to lie.
@partial(
    Program, static_argnames=("shape", "tail_slots", "quantize", "recompress"), keep_unused=True
)
def open_program(
    model: Flat,
    *,
    shape: Shape,
    tail_slots: int,
    quantize: bool,
    recompress: Recompress | None,
) -> State:
    """The state of a server without requests."""
    decoder = whole(model)
    config, dtype, parts = decoder.config, decoder.embed.table_VD.dtype, sharding.parts()
    pages = paged.empty_pages(shape, config.head_dim, dtype, quantize=quantize, parts=parts)
    tail = empty_tail(pages.slots, tail_slots)
    tail = tail.replace(cursor=jnp.zeros((shape.rows,), jnp.int32))
    if recompress is not None and recompress.queries:
        tail = remember(tail, recompress.queries, config.num_heads)
    if recompress is not None and recompress.sums:
        nothing = tuple(jnp.zeros(keys.shape[:3], jnp.float32) for keys in tail.keys)
        slots = pages.slots.replace(sums=jnp.zeros(pages.slots.owners.shape, jnp.float32))
        pages, tail = pages.replace(slots=slots), tail.replace(sums=nothing)
    rows = empty_rows(shape.rows, config.vocab_size, rope_by_length=config.rope_by_length)
    return _placed(State(pages, rows, tail))


@partial(Program, static_argnames=("config", "recompress"))
def prefill_program(
    model: Flat,
    tokens: Int[Array, "1 T"],
    lengths: Int[Array, " 1"],
    key: Key[Array, " 1"],
    budgets: Int[Array, " 1"],
    more: Int[Array, ""],
    rope_length: Int[Array, " 1"] | None,
    *,
    config: CompressionConfig,
    recompress: Recompress | None,
) -> Prompt:
    """Read and compress a prompt; no page is touched.

    Args:
      budgets: entries a head that are kept at most.
      more: tokens that every head is to have room for behind them; nothing where the answer is
        compressed again.
    """
    decoder = whole(model)
    features = NO_IMAGES.turned_for(rope_length)
    logits, cache = prefill_compress_at_once(
        decoder, tokens, lengths, key, config, features, budgets
    )
    if recompress is None:
        slots = compacted(slots_of(cache)) if cache.slots is None else cache.slots
        held_L = slots.counts[0].sum(-1, dtype=jnp.int32)
        sizes_L = held_L + slots.counts.shape[2] * more
    else:
        shape = decoder.config
        cache, _ = make_room(cache, recompress, shape.num_heads, shape.sliding_windows, False)
        roomy = settle(cache).slots
        assert roomy is not None
        assert roomy.sizes is not None
        slots, sizes_L = roomy, roomy.sizes[0]
        if recompress.layers == "global":  # an eviction takes the pages that it needs
            sizes_L = slots.counts[0].sum(-1, dtype=jnp.int32)
    slots = _placed_slots(paged.with_table(reshard_slots(slots, sharding.parts())))
    return Prompt(logits=sharding.replicated(logits), slots=slots, sizes=sizes_L)


@partial(Program, static_argnames="top", donate_argnames=("pages", "rows", "tail"))
def admit_program(
    pages: Pages,
    rows: Rows,
    tail: Tail,
    prompt: Prompt,
    row: Int[Array, ""],
    one: Rows,
    eos: Int[Array, " E"],
    hold: Int[Array, ""],
    *,
    top: int,
) -> tuple[State, Drawn]:
    """Give a prompt pages and a row, and draw its first token; `one` has how it is answered.

    Args:
      hold: pages that the row is to have at least.
    """
    pages, tail = joined(pages, tail)
    pages, lease = paged.take(pages, prompt.sizes, hold)
    pages, lease = paged.copy_in(pages, lease, prompt.slots)
    return _begun(State(pages, rows, tail), lease, prompt.logits, row, one, eos, top)


def _begun(state: State, lease: Lease, logits, row, one: Rows, eos, top) -> tuple[State, Drawn]:
    pages, rows, tail = state
    one, drawn = draw(logits, one, eos, top)
    mine = jnp.arange(len(tail.positions)) == row
    state = State(paged.put_row(pages, row, lease), set_row(rows, row, one), emptied(tail, mine))
    return _placed(state), sharding.replicated(drawn)


@partial(Program, static_argnames=("steps", "top"), donate_argnames=("rows", "tail"))
def decode_program(
    model: Flat,
    pages: Pages,
    rows: Rows,
    tail: Tail,
    eos: Int[Array, " E"],
    *,
    steps: int,
    top: int,
) -> tuple[Rows, Tail, Drawn]:
    """At most `steps` more tokens of every running row; its tail has room for them."""
    decoder = whole(model)
    entries = Cache(
        layers=(),
        slots=pages.filled,
        tail=tail,
        prompt_lengths=rows.prompt,
        next_positions=rows.position,
        rope_length=rows.rope_length,
    )

    def step(state):
        index, rows, tail, drawn = state
        now = entries.replace(tail=tail, next_positions=rows.position)
        fed_R = rows.running.astype(jnp.int32)
        x_R1D, now = decoder.extend(rows.token[:, None], fed_R, now)
        rows = rows.replace(position=now.next_positions)
        rows, new = draw(decoder.logits(x_R1D[:, 0]), rows, eos, top)
        # A row that is not running has taken no slot.
        tail = now.tail.replace(cursor=tail.cursor + fed_R)
        both = zip(drawn, new, strict=True)
        drawn = Drawn(*(lax.dynamic_update_slice_in_dim(*x, index, axis=1) for x in both))
        return index + 1, rows, tail, drawn

    nothing = nothing_drawn(rows.token.shape[0], steps, top)
    with jax.named_scope("decode"):
        _, rows, tail, drawn = lax.while_loop(
            lambda state: (state[0] < steps) & state[1].running.any(),
            step,
            (jnp.zeros((), jnp.int32), rows, tail, nothing),
        )
    rows, drawn = sharding.replicated((rows, drawn))
    return rows, _placed_tail(tail), drawn


@partial(Program, donate_argnames=("pages", "tail"))
def flush_program(pages: Pages, tail: Tail, rows: Bool[Array, " R"]) -> tuple[Pages, Tail]:
    """Move the tails of these rows into their pages."""
    pages, tail = joined(pages, tail)
    pages = paged.flush(pages, tail, rows)
    pages, tail = parted(pages, emptied(tail, rows, queries=False))
    return _placed_pages(pages), _placed_tail(tail)


_evicting = "recompress", "windows", "size"


@partial(Program, static_argnames=_evicting, donate_argnames=("pages", "tail"))
def evict_program(
    pages: Pages,
    tail: Tail,
    rows: Rows,
    row: Int[Array, ""],
    room: Int[Array, ""],
    hold: Int[Array, ""],
    *,
    recompress: Recompress,
    windows: tuple[int | None, ...],
    size: int,
) -> tuple[Pages, Tail]:
    """Compress a row again; its tail is empty afterwards. Arguments as of `evicted`."""
    pages, tail = joined(pages, tail)
    row_is = paged.lease_of(pages, row), row_of(tail, row), row_of(rows, row)
    pages, lease = evicted(pages, *row_is, room, hold, recompress, windows, size)
    pages = paged.put_row(pages, row, lease)
    # The queries stay: the next compression scores by the last ones.
    one = jnp.arange(len(tail.positions)) == row
    pages, tail = parted(pages, emptied(tail, one, queries=False))
    return _placed_pages(pages), _placed_tail(tail)


@partial(Program, donate_argnames=("pages", "rows"))
def release_program(pages: Pages, rows: Rows, gone: Bool[Array, " R"]) -> tuple[Pages, Rows]:
    """End these rows and give their pages back."""
    pages = _placed_pages(paged.release(pages, gone))
    return pages, sharding.replicated(rows.replace(running=rows.running & ~gone))


# ---------------------------------------------------------------------------- contexts
@partial(Program, donate_argnames="pages")
def keep_program(pages: Pages, prompt: Prompt) -> tuple[Pages, Lease]:
    """Pages for a prompt that many requests will ask, without a row."""
    pages, lease = paged.take(pages, prompt.sizes)
    pages, lease = paged.copy_in(pages, lease, prompt.slots)
    return _placed_pages(pages), sharding.replicated(lease)


@partial(Program, static_argnames="size")
def copy_out_program(pages: Pages, lease: Lease, *, size: int) -> Slots:
    """A copy of a context's entries, in `size` pages."""
    return sharding.replicated(paged.copy_out(pages, lease, size))


@partial(Program, donate_argnames="pages")
def drop_program(pages: Pages, lease: Lease) -> Pages:
    """Give such pages back; rows that share them keep them."""
    return paged.give_back(pages, lease)


@partial(Program, static_argnames="top", donate_argnames=("pages", "rows", "tail"))
def ask_program(
    pages: Pages,
    rows: Rows,
    tail: Tail,
    model: Flat,
    context: Lease,
    tokens: Int[Array, "1 T"],
    more: Int[Array, ""],
    row: Int[Array, ""],
    one: Rows,
    eos: Int[Array, " E"],
    *,
    top: int,
) -> tuple[State, Drawn]:
    """Admit a question about a context: its pages are shared, the question is written behind them.

    Args:
      context: what is asked about.
      tokens: the question.
      more: tokens of the question and the answer that every head is to have room for.
      row, one, eos: as of `admit_program`; `one.position` is where the question begins, and
        `one.prompt` counts the context and the question.
    """
    kv_heads = pages.slots.counts.shape[2]
    pages, lease = paged.fork(pages, context, kv_heads * more)
    mine = paged.view(pages, lease)
    asked = Cache(
        layers=(),
        slots=mine.filled,
        tail=empty_tail(mine.slots, tokens.shape[1]),
        prompt_lengths=one.position,
        next_positions=one.position,
        rope_length=one.rope_length,
    )
    logits, asked = extend_prompt(whole(model), tokens, one.prompt - one.position, asked)
    # Written once all layers have read: between two of them the pool would have to be copied.
    logits, mine, question = lax.optimization_barrier((logits, mine, asked.tail))
    mine = paged.flush(mine, question, jnp.ones((1,), bool))
    pages, lease = paged.with_pool(pages, mine.slots), paged.lease_of(mine, 0)
    one = one.replace(position=one.prompt)
    logits = sharding.replicated(logits)
    return _begun(State(pages, rows, tail), lease, logits, row, one, eos, top)


# ---------------------------------------------------------------------------- out of the pool
@no_type_check  # jax maps trees to other leaves than arrays
class Swapped(struct.PyTreeNode):
    """A row that was taken out: all that brings it back."""

    slots: Slots
    lease: Lease
    one: Rows
    tail: Tail


@partial(Program, static_argnames="size")
def swap_out_program(
    pages: Pages, rows: Rows, tail: Tail, row: Int[Array, ""], *, size: int
) -> Swapped:
    """A copy of a row, of `size` pages; it is released afterwards."""
    pages, tail = joined(pages, tail)
    lease = paged.lease_of(pages, row)
    slots = paged.copy_out(pages, lease, size)
    one = row_of(rows, row), row_of(tail, row)
    return sharding.replicated(Swapped(slots, lease, *one))


@partial(Program, donate_argnames=("pages", "rows", "tail"))
def swap_in_program(
    pages: Pages,
    rows: Rows,
    tail: Tail,
    swapped: Swapped,
    row: Int[Array, ""],
    hold: Int[Array, ""],
) -> State:
    """Give a row that was taken out pages, `hold` at least, and a place again."""
    pages, tail = joined(pages, tail)
    pages, lease = paged.take(pages, swapped.lease.sizes, hold)
    pages, lease = paged.copy_in(pages, lease, swapped.slots, swapped.lease.used)
    pages = paged.put_row(pages, row, lease)
    tail = jax.tree.map(lambda all, new: all.at[row].set(new[0]), tail, swapped.tail)
    return _placed(State(pages, set_row(rows, row, swapped.one), tail))


# ---------------------------------------------------------------------------- over a mesh
def _placed(state: State) -> State:
    """The state as every program leaves it on a mesh: slots split, rows whole everywhere."""
    pages, rows, tail = state
    pages, tail = parted(pages, tail)
    return State(_placed_pages(pages), sharding.replicated(rows), _placed_tail(tail))


def _placed_tail(tail: Tail) -> Tail:
    keys, values = (
        tuple(sharding.constrain(x, ".KUH") for x in xs) for xs in (tail.keys, tail.values)
    )
    return tail.replace(
        keys=keys,
        values=values,
        queries=tuple(sharding.constrain(x, "..NH") for x in tail.queries),
        positions=sharding.replicated(tail.positions),
        cursor=sharding.replicated(tail.cursor),
        query_positions=sharding.replicated(tail.query_positions),
        sums=tuple(sharding.constrain(x, ".KU") for x in tail.sums),
        slot_sums=None if tail.slot_sums is None else sharding.constrain(tail.slot_sums, ".M"),
    )


def _placed_pages(pages: Pages) -> Pages:
    table, sizes, used, holders = sharding.replicated(
        (pages.table, pages.sizes, pages.used, pages.holders)
    )
    slots = _placed_slots(pages.slots)
    return pages.replace(slots=slots, table=table, sizes=sizes, used=used, holders=holders)


def _placed_slots(slots: Slots) -> Slots:
    """Slots as a server leaves them on a mesh: dealt out to all devices, and counts whole."""
    scales, counts = slots.scales, sharding.replicated(slots.counts)
    return slots.replace(
        entries=sharding.constrain(slots.entries, ".ME"),
        owners=sharding.constrain(slots.owners, ".M"),
        positions=sharding.constrain(slots.positions, ".M"),
        scales=None if scales is None else sharding.constrain(scales, "..M"),
        counts=counts,
    )


PROGRAMS = (
    open_program, prefill_program, admit_program, decode_program, flush_program, evict_program,
    release_program, keep_program, drop_program, copy_out_program, ask_program, swap_out_program,
    swap_in_program,
)  # fmt: skip


def compilations() -> int:
    """Programs that servers have compiled in this process."""
    return sum(program._cache_size() for program in PROGRAMS)


@contextlib.contextmanager
def no_compilation() -> Iterator[None]:
    """Raise RuntimeError at the end if anything was compiled inside, in any thread.

    What a server that is warm does compiles nothing, whatever is asked of it.
    """
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **told: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(told.get("fun_name", "a program")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if compiled:
        raise RuntimeError(f"compiled where all programs were expected: {', '.join(compiled)}")
