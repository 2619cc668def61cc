"""A row of a server is compressed again: in its own pages, or into fewer or more of them.

A rule of one threshold gives every layer another size each time. The row's entries are copied out
of the pool, chosen from, and copied into free pages, which are as many as it needs then: one row is
moved, where to choose in place would look at the whole pool.

Sums of squared probabilities are written at every step, so that they lie with the tail while rows
are decoded. Whatever moves pages joins them to the pool's slots first, and parts them again.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from kvjax.cache.state import Cache
from kvjax.cache.tail import Tail
from kvjax.compression.recompress import evict
from kvjax.config import Recompress
from kvjax.serve import pages as paged
from kvjax.serve.pages import Lease, Pages
from kvjax.serve.rows import Rows


def joined(pages: Pages, tail: Tail) -> tuple[Pages, Tail]:
    """Pages with what their slots have received, if that is added up, and the tail without it."""
    slots = pages.slots.replace(sums=tail.slot_sums)
    return pages.replace(slots=slots), tail.replace(slot_sums=None)


def parted(pages: Pages, tail: Tail) -> tuple[Pages, Tail]:
    """Pages without sums, and the tail with them."""
    tail = tail.replace(slot_sums=pages.slots.sums)
    return pages.replace(slots=pages.slots.replace(sums=None)), tail


def row_of[T](tree: T, row: Int[Array, ""]) -> T:
    """A row of arrays that have one for each; of a tail that is not `parted`."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, 1), tree)


def emptied(tail: Tail, rows: Bool[Array, " R"], *, queries: bool = True) -> Tail:
    """The tail without these rows' tokens, and without the queries that it remembers of them."""
    positions = tail.query_positions
    if queries and positions is not None:
        positions = jnp.where(rows[:, None], -1, positions)
    return tail.replace(
        positions=jnp.where(rows[:, None], -1, tail.positions),
        cursor=jnp.where(rows, 0, tail.cursor),
        query_positions=positions,
        sums=tuple(jnp.where(rows[:, None, None], 0, x) for x in tail.sums),
    )


def evicted(
    pages: Pages,
    lease: Lease,
    tail: Tail,
    one: Rows,
    room: Int[Array, ""],
    hold: Int[Array, ""],
    rule: Recompress,
    windows: tuple[int | None, ...],
    size: int,
) -> tuple[Pages, Lease]:
    """The pages, and the lease of a row that keeps what a rule says of its entries and its tail's.

    Args:
      pages: `joined`.
      lease: the row's.
      tail, one: its own, `[1]`.
      room: entries that it keeps, of all layers and heads, under one threshold for all layers.
      hold: pages that it has afterwards at least, under such a rule.
      rule: how they are chosen.
      windows: each layer's sliding window.
      size: pages that the row has at most.
    """
    everywhere = rule.layers == "global"
    if everywhere:
        slots = paged.copy_out(pages, lease, size).replace(sizes=lease.used[None])
    else:
        slots = paged.view(pages, lease).reserved
    cache = Cache(
        layers=(), slots=slots, tail=tail, prompt_lengths=one.prompt, next_positions=one.position
    )
    kept = evict(cache, None, rule, windows, room[None]).slots
    assert kept is not None  # it had some
    if not everywhere:
        lease = lease.replace(counts=kept.counts[0], used=lease.sizes)
        return paged.with_pool(pages, kept), lease
    sizes_L = kept.lengths[0]
    pages, lease = paged.take(paged.give_back(pages, lease), sizes_L, hold)
    return paged.copy_in(pages, lease, paged.with_table(kept), sizes_L)
