"""Who is admitted when, and that no page is promised twice."""

import random

import pytest

from kvjax import Recompress
from kvjax.serve.menu import tail_slots
from kvjax.serve.scheduler import Scheduler, Ticket


def admitted(scheduler):
    found = []
    while (ticket := scheduler.admit()) is not None:
        found.append(ticket)
    return found


def test_first_come_first_served():
    scheduler = Scheduler(rows=2, pages=10)
    first, large, small = Ticket(4), Ticket(7), Ticket(1)
    for ticket in (first, large, small):
        scheduler.submit(ticket)
    # The small one would fit, and waits: else the large one might wait for ever.
    assert admitted(scheduler) == [first]
    assert scheduler.finish(first) == 0
    assert admitted(scheduler) == [large, small]
    assert (large.row, small.row) == (0, 1)
    assert scheduler.free == 2


def test_a_context_swaps_out_the_newest_rows():
    scheduler = Scheduler(rows=4, pages=12)
    tickets = [Ticket(4) for _ in range(4)]
    for ticket in tickets:
        scheduler.submit(ticket)
    assert admitted(scheduler) == tickets[:3]
    leaving = scheduler.hold(5)
    assert leaving == [tickets[2], tickets[1]]
    for ticket in leaving:
        scheduler.swap_out(ticket)
    assert list(scheduler.queue) == tickets[1:]
    assert (scheduler.free, scheduler.held) == (3, 5)
    with pytest.raises(ValueError, match="needs 4 pages, expected at most 3"):
        scheduler.hold(4)
    with pytest.raises(ValueError, match="hold 8 pages, expected at most 7"):
        scheduler.submit(Ticket(8))
    scheduler.let_go(5)
    assert admitted(scheduler) == tickets[1:3]


def test_what_can_never_fit_is_refused():
    with pytest.raises(ValueError, match="hold 11 pages, expected at most 10"):
        Scheduler(rows=1, pages=10).submit(Ticket(11))


def test_pages_and_rows_are_promised_once():
    rng = random.Random(0)
    scheduler, held = Scheduler(rows=5, pages=40), []
    for _ in range(2000):
        move = rng.choice(["submit", "admit", "finish", "abort", "hold", "let_go"])
        if move == "submit":
            pages = rng.randint(0, 12)
            scheduler.submit(Ticket(pages, apart=pages + rng.randint(0, 3)))
        elif move == "admit":
            scheduler.admit()
        elif move == "finish" and scheduler.running:
            ticket = rng.choice(list(scheduler.running.values()))
            row = ticket.row
            assert scheduler.finish(ticket) == row
        elif move == "abort" and scheduler.queue:
            assert scheduler.finish(rng.choice(list(scheduler.queue))) is None
        elif move == "hold" and sum(held) < 15:
            held.append(rng.randint(1, 10))
            for ticket in scheduler.hold(held[-1]):
                scheduler.swap_out(ticket)
        elif move == "let_go" and held:
            scheduler.let_go(held.pop())
        running = scheduler.running
        assert all(ticket.row == row for row, ticket in running.items())
        assert all(ticket.row is None for ticket in scheduler.queue)
        assert scheduler.held == sum(held)
        promised = sum(ticket.pages for ticket in running.values()) + sum(held)
        assert scheduler.free == 40 - promised >= 0


@pytest.mark.parametrize(
    ("slots", "rule", "message"),
    [
        (20, None, "tail_slots=20, expected a multiple of decode_steps=8"),
        (None, Recompress(every=8), "recompress.budget=None, expected a number of entries"),
        (None, Recompress(every=12, budget=16), "recompress.every=12, expected a multiple of"),
    ],
)
def test_tails_that_no_server_has(slots, rule, message):
    with pytest.raises(ValueError, match=message):
        tail_slots(slots, 8, rule)
