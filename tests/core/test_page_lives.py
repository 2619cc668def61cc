"""Pages in any order of admissions, evictions, ends, forks and swaps, as hypothesis finds them."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from page_machine import DIM, HEADS, LAYERS, PAGES, ROWS, TAIL, Machine, released

from kvjax import Recompress
from kvjax.serve.programs import evict_program
from kvjax.serve.rows import empty_rows

MOVES = ("admit", "flush", "end", "keep", "fork", "drop", "swap_out", "swap_in", "evict")
RULE = Recompress(every=TAIL, budget=4, scorer="key-diff")
RULES = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
STEPS = 50
LIVES = int(os.environ.get("LIVES", 0))  # of `make lives`


class Evicting(Machine):
    """The same with rows that are compressed again in the pages that they have."""

    def __init__(self, seed, parts=1):
        super().__init__(seed, parts)
        self.sharing: set[int] = set()

    def fork(self):
        before = set(self.rows)
        super().fork()
        self.sharing |= set(self.rows) - before

    def move(self, name):
        getattr(self, name)()
        self.sharing &= set(self.rows)

    def evict(self):
        """A tail of tokens into a row's slots, and as many entries out as do not fit any more."""
        rows = [row for row in self.rows if row not in self.sharing]
        if not rows:
            return
        row, mine = int(self.rng.choice(rows)), self.fill_tail()
        sizes = np.asarray(self.pages.sizes[row])
        of_rows = empty_rows(ROWS, 1)
        of_rows = of_rows.replace(position=of_rows.position + self.next)
        numbers = np.int32(row), np.int32(0), np.int32(0)
        self.pages, self.tail = evict_program(
            self.pages, self.tail, of_rows, *numbers, recompress=RULE, windows=(None,) * LAYERS,
            size=PAGES,
        )  # fmt: skip
        assert not (np.asarray(self.tail.positions[row]) >= 0).any()
        for layer, size in enumerate(sizes):
            self.settle(row, layer, int(size), mine[row][layer])
        self.room[row] = 0

    def fill_tail(self):
        """Tokens without holes in every row's tail, each numbered beside head and position."""
        tail = np.full((ROWS, TAIL), -1, np.int32)
        keys = np.full((LAYERS, ROWS, HEADS, TAIL, DIM), np.nan, np.float32)
        mine = [[{} for _ in range(LAYERS)] for _ in range(ROWS)]
        for row in range(ROWS):
            for slot in range(int(self.rng.integers(1, TAIL + 1))):
                tail[row, slot] = self.next
                for layer in range(LAYERS):
                    for head in range(HEADS):
                        number = self.next + 1 + layer * HEADS + head
                        keys[layer, row, head, slot] = number
                        mine[row][layer][number] = (head, self.next)
                self.next += 1 + LAYERS * HEADS
        self.tail = self.tail.replace(
            keys=tuple(map(jnp.asarray, keys)),
            values=tuple(map(jnp.asarray, keys)),
            positions=jnp.asarray(tail),
            cursor=jnp.asarray((tail >= 0).sum(1), jnp.int32),
        )
        return mine

    def settle(self, row, layer, size, new):
        """What a layer holds now is some of what it held: as much as fits, and the last ones."""
        before, after = self.told(row, layer) | new, self.found(self.stored(), row, layer)
        assert after.items() <= before.items()
        assert len(after) == min(size, len(before))
        recent = min(RULE.recent, size // HEADS // 2)
        last = {n for n, (_, position) in before.items() if position >= self.next - recent}
        assert last <= after.keys()
        self.rows[row][layer] = after


class Lives(RuleBasedStateMachine):
    """One move after another; after each of them all is where it should be."""

    parts = 1

    def __init__(self):
        super().__init__()
        self.machine = Evicting(0, self.parts)

    @rule(name=st.sampled_from(MOVES), seed=st.integers(0, 2**16))
    def move(self, name, seed):
        self.machine.rng = np.random.default_rng(seed)
        self.machine.move(name)

    @invariant()
    def nothing_is_lost(self):
        self.machine.poison()
        self.machine.check()

    def teardown(self):
        """All is free once nobody holds anything."""
        machine = self.machine
        machine.pages = released(machine.pages, np.ones((ROWS,), bool))
        machine.rows = {}
        while machine.contexts:
            machine.drop()
        machine.check()
        assert machine.free() == PAGES


class SplitLives(Lives):
    """The same with every page dealt out to two devices."""

    parts = 2


@pytest.mark.parametrize("machine", [Lives, SplitLives])
def test_a_few_lives(machine):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=2, stateful_step_count=STEPS, **RULES)
    )


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Lives, SplitLives] if LIVES else [Lives])
def test_a_thousand_moves(machine):
    """Slow: 1,000 moves, each looked at from all sides; `make lives` makes 20 times as many."""
    lives = max(20, LIVES * 2 // 5)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=lives, stateful_step_count=STEPS, **RULES)
    )
