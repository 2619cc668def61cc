"""Pages for many rows: random admissions, ends, forks and swaps against plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest
from page_machine import (
    DIM,
    HEADS,
    LAYERS,
    PAGE,
    PAGES,
    ROWS,
    SHAPE,
    TAIL,
    Machine,
    flushed,
    released,
)

from kvjax.cache.tail import empty_tail
from kvjax.kernels.decode_attention import paged_attention
from kvjax.serve import pages as paged
from kvjax.serve.pages import Shape


@pytest.mark.parametrize(("seed", "parts"), [(0, 1), (2, 2)])
def test_whatever_happens_nothing_is_lost(seed, parts):
    machine = Machine(seed, parts)
    moves = ["admit", "flush", "end", "keep", "fork", "drop", "swap_out", "swap_in"]
    done = dict.fromkeys(moves, 0)
    for _ in range(200):
        move = str(machine.rng.choice(moves, p=[0.2, 0.25, 0.1, 0.1, 0.15, 0.05, 0.05, 0.1]))
        before = machine.next, sorted(machine.rows), len(machine.contexts)
        getattr(machine, move)()
        done[move] += before != (machine.next, sorted(machine.rows), len(machine.contexts))
        machine.poison()
        machine.check()
    assert min(done.values()) > 2, done
    machine.pages = released(machine.pages, np.ones((ROWS,), bool))
    machine.rows = {}
    for _ in list(machine.contexts):
        machine.drop()
    machine.check()
    assert machine.free() == PAGES


def test_attention_is_that_of_the_entries_alone():
    """Rows of one pool, NaN in all that they do not hold: the same as each row's entries apart."""
    machine = Machine(3)
    while len(machine.rows) < ROWS:
        machine.admit()
        machine.flush()
    machine.poison()
    slots, layer = machine.pages.slots, 1
    q = np.random.default_rng(0).normal(size=(ROWS, 1, HEADS, DIM)).astype(np.float32)
    scale = 1e-3  # values are numbers of entries
    out, _ = paged_attention(
        jnp.asarray(q * scale), jnp.full((ROWS, 1), machine.next),
        slots.entries, slots.owners, slots.positions,
        machine.pages.table[:, layer], machine.pages.used[:, layer], page=PAGE, kv_heads=HEADS,
    )  # fmt: skip
    for row, held in machine.rows.items():
        for head in range(HEADS):
            mine = [
                n for n, h in held[layer].items() if (h[0] if isinstance(h, tuple) else h) == head
            ]
            x = np.array(mine, np.float64)
            score = x * (q[row, 0, head] * scale).sum() * DIM**-0.5
            weight = np.exp(score - score.max(initial=-np.inf))
            want = (weight * x).sum() / weight.sum() if mine else 0.0
            np.testing.assert_allclose(out[row, 0, head], want, rtol=1e-5)


def test_a_tail_becomes_int8_in_pages_of_int8():
    """Each vector to within half its scale, and nothing but the two rows' tokens."""
    pages = paged.empty_pages(Shape(*SHAPE[:-1]), DIM, jnp.float32, quantize=True)
    leases = []
    for row in range(2):
        pages, lease = paged.take(pages, jnp.full((LAYERS,), HEADS * TAIL))
        pages = paged.put_row(pages, row, lease)
        leases.append(lease)
    tail = empty_tail(pages.slots, TAIL)
    rng = np.random.default_rng(0)
    both = rng.normal(size=(2, LAYERS, ROWS, HEADS, TAIL, DIM)).astype(np.float32)
    positions = np.full((ROWS, TAIL), -1, np.int32)
    positions[:2] = [[5, 6, 7], [3, -1, 4]]
    tail = tail.replace(
        keys=tuple(map(jnp.asarray, both[0])), values=tuple(map(jnp.asarray, both[1])),
        positions=jnp.asarray(positions),
    )  # fmt: skip
    slots = flushed(pages, tail, jnp.arange(ROWS) < 2).slots
    owners, found = np.asarray(slots.owners[0]), 0
    for row, lease in enumerate(leases):
        for layer, mine in enumerate(np.asarray(lease.table)):
            for at in (mine[mine < PAGES, None] * PAGE + np.arange(PAGE)).reshape(-1):
                if owners[at] < 0:
                    continue
                slot = positions[row].tolist().index(int(slots.positions[0, at]))
                for half in (0, 1):
                    whole = np.asarray(slots.entries[0, at, half * DIM : (half + 1) * DIM])
                    scale = float(slots.scales[0, half, at])
                    want = both[half, layer, row, owners[at], slot]
                    np.testing.assert_allclose(whole * scale, want, atol=0.51 * scale)
                found += 1
    assert found == (owners >= 0).sum() == 5 * LAYERS * HEADS
