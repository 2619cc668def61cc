"""Eviction under pressure: rows get pages as they grow, and give some up where there are too few.

KV-Compress's way (Rehg 2024, arXiv 2410.00161; its scheduler): a request is admitted when there are
pages for what it holds now and for one tail more. Where a row cannot grow, or the next request does
not fit, rows keep less than the rule says, those first that were compressed longest ago. None falls
below a floor, and none is compressed before it has decoded. After a row has grown at others' cost
nobody is admitted until a row ends or is swapped out: else who comes would be compressed at once.

Nothing of this is on the device. Pages are counted by the most that a row's entries may take, and
the device gives a row exactly so many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kvjax.config import Recompress
from kvjax.serve.scheduler import Scheduler, Ticket


@dataclass(frozen=True)
class Sizes:
    """Entries, of all layers and heads, and the pages that they take.

    Attributes:
      page: slots of a page.
      layers: each of which begins with a page of its own.
      width: pages of a layer at most.
      heads: KV heads of all layers together.
      tail: tokens of a tail.
      most: entries that a row keeps at most.
      floor: entries that a row may always keep.
    """

    page: int
    layers: int
    width: int
    heads: int
    tail: int
    most: int
    floor: int

    def pages(self, entries: int) -> int:
        """Pages that so many entries take at most, however layers share them."""
        spread = (entries + self.layers * (self.page - 1)) // self.page
        return min(spread, self.layers * self.width)

    def entries(self, pages: int) -> int:
        """Entries that always fit in so many pages."""
        if pages >= self.layers * self.width:
            return self.most
        return max(0, pages * self.page + self.page - 1 - self.layers * (self.page - 1))

    def grown(self, entries: int, tokens: int) -> int:
        """Entries of a row that keeps so many, and has as many tokens more."""
        return min(entries + self.heads * tokens, self.most)

    def first(self, entries: int, tokens: int) -> int:
        """Pages of a request: its prompt's, and those of one tail of its answer's tokens.

        Args:
          entries: kept of the prompt.
          tokens: of the answer that come to lie in pages.
        """
        return self.pages(self.grown(entries, min(tokens, self.tail)))

    def least(self, entries: int, tokens: int) -> int:
        """Pages without which a request can never be answered; arguments as of `first`."""
        whole = self.grown(entries, tokens)
        return max(self.first(entries, tokens), self.pages(min(whole, self.floor)))


def floor_of(pressure: str, floor: int | None, recompress: Recompress | None) -> int | None:
    """Entries a head that are left of a row when pages run short; None for "swap".

    Args:
      pressure: "swap" or "evict".
      floor: as asked for; half the rule's budget by default.
      recompress: how answers are compressed.

    Raises:
      ValueError: another name, a rule that cannot keep less, a floor outside its range.
    """
    if pressure not in ("swap", "evict"):
        raise ValueError(f"pressure={pressure!r}, expected swap or evict")
    if pressure == "swap":
        if floor is not None:
            raise ValueError(f"pressure_floor={floor!r} with pressure='swap', expected 'evict'")
        return None
    if recompress is None or recompress.layers != "global" or recompress.budget is None:
        raise ValueError(
            "pressure='evict', expected recompress with scorer='squared-sum' and layers='global'"
        )
    protected, budget = recompress.recent + recompress.sinks, recompress.budget
    found = max(budget // 2, min(protected + 1, budget)) if floor is None else floor
    if not isinstance(found, int) or not min(protected + 1, budget) <= found <= budget:
        raise ValueError(
            f"pressure_floor={found!r}, expected an integer from {min(protected + 1, budget)}"
            f" (what is always kept, and one more) to recompress.budget={budget}"
        )
    return found


class _Want(NamedTuple):
    """What a row would hold: its entries, and its pages."""

    entries: int
    pages: int


class Pressure[T: Ticket]:
    """What rows hold, with a scheduler whose tickets get more and fewer pages.

    Args:
      scheduler: of the server.
      sizes: of its rows.
      evict: compresses a row to so many entries in so many pages, and tells why: whether others
        were short of pages.
      swap_out: takes a row out of the pool; it calls the scheduler's.
    """

    def __init__(
        self,
        scheduler: Scheduler[T],
        sizes: Sizes,
        evict: Callable[[T, int, int, bool], None],
        swap_out: Callable[[T], None],
    ):
        self._scheduler, self._sizes = scheduler, sizes
        self._evict, self._swap_out = evict, swap_out
        self._round = 0

    def make_way(self) -> None:
        """Let rows keep less where the next request lacks nothing but pages, if that is enough."""
        scheduler = self._scheduler
        if scheduler.closed or not scheduler.queue or len(scheduler.running) == scheduler.rows:
            return
        lacking = scheduler.queue[0].pages - scheduler.free
        if lacking <= 0:
            return
        wants = self._given_up({}, lacking)
        if sum(ticket.pages - want.pages for ticket, want in wants.items()) >= lacking:
            for ticket, want in wants.items():
                self._compress(ticket, want, forced=True)

    def grow(self, ticket: T) -> None:
        """Compress a running row whose tail is full; others may have to keep less, or to leave."""
        scheduler, sizes = self._scheduler, self._sizes
        # Who made way for a row before it has an empty tail by now, or none at all.
        while ticket.row is not None and ticket.tail:
            entries = sizes.grown(ticket.entries, ticket.tail)
            mine = _Want(entries, max(sizes.pages(entries), ticket.pages))
            lacking = mine.pages - ticket.pages - scheduler.free
            wants = self._given_up({ticket: mine}, lacking)
            own = wants.pop(ticket, mine)
            for other, want in wants.items():
                self._compress(other, want, forced=True)
                scheduler.closed = True
            if own.pages - ticket.pages <= scheduler.free:
                self._compress(ticket, own, forced=own.entries < entries)
            else:
                self._swap_out(list(scheduler.running.values())[-1])

    def before_swap(self, ticket: T) -> None:
        """Ask for as many pages as a row needs to go on, once it comes back."""
        entries = self._sizes.grown(ticket.entries, self._sizes.tail)
        most = min(self._sizes.pages(entries), self._scheduler.pages)
        ticket.apart = max(ticket.pages, most)

    def _given_up(self, wanted: dict[T, _Want], lacking: int) -> dict[T, _Want]:
        """Rows that hold less, so that `lacking` pages more are free, as far as floors allow.

        Args:
          wanted: of rows that are to hold something else than they do.
          lacking: pages; nobody gives up any where there are none lacking.
        """
        sizes, found = self._sizes, {}
        running = self._scheduler.running.values()
        rows = [ticket for ticket in running if ticket in wanted or not ticket.fresh]
        for ticket in sorted(rows, key=lambda ticket: ticket.compressed):
            if lacking <= 0:
                break
            entries = sizes.grown(ticket.entries, ticket.tail)
            now = wanted.get(ticket, _Want(entries, ticket.pages))
            least = sizes.pages(min(entries, sizes.floor))
            pages = max(least, now.pages - lacking)
            if pages < now.pages:
                kept = min(entries, max(sizes.entries(pages), min(entries, sizes.floor)))
                found[ticket] = _Want(kept, pages)
                lacking -= now.pages - pages
        return found

    def _compress(self, ticket: T, want: _Want, *, forced: bool) -> None:
        self._round += 1
        self._scheduler.resize(ticket, want.pages)
        ticket.entries, ticket.compressed, ticket.tail = want.entries, self._round, 0
        self._evict(ticket, want.entries, want.pages, forced)
