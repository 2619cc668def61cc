"""Squared probabilities that slots and a tail receive: by hand, and against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slot_cases import make_case, make_dead, normal, oracle, paged, quantized, through_pages

from kvjax.kernels.decode_attention import packed, paged_attention
from kvjax.kernels.decode_attention.squares import add_scored, add_slots, add_tail

PATHS = ("xla", "pallas")


def add(found, call, page, before=0.0):
    """What `add_scored` makes of a kernel's scores, in the order of the pool."""
    _, lse, scores = found
    sums = jnp.full(call["owners"].shape, before, jnp.float32)
    rest = (jnp.asarray(call[name]) for name in ("owners", "table", "lengths"))
    return np.asarray(add_scored(sums, scores, lse, *rest, page=page))


def in_layer(sums, call, page, row):
    """The sums of one row's slots as the layer numbers them."""
    number = np.arange(call["lengths"][row])
    return sums[row, call["table"][row, number // page] * page + number % page]


def squares(case, lse, kv_heads, window=None, evicted=None):
    """`[B, M]` one query, head and slot at a time, in float64."""
    q = case["q"].astype(np.float64)
    heads, head_dim = q.shape[2:]
    found = np.zeros(case["owners"].shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        owner = n // (heads // kv_heads)
        for m in range(case["start"][b], case["end"][b]):
            distance = case["query_positions"][b, t] - case["positions"][b, m]
            gone = evicted is not None and evicted[0][b, owner] <= m < evicted[1][b, t, owner]
            if case["owners"][b, m] != owner or distance < 0 or gone:
                continue
            if window is None or distance < window:
                score = q[b, t, n] @ case["entries"][b, m, :head_dim] / np.sqrt(head_dim)
                found[b, m] += np.exp(score - lse[b, t, n]) ** 2
    return found


@pytest.mark.parametrize("implementation", PATHS)
def test_two_heads_and_three_slots_by_hand(implementation):
    """H = 16, so scores are a quarter of the products; the third slot is another head's.

    The first query's weights are (1/4, 3/4), the second's halves: 1/16 + 1/4 and 9/16 + 1/4. The
    third and fourth look at their own slot alone, twice 1.
    """
    q = jnp.zeros((1, 1, 4, 16)).at[0, 0, 0, 0].set(4.0)
    entries = jnp.zeros((1, 32, 32)).at[0, 17, 0].set(math.log(3))
    owners = jnp.full((1, 32), -1, jnp.int8).at[0, 16:19].set(jnp.array([0, 0, 1], jnp.int8))
    call = {
        "q": q,
        "query_positions": jnp.array([[9]]),
        "entries": entries,
        "owners": owners,
        "positions": jnp.zeros((1, 32), jnp.int32),
        "table": jnp.array([[1, 0]]),
        "lengths": jnp.array([3]),
    }
    found = through_pages(call, None, 16, implementation, scores=True)
    sums = add(found, call, 16, before=1.0)
    np.testing.assert_allclose(sums[0, 16:19], [1 + 5 / 16, 1 + 13 / 16, 3], rtol=1e-6)
    np.testing.assert_array_equal(sums[0, :16], 1)  # another layer's
    # Beside a tail that weighs as much as all of them, probabilities are half, squares a quarter.
    more = found[0], found[1] + math.log(2), found[2]
    expected = np.array([5 / 16, 13 / 16, 2]) / 4
    np.testing.assert_allclose(add(more, call, 16)[0, 16:19], expected, rtol=1e-6)


@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("owners", ["any", "one slot", "empty layer", "holes"])
def test_a_kernels_scores_match_float64(owners, implementation, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 32)
    case = make_case(43, owners=owners, head_dim=64, slots=300)
    expected, lse = oracle(case, 2, 30)
    call = paged(3, case, 16)
    found = through_pages(call, None, 16, implementation, window=30, scores=True)
    np.testing.assert_allclose(found[0], expected, atol=5e-6)
    sums, exact = add(found, call, 16), squares(case, lse, 2, 30)
    for row, (start, end) in enumerate(zip(case["start"], case["end"], strict=True)):
        np.testing.assert_allclose(in_layer(sums, call, 16, row), exact[row, start:end], atol=2e-6)
    assert np.isclose(sums.sum(), exact.sum())  # nothing for what is not the layer's


@pytest.mark.parametrize("implementation", PATHS)
def test_rows_of_one_pool_add_as_rows_of_their_own(implementation):
    """A server's rows share one pool, in which each has pages of its own."""
    call = paged(3, make_case(43, head_dim=64, slots=200), 16)
    apart = add(through_pages(call, None, 16, implementation, scores=True), call, 16)
    rows, slots = call["owners"].shape
    shared = {name: call[name].reshape(1, rows * slots, *call[name].shape[2:])
              for name in ("entries", "owners", "positions")}  # fmt: skip
    shared["table"] = call["table"] + np.arange(rows)[:, None] * (slots // 16)
    call |= shared
    found = add(through_pages(call, None, 16, implementation, scores=True), call, 16)
    np.testing.assert_allclose(found.reshape(rows, slots), apart, atol=1e-7)
    assert (apart.max(axis=1) > 0).all()


@pytest.mark.parametrize("implementation", PATHS)
def test_int8_entries_count_as_what_they_stand_for(implementation):
    case, exact = quantized(make_case(47, head_dim=64, slots=200))
    call = paged(5, case, 32)
    sums = add(through_pages(call, None, 32, implementation, scores=True), call, 32)
    expected = squares(exact, oracle(exact, 2)[1], 2)
    for row, (start, end) in enumerate(zip(case["start"], case["end"], strict=True)):
        np.testing.assert_allclose(
            in_layer(sums, call, 32, row), expected[row, start:end], atol=2e-6
        )


@pytest.mark.parametrize("consecutive", [False, True])
def test_several_tokens_match_float64(consecutive, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 32)
    case = make_case(61, tokens=3, head_dim=8, slots=100, owners="holes")
    case["query_positions"][1, 2] = -1  # padding sees nothing, and gives nothing
    evicted = make_dead(9, case, 2)
    lse = oracle(case, 2, 30, evicted)[1]
    exact = squares(case, lse, 2, 30, evicted)
    start, page = case["start"], 1 if consecutive else 4
    gone = evicted[0] - start[:, None], evicted[1] - start[:, None, None]
    call = paged(7, case, page)
    if consecutive:
        lengths = case["end"] - start
        call = {k: v for k, v in case.items() if k not in ("start", "end")}
        call |= {"table": start[:, None], "lengths": lengths}
    sums = add_slots(
        jnp.zeros(call["owners"].shape), jnp.asarray(lse, jnp.float32),
        **jax.tree.map(jnp.asarray, call), page=page, kv_heads=2, window=30,
        evicted=jax.tree.map(jnp.asarray, gone), consecutive=consecutive,
    )  # fmt: skip
    if consecutive:
        np.testing.assert_allclose(sums, exact, atol=2e-6)
        return
    for row, (first, end) in enumerate(zip(start, case["end"], strict=True)):
        found = in_layer(np.asarray(sums), call, page, row)
        np.testing.assert_allclose(found, exact[row, first:end], atol=2e-6)


def test_a_tails_entries_match_float64():
    q, keys = normal(1, 2, 3, 4, 8), normal(2, 2, 2, 5, 8)
    visible = np.random.default_rng(3).random((2, 1, 3, 5)) < 0.6
    keys[1, :, 4] = np.nan  # a hole
    visible[1, :, :, 4] = False
    lse = normal(4, 2, 3, 4) + 4
    found = add_tail(jnp.ones((2, 2, 5)), *map(jnp.asarray, (lse, q, keys, visible)))
    expected = np.ones((2, 2, 5))
    for b, t, n, s in np.ndindex(2, 3, 4, 5):
        if visible[b, 0, t, s]:
            score = q[b, t, n].astype(np.float64) @ keys[b, n // 2, s] / np.sqrt(8)
            expected[b, n // 2, s] += np.exp(score - lse[b, t, n]) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_scores_are_of_one_token_through_a_table():
    case = {name: jnp.asarray(x) for name, x in paged(1, make_case(1, tokens=2), 4).items()}
    expected = "scores=True, expected one token, got 2, and a table of pages"
    with pytest.raises(ValueError, match=expected):
        paged_attention(**case, page=4, kv_heads=2, scores=True)
