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
from kvjax.serve.pages import Pages
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
    tail: Tail,
    rows: Rows,
    row: Int[Array, ""],
    rule: Recompress,
    windows: tuple[int | None, ...],
    size: int,
) -> Pages:
    """The pages, in which a row has what a rule keeps of its entries and its tail's.

    Args:
      pages: `joined`.
      tail: of all rows, `joined`.
      rows: all of them.
      row: which.
      rule: what it keeps.
      windows: each layer's sliding window.
      size: pages that the row has at most.
    """
    lease = paged.lease_of(pages, row)
    everywhere = rule.layers == "global"
    if everywhere:
        slots = paged.copy_out(pages, lease, size).replace(sizes=lease.used[None])
        kv_heads = slots.counts.shape[1] * slots.counts.shape[2]
        slots = slots.replace(room=kv_heads * (rule.budget or 0))
    else:
        slots = paged.view(pages, lease).reserved
    cache = Cache(
        layers=(),
        slots=slots,
        tail=row_of(tail, row),
        prompt_lengths=rows.prompt[row][None],
        next_positions=rows.position[row][None],
    )
    kept = evict(cache, None, rule, windows).slots
    assert kept is not None  # it had some
    if not everywhere:
        lease = lease.replace(counts=kept.counts[0], used=lease.sizes)
        return paged.put_row(paged.with_pool(pages, kept), row, lease)
    sizes_L = kept.lengths[0]
    pages, lease = paged.take(paged.give_back(pages, lease), sizes_L)
    pages, lease = paged.copy_in(pages, lease, paged.with_table(kept), sizes_L)
    return paged.put_row(pages, row, lease)
