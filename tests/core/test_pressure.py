"""Rows that are evicted under pressure: the scheduler and the device agree on every page."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import Recompress
from kvjax.cache.slots import Slots
from kvjax.cache.tail import Tail
from kvjax.serve import pages as paged
from kvjax.serve.eviction import evicted
from kvjax.serve.pages import Shape
from kvjax.serve.pressure import Pressure, Sizes, floor_of
from kvjax.serve.rows import empty_rows
from kvjax.serve.scheduler import Scheduler, Ticket

ROWS, LAYERS, HEADS, WIDTH, PAGES, PAGE, DIM = SHAPE = 5, 2, 2, 8, 20, 4, 4
TAIL, STEPS, BUDGET, RECENT = 4, 2, 8, 2
RULE = Recompress(
    every=TAIL, budget=BUDGET, window=RECENT, sinks=0, scorer="squared-sum", layers="global"
)
ALL = LAYERS * HEADS
SIZES = Sizes(
    page=PAGE, layers=LAYERS, width=WIDTH, heads=ALL, tail=TAIL, most=ALL * BUDGET, floor=ALL * 6
)
# Pages of a row at most, and of a prompt's pool; and tokens of a prompt.
MOST = SIZES.pages(SIZES.most)
PROMPT = HEADS * BUDGET


@dataclass(eq=False, kw_only=True)
class Request(Ticket):
    """A ticket with what its row should hold: number, layer, head and position of each entry."""

    left: int
    slots: Slots
    held: dict[int, tuple[int, int, int]]
    position: int
    in_tail: list[int] = field(default_factory=list)
    saved: Any = None


class Machine:
    """A server without a model: every entry is a number, and sums are random."""

    def __init__(self, seed: int, parts: int):
        self.rng, self.parts, self.next = np.random.default_rng(seed), parts, 0
        pages = paged.empty_pages(Shape(*SHAPE[:-1]), DIM, jnp.float32, parts=parts)
        sums = jnp.zeros(pages.slots.owners.shape, jnp.float32)
        self.pages = pages.replace(slots=pages.slots.replace(sums=sums))
        self.tail = np.full((LAYERS, ROWS, HEADS, TAIL), np.nan, np.float32)
        self.sums = np.zeros((LAYERS, ROWS, HEADS, TAIL), np.float32)
        self.scheduler: Scheduler[Request] = Scheduler(ROWS, PAGES)
        self.pressure = Pressure(self.scheduler, SIZES, self.evict, self.swap_out)
        self.forced = self.swaps = self.ended = 0

    # ------------------------------------------------------------------ the device's side
    def dealt(self, x, axis=1):
        """Slots in order as `parts` devices have them."""
        split = x.reshape(*x.shape[:axis], -1, self.parts, *x.shape[axis + 1 :])
        return split.swapaxes(axis, axis + 1).reshape(x.shape)

    def prompt(self):
        size = MOST * PAGE
        entries = np.full((1, size, 2 * DIM), np.nan, np.float32)
        owners, positions = np.full((1, size), -1, np.int8), np.full((1, size), -1, np.int32)
        counts = self.rng.integers(0, 6, (1, LAYERS, HEADS)).astype(np.int32)
        held, start = {}, 0
        for layer in range(LAYERS):
            heads = np.repeat(np.arange(HEADS), counts[0, layer])
            for at, head in enumerate(heads, start):
                place = at - start
                entries[0, at], owners[0, at], positions[0, at] = self.next, head, place
                held[self.next] = layer, int(head), place
                self.next += 1
            start += -(-len(heads) // PAGE) * PAGE
        sums = self.rng.random((1, size)).astype(np.float32)
        arrays = {"entries": entries, "owners": owners, "positions": positions, "sums": sums}
        arrays = {name: jnp.asarray(self.dealt(x)) for name, x in arrays.items()}
        slots = Slots(**arrays, counts=jnp.asarray(counts), page=PAGE, dtype=jnp.dtype("float32"),
                      parts=self.parts)  # fmt: skip
        return slots, held

    def evict(self, ticket, entries, pages, forced):
        row, count = ticket.row, len(ticket.in_tail)
        positions = np.full((1, TAIL), -1, np.int32)
        positions[0, :count] = ticket.in_tail
        one = slice(row, row + 1)
        keys = tuple(np.repeat(x[one, ..., None], DIM, -1) for x in self.tail)
        tail = Tail(keys, keys, positions, np.int32(count), sums=tuple(self.sums[:, one]))
        self.pages = again(
            self.pages, tail, np.int32(row), np.int32(ticket.position), np.int32(entries),
            np.int32(pages),
        )  # fmt: skip
        left = self.stored(row)
        assert left == {number: ticket.held[number] for number in left}
        assert len(left) == min(len(ticket.held), entries)
        recent = {n for n, (*_, at) in ticket.held.items() if at >= ticket.position - RECENT}
        assert recent <= left.keys()
        ticket.held, ticket.in_tail = left, []
        self.forced += forced

    def swap_out(self, ticket):
        self.pressure.before_swap(ticket)
        row = self.scheduler.swap_out(ticket)
        ticket.saved = copied_out(self.pages, np.int32(row)), self.tail[:, row], self.sums[:, row]
        ticket.saved = jax.tree.map(np.array, ticket.saved)
        self.pages = released(self.pages, np.arange(ROWS) == row)
        self.swaps += 1

    # ------------------------------------------------------------------ what may happen
    def submit(self):
        slots, held = self.prompt()
        tokens = int(self.rng.integers(1, 40))
        entries = min(len(held) + int(self.rng.integers(0, 3)), SIZES.most)
        fed = tokens if tokens > TAIL else 0
        ticket = Request(
            pages=SIZES.first(entries, fed), apart=SIZES.least(entries, fed), entries=entries,
            left=tokens, slots=slots, held=held, position=PROMPT,
        )  # fmt: skip
        self.scheduler.submit(ticket)

    def admit(self):
        self.pressure.make_way()
        ticket = self.scheduler.admit()
        if ticket is None:
            return
        row, hold = np.int32(ticket.row), np.int32(ticket.pages)
        if ticket.saved is None:
            self.pages = admitted(self.pages, ticket.slots, row, hold)
            return
        (lease, slots), self.tail[:, row], self.sums[:, row] = ticket.saved
        self.pages, ticket.saved = copied_in(self.pages, lease, slots, row, hold), None

    def decode(self):
        for ticket in list(self.scheduler.running.values()):
            if ticket.tail + min(STEPS, ticket.left) > TAIL:
                self.pressure.grow(ticket)
        for row, ticket in list(self.scheduler.running.items()):
            for _ in range(min(STEPS, ticket.left)):
                at = len(ticket.in_tail)
                for layer, head in np.ndindex(LAYERS, HEADS):
                    self.tail[layer, row, head, at] = self.next
                    ticket.held[self.next] = layer, head, ticket.position
                    self.next += 1
                self.sums[:, row, :, at] = self.rng.random((LAYERS, HEADS)) / 4
                ticket.in_tail.append(ticket.position)
                ticket.position, ticket.tail = ticket.position + 1, ticket.tail + 1
                ticket.left -= 1
            ticket.fresh = False
            if not ticket.left:
                self.end(ticket)

    def end(self, ticket):
        row = self.scheduler.finish(ticket)
        if row is not None:
            self.pages = released(self.pages, np.arange(ROWS) == row)
        self.ended += 1

    def abort(self):
        alive = [*self.scheduler.queue, *self.scheduler.running.values()]
        if alive:
            self.end(alive[int(self.rng.integers(len(alive)))])

    # ------------------------------------------------------------------ what must hold
    def in_order(self, x):
        return self.undealt(np.asarray(x)[0])

    def undealt(self, x):
        split = x.reshape(self.parts, -1, *x.shape[1:])
        return split.swapaxes(0, 1).reshape(x.shape)

    def stored(self, row):
        """Entries in the pages of a row."""
        slots, found = self.pages.slots, {}
        arrays = [self.in_order(x) for x in (slots.entries, slots.owners, slots.positions)]
        for layer in range(LAYERS):
            number = np.arange(int(self.pages.used[row, layer]))
            at = np.asarray(self.pages.table)[row, layer][number // PAGE] * PAGE + number % PAGE
            for entry, owner, position in zip(*(x[at] for x in arrays), strict=True):
                if owner >= 0:
                    assert (entry == entry[0]).all()
                    found[int(entry[0])] = layer, int(owner), int(position)
        return found

    def check(self):
        pages, page = self.pages, PAGE
        need = -(-np.asarray(pages.sizes) // page)
        holders = np.zeros((PAGES,), int)
        for row, ticket in self.scheduler.running.items():
            assert need[row].sum() == ticket.pages
            for layer in range(LAYERS):
                holders += np.bincount(pages.table[row, layer, : need[row, layer]], minlength=PAGES)
            waiting = set(ticket.in_tail)
            mine = {n: where for n, where in ticket.held.items() if where[2] not in waiting}
            assert self.stored(row) == mine
            assert len(mine) <= ticket.entries
        np.testing.assert_array_equal(pages.holders, holders)
        assert holders.max() <= 1
        assert (holders == 0).sum() == self.scheduler.free

    def poison(self):
        """NaN in every slot that holds no entry of a row."""
        owners = self.in_order(self.pages.slots.owners)
        free = np.repeat(np.asarray(self.pages.holders) == 0, PAGE) | (owners < 0)
        self.pages = poisoned(self.pages, jnp.asarray(self.dealt(free, 0)))


@jax.jit
def again(pages, tail, row, position, room, hold):
    one = empty_rows(1, 1)
    one = one.replace(position=position[None], prompt=jnp.full((1,), PROMPT))
    lease = paged.lease_of(pages, row)
    rest = room, hold, RULE, (None,) * LAYERS, MOST
    pages, lease = evicted(pages, lease, tail, one, *rest)
    return paged.put_row(pages, row, lease)


@jax.jit
def admitted(pages, slots, row, hold):
    pages, lease = paged.take(pages, slots.counts[0].sum(-1, dtype=jnp.int32), hold)
    pages, lease = paged.copy_in(pages, lease, paged.with_table(slots))
    return paged.put_row(pages, row, lease)


@jax.jit
def copied_out(pages, row):
    lease = paged.lease_of(pages, row)
    return lease, paged.copy_out(pages, lease, MOST)


@jax.jit
def copied_in(pages, lease, slots, row, hold):
    pages, own = paged.take(pages, lease.sizes, hold)
    pages, own = paged.copy_in(pages, own, slots, lease.used)
    return paged.put_row(pages, row, own)


@jax.jit
def poisoned(pages, nothing):
    slots = pages.slots
    entries = jnp.where(nothing[None, :, None], jnp.nan, slots.entries)
    sums = jnp.where(nothing[None], jnp.nan, slots.sums)
    return pages.replace(slots=slots.replace(entries=entries, sums=sums))


released = jax.jit(paged.release)


@pytest.mark.parametrize(("seed", "parts"), [(0, 1), (1, 2)])
def test_pages_are_counted_alike_whatever_happens(seed, parts):
    machine = Machine(seed, parts)
    for _ in range(220):
        move = machine.rng.choice(["submit", "admit", "decode", "abort"], p=[0.2, 0.4, 0.38, 0.02])
        getattr(machine, str(move))()
        machine.poison()
        machine.check()
    assert machine.forced > 5
    assert machine.swaps > 0
    for _ in range(1000):
        if not (machine.scheduler.queue or machine.scheduler.running):
            break
        machine.admit()
        machine.decode()
        machine.check()
    assert machine.ended > 15
    assert machine.scheduler.free == PAGES


def test_entries_and_pages_agree():
    for entries in range(SIZES.most + 1):
        pages = SIZES.pages(entries)
        assert SIZES.entries(pages) >= entries
        # The most pages that any two layers of so many entries take.
        worst = max(-(-a // PAGE) - (a - entries) // PAGE for a in range(entries + 1))
        assert pages == min(worst, LAYERS * WIDTH) or entries < LAYERS


def with_entries(*entries, pages=PAGES, rows=4):
    """Running rows that have decoded, with so many entries each, and what is done to them."""
    scheduler, told = Scheduler(rows, pages), []

    def swap_out(ticket):
        pressure.before_swap(ticket)
        scheduler.swap_out(ticket)
        told.append(ticket)

    def evict(ticket, entries, pages, forced):
        told.append((ticket, entries, forced))

    pressure = Pressure(scheduler, SIZES, evict, swap_out)
    tickets = [Ticket(SIZES.pages(count), entries=count) for count in entries]
    for ticket in tickets:
        scheduler.submit(ticket)
        assert scheduler.admit() is ticket
        ticket.fresh = False
    return scheduler, pressure, tickets, told


def test_those_compressed_longest_ago_give_up_first_and_the_newest_leaves_last():
    scheduler, pressure, (first, second, third), told = with_entries(32, 32, 16, pages=23)
    assert scheduler.free == 0
    first.compressed, third.tail = 1, TAIL
    pressure.grow(third)
    # Four are lacking. The second goes to the floor, the third grows by what that leaves.
    assert told == [(second, 25, True), (third, 25, True)]
    assert [ticket.pages for ticket in (first, second, third)] == [9, 7, 7]
    # Who is admitted now would be compressed at once.
    scheduler.submit(Ticket(0))
    assert scheduler.admit() is None
    scheduler.finish(third)
    assert scheduler.admit() is not None


def test_the_newest_is_swapped_out_when_all_are_at_the_floor():
    scheduler, pressure, (first, second, third), told = with_entries(8, 16, 16, pages=13)
    first.tail = TAIL
    pressure.grow(first)
    assert told[0] is third
    assert told[1:] == [(first, 24, False)]
    assert (scheduler.free, list(scheduler.queue)) == (1, [third])
    assert third.pages == 9  # with room for one more tail
    # Now the second is the newest, and cannot reach the floor with the page that is free.
    second.tail = TAIL
    pressure.grow(second)
    assert told[2:] == [second]
    assert list(scheduler.queue) == [second, third]


def test_a_prompt_is_not_compressed_before_it_has_decoded():
    scheduler, pressure, (first, second), told = with_entries(32, 32, pages=18)
    scheduler.submit(Ticket(2))
    first.fresh = True
    second.fresh = True
    pressure.make_way()
    assert not told
    first.fresh = False
    pressure.make_way()
    assert told == [(first, 25, True)]
    assert scheduler.admit() is not None
    # What would not be enough is not done.
    scheduler.submit(Ticket(9))
    second.fresh = False
    pressure.make_way()
    assert len(told) == 1


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (("wait", None, RULE), "pressure='wait', expected swap or evict"),
        (("swap", 4, RULE), "pressure_floor=4 with pressure='swap', expected 'evict'"),
        (("evict", None, None), "pressure='evict', expected recompress with scorer='squared-sum'"),
        (("evict", None, Recompress(every=8, budget=16)), "pressure='evict', expected recompress"),
        (("evict", 2, RULE), "pressure_floor=2, expected an integer from 3 .* to .*=8"),
        (("evict", 9, RULE), "pressure_floor=9, expected an integer from 3"),
    ],
)  # fmt: skip
def test_a_wrong_floor_is_one_sentence(ask, told):
    with pytest.raises(ValueError, match=told):
        floor_of(*ask)


def test_half_a_budget_is_left_by_default():
    assert floor_of("evict", None, RULE) == 4
    assert floor_of("swap", None, None) is None
