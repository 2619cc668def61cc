"""Who waits, who has a row, and how many pages are left; nothing of this is on the device.

A request is admitted by what it can come to hold at most: what is kept of its prompt and what its
answer adds. So it never has to wait for pages once it has a row, but where a new context takes
those of the newest rows, and its answer never depends on its neighbours. Eviction under pressure
(`pressure.py`) changes what tickets hold, and promises neither. Requests are admitted in the order
in which they came, those that were swapped out before the others.
"""

from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class Ticket:
    """A request as the scheduler sees it.

    Attributes:
      pages: that it may come to hold beside those that it shares.
      apart: that it may come to hold once it shares none any more; as many by default.
      row: its own, while it has one.
      entries: that lie in its pages, of all layers and heads; counted under pressure alone.
      tail: tokens of its answer that lie in the tail.
      compressed: number of the eviction that compressed it last; 0 before any.
      fresh: whether it has not decoded since it got its row.
    """

    pages: int
    apart: int = 0
    row: int | None = None
    entries: int = 0
    tail: int = 0
    compressed: int = 0
    fresh: bool = True

    def __post_init__(self):
        self.apart = max(self.apart, self.pages)


class Scheduler[T: Ticket]:
    """Rows and pages, given out first come, first served.

    Args:
      rows: answered at once.
      pages: of the pool.

    Attributes:
      queue: tickets that wait, the next one first.
      running: ticket of each row that has one.
      free: pages that nobody has been promised.
      held: pages of contexts, which no row's end gives back.
      closed: whether nobody is admitted until a row ends, or is swapped out.
    """

    def __init__(self, rows: int, pages: int):
        self.rows, self.pages = rows, pages
        self.queue: deque[T] = deque()
        self.running: dict[int, T] = {}
        self.free = pages
        self.held = 0
        self.closed = False

    def check(self, pages: int) -> None:
        """Raise ValueError where so many pages cannot be had, whoever else ends."""
        if pages > self.pages - self.held:
            raise ValueError(
                f"the request may come to hold {pages} pages, expected at most"
                f" {self.pages - self.held} (cache_bytes, less what contexts hold)"
            )

    def submit(self, ticket: T) -> None:
        """Put a ticket at the end of the queue.

        Raises:
          ValueError: as `check`.
        """
        self.check(ticket.pages)
        self.queue.append(ticket)

    def admit(self) -> T | None:
        """The next ticket, with a row and its pages; None where it has to wait, or nobody waits."""
        row = next((row for row in range(self.rows) if row not in self.running), None)
        fits = bool(self.queue) and self.queue[0].pages <= self.free
        if row is None or not fits or self.closed:
            return None
        ticket = self.queue.popleft()
        ticket.row, self.running[row], ticket.fresh = row, ticket, True
        self.free -= ticket.pages
        return ticket

    def finish(self, ticket: T) -> int | None:
        """Take a ticket out, wherever it is; the row that it had, if it had one."""
        if ticket.row is None:
            if ticket in self.queue:
                self.queue.remove(ticket)
            return None
        row, ticket.row = ticket.row, None
        del self.running[row]
        self.free += ticket.pages
        self.closed = False
        return row

    def resize(self, ticket: T, pages: int) -> None:
        """Let a running ticket hold so many pages; there are as many free as it gets more."""
        self.free += ticket.pages - pages
        ticket.pages = pages

    def check_hold(self, pages: int, leaving: int = 0) -> None:
        """Raise ValueError as `hold`, once so many pages of other contexts are let go."""
        waiting = [*self.queue, *self.running.values()]
        largest = max((ticket.apart for ticket in waiting), default=0)
        available = max(0, self.pages - self.held + leaving - largest)
        if pages > available:
            raise ValueError(
                f"the context needs {pages} pages, expected at most {available} (cache_bytes, less"
                " what other contexts and the largest request hold)"
            )

    def hold(self, pages: int) -> list[T]:
        """Promise pages to a context; the tickets to be swapped out first, the newest one first.

        They are back in the queue, before all others.

        Raises:
          ValueError: so many that some ticket could never be admitted beside them.
        """
        self.check_hold(pages)
        leaving: list[T] = []
        newest = list(self.running.values())[::-1]
        room = self.free
        while room < pages:
            leaving.append(newest.pop(0))
            room += leaving[-1].pages
        self.free -= pages
        self.held += pages
        return leaving

    def swap_out(self, ticket: T) -> int:
        """Take a running ticket's row and pages; it waits before all others, and shares no more."""
        row = self.finish(ticket)
        assert row is not None  # it was running
        ticket.pages = ticket.apart
        self.queue.appendleft(ticket)
        return row

    def let_go(self, pages: int) -> None:
        """Take back what a context was promised."""
        self.free += pages
        self.held -= pages
