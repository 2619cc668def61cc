"""What the machine of `test_life.py` holds: a cache with its oracle, and how they are compared."""

from typing import NamedTuple

import jax
import numpy as np
from oracle import Oracle, Row

from kvjax.cache.slots import pages_of
from kvjax.cache.state import Cache

# Log-probabilities, keys and values of float32 and float64 differ by less.
TOLERANCE = 1e-4


class Life(NamedTuple):
    """A cache, its bytes when it came, and a row of the oracle for each question."""

    cache: Cache
    digest: bytes
    rows: tuple[Row, ...]


class Stored(NamedTuple):
    """One row's entries of one layer, X of them; the `pooled` ones are no longer in the tail."""

    heads: np.ndarray
    positions: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    steps: np.ndarray  # [X, 2] of int8: what keys' and values' whole numbers are multiplied with
    pooled: np.ndarray


def digest(cache: Cache) -> bytes:
    """Every byte of a cache."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(cache))


def stored(cache: Cache, row: int, index: int) -> Stored:
    """What a layer holds for a question's row; rows that share entries each hold all of them."""
    parts = [_of_pool(cache, row, index) if cache.slots is not None else _padded(cache, row, index)]
    tail = cache.tail
    mine = row if len(tail.positions) > 1 else 0
    positions = np.asarray(tail.positions[mine])
    slots, kv_heads = np.flatnonzero(positions >= 0), tail.keys[index].shape[1]
    keys, values = (np.asarray(x[index][mine]) for x in (tail.keys, tail.values))
    for head in range(kv_heads):
        parts.append(
            Stored(
                np.full(len(slots), head), positions[slots], keys[head, slots],
                values[head, slots], np.zeros((len(slots), 2)), np.zeros(len(slots), bool),
            )
        )  # fmt: skip
    return Stored(*map(np.concatenate, zip(*parts, strict=True)))


def _of_pool(cache: Cache, row: int, index: int) -> Stored:
    pool = cache.slots
    mine = row if len(pool.owners) > 1 else 0
    number = np.arange(int(pool.lengths[mine, index]))
    pages = np.asarray(pages_of(pool, index)[mine])
    page = pages[0] + number // pool.page if pool.table is None else pages[number // pool.page]
    lies = page * pool.page + number % pool.page
    owners, positions = np.asarray(pool.owners[mine]), np.asarray(pool.positions[mine])
    # No layer holds what is not its own, and none of its own lies elsewhere.
    counts = np.asarray(pool.counts[mine])
    assert (owners >= 0).sum() == counts.sum()
    np.testing.assert_array_equal(owners >= 0, positions >= 0)
    slots = lies[owners[lies] >= 0]
    assert np.bincount(owners[slots], minlength=counts.shape[1]).tolist() == counts[index].tolist()
    both = np.asarray(pool.entries[mine], np.float64)[slots]
    keys, values = np.split(both, 2, axis=-1)
    steps = np.zeros((len(slots), 2))
    if pool.scales is not None:
        steps = np.asarray(pool.scales[mine], np.float64)[:, slots].T
        assert np.abs(both).max(initial=0) <= 127
        keys, values = keys * steps[:, :1], values * steps[:, 1:]
    return Stored(
        owners[slots], positions[slots], keys, values, steps, np.ones(len(slots), bool)
    )  # fmt: skip


def _padded(cache: Cache, row: int, index: int) -> Stored:
    layer = cache.layers[index]
    mine = row if len(layer.positions) > 1 else 0
    positions = np.asarray(layer.positions[mine])
    lengths = (positions >= 0).sum(-1)
    assert lengths.tolist() == np.asarray(cache.counts[mine, index]).tolist()
    for head, length in enumerate(lengths):  # in order, from slot 0
        assert (np.diff(positions[head, :length]) > 0).all()
        assert (positions[head, length:] == -1).all()
    heads, slots = np.nonzero(positions >= 0)
    keys, values = (np.asarray(x[mine])[heads, slots] for x in (layer.keys, layer.values))
    rest = np.zeros((len(heads), 2)), np.ones(len(heads), bool)
    return Stored(heads, positions[heads, slots], keys, values, *rest)


def holds(cache: Cache, row: int, seen: Row) -> np.ndarray:
    """`[L, K, n]` what a cache holds of the tokens that a row of the oracle has seen.

    Each entry once, its position one of the history, its key and value the oracle's own.
    """
    found = np.zeros((*seen.held.shape[:2], int(cache.next_positions.max())), bool)
    for index in range(found.shape[0]):
        layer = stored(cache, row, index)
        place = layer.heads, layer.positions
        assert (layer.positions < int(cache.next_positions[min(row, cache.batch - 1)])).all()
        assert len(set(zip(*map(np.ndarray.tolist, place), strict=True))) == len(layer.heads)
        found[index][place] = True
        known = layer.positions < seen.seen
        _compare(Stored(*(x[known] for x in layer)), seen, index)
    return found[:, :, : seen.seen]


def _compare(layer: Stored, seen: Row, index: int):
    """Keys and values are the oracle's; what int8 has rounded since is written into the oracle."""
    place = layer.heads, layer.positions
    fresh = layer.pooled & (layer.steps > 0).any(-1) & ~seen.rounded[index][place]
    for held, mine, step in (
        (seen.keys[index], layer.keys, layer.steps[:, 0]),
        (seen.values[index], layer.values, layer.steps[:, 1]),
    ):
        gap = np.abs(held[place] - mine).max(-1, initial=0)
        assert (gap <= np.where(fresh, step / 2, 0) + TOLERANCE).all()
        largest = np.abs(held[place]).max(-1, initial=0) / 127
        np.testing.assert_allclose(step[fresh], largest[fresh], atol=TOLERANCE / 127)
        held[layer.heads[fresh], layer.positions[fresh]] = mine[fresh]
    seen.rounded[index][layer.heads[fresh], layer.positions[fresh]] = True


def agree(cache: Cache, rows: tuple[Row, ...]):
    """Cache and oracle hold the same entries."""
    for row, seen in enumerate(rows):
        np.testing.assert_array_equal(holds(cache, row, seen), seen.held)


def evicted(cache: Cache, rows: tuple[Row, ...], least: int, sinks: int = 0):
    """A cache that was compressed again: nothing came back, and every slot that could be is taken.

    Args:
      cache: its tail has nothing that the rows have seen.
      rows: of the oracle, which take over what the cache holds.
      least: last tokens that are always kept.
      sinks: first positions that stay where they were held.
    """
    for row, seen in enumerate(rows):
        held, before = holds(cache, row, seen), seen.held
        assert (held <= before).all()
        for index, size in enumerate(np.asarray(cache.slots.lengths[row])):
            could = before[index]
            window = seen.oracle.config.sliding_windows[index]
            if window is not None:
                could = could & (np.arange(seen.seen) > seen.seen - window)
            assert held[index].sum() == min(size, could.sum())
            always = could.copy()
            always[:, min(sinks, seen.seen) : max(0, seen.seen - least)] = False
            assert (held[index] >= always).all()
        seen.held = held


def gone_for_good(cache: Cache, rows: tuple[Row, ...]):
    """A cache that evicted for good what the ratio had masked, and more where it has no room."""
    for row, seen in enumerate(rows):
        seen.settle()
        held, sizes = holds(cache, row, seen), np.asarray(cache.slots.lengths[row])
        assert (held <= seen.held).all()
        expected = np.minimum(sizes, seen.held.sum((1, 2)))
        np.testing.assert_array_equal(held.sum((1, 2)), expected)
        seen.held = held


def likely(log_probs: list[float], tokens: list[int], expected: np.ndarray):
    """Log-probabilities are the oracle's, and no other token was likelier."""
    if tokens:
        mine = expected[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(log_probs, mine, atol=TOLERANCE)
        assert (mine >= expected[: len(tokens)].max(-1) - 2 * TOLERANCE).all()


def born(oracle: Oracle, prompt: list[int], cache: Cache, row: int) -> tuple[Row, np.ndarray]:
    """The oracle's row of a prompt that was just compressed, and the log-probs after the prompt."""
    seen = Row(oracle)
    after = seen.feed(prompt)[-1]
    seen.prompt = len(prompt)
    seen.held = holds(cache, row, seen)
    if cache.keep_ratio:
        seen.ratio = seen.held.sum(-1)
    return seen, after


def budgeted(rows: tuple[Row, ...], base: list[int]):
    """Each row holds its budget, as far as layers can see so much."""
    for seen, each in zip(rows, base, strict=True):
        layers, kv_heads = seen.held.shape[:2]
        windows = seen.oracle.config.sliding_windows
        can = [seen.prompt if w is None else min(seen.prompt, w - 1) for w in windows]
        assert seen.held.sum() == kv_heads * min(layers * each, sum(can))
