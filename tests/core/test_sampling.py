"""Sampling rules against Hugging Face's, written out in numpy, and by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.generation import sampling, suggestion
from kvjax.generation.sampling import Sampling

QUICK = {"xla_backend_optimization_level": 0}  # compile time is all that these tests cost
sample = jax.jit(sampling.sample, static_argnums=3, compiler_options=QUICK)
filtered = jax.jit(sampling.filtered, static_argnums=1, compiler_options=QUICK)


def keys_of(seed: int, rows: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


def rules(**settings):
    chosen = Sampling(**settings)
    return chosen.switches, chosen.values


def random_logits(rows: int, vocabulary: int, ties: bool = False) -> np.ndarray:
    logits = 3 * np.random.default_rng(0).normal(size=(rows, vocabulary))
    return (np.round(logits) if ties else logits).astype(np.float32)


def kept(logits, **settings) -> list[list[int]]:
    """Tokens that the rules leave, by row."""
    out = np.asarray(filtered(jnp.array(logits, jnp.float32), *rules(temperature=1.0, **settings)))
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in out]


# --------------------------------------------------------------------------- the oracle
def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def hugging_face(row, seen, temperature, top_k, top_p, min_p, penalty):
    """One row through Hugging Face's processors in their order (transformers 5), in float64."""
    row = row.astype(np.float64)
    row = np.where(seen, np.where(row < 0, row * penalty, row / penalty), row)
    row = row / temperature
    if top_k:  # all that tie with the k-th stay
        row = np.where(row < np.sort(row)[-min(top_k, len(row))], -np.inf, row)
    if top_p < 1:  # drop from the least likely on, while what was passed adds up to 1 - p
        order = np.argsort(row, kind="stable")
        drop = np.cumsum(softmax(row)[order]) <= 1 - top_p
        drop[-1] = False
        row[order[drop]] = -np.inf
    if min_p:
        p = softmax(row)
        row = np.where(p < min_p * p.max(), -np.inf, row)
    return row


SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 7, "top_p": 0.8},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_rules_match_hugging_face(chosen, temperature):
    logits = random_logits(12, 61)
    out = filtered(logits / np.float32(temperature), *rules(temperature=temperature, **chosen))
    for row, raw in zip(np.asarray(out), logits, strict=True):
        numbers = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | chosen
        expected = hugging_face(raw, np.zeros(61, bool), temperature, penalty=1.0, **numbers)
        np.testing.assert_allclose(row, expected, rtol=1e-6)


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_ties_match_hugging_face(chosen):
    # Which of several equal tokens top-p drops is torch.sort's accident there: as many stay here.
    logits = random_logits(12, 61, ties=True)
    out = np.asarray(filtered(logits, *rules(temperature=1.0, **chosen)))
    for row, raw in zip(out, logits, strict=True):
        numbers = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | chosen
        expected = hugging_face(raw, np.zeros(61, bool), 1.0, penalty=1.0, **numbers)
        np.testing.assert_array_equal(np.sort(row), np.sort(expected))
        assert len(np.unique(raw)) < 30
        last = row[np.isfinite(row)].min()  # of the least likely that stay, the lower indices do
        equal = np.isfinite(row[raw == last])
        assert equal.tolist() == sorted(equal, reverse=True)


# --------------------------------------------------------------------------- by hand
def test_rules_by_hand():
    logits = np.log([[0.2, 0.4, 0.1, 0.3]])
    assert kept(logits, top_k=2) == [[1, 3]]
    assert kept(logits, top_k=4) == kept(logits, top_k=9) == [[0, 1, 2, 3]]
    assert kept(logits, top_p=0.39) == [[1]]  # 0.4 reaches it
    assert kept(logits, top_p=0.41) == [[1, 3]]  # 0.4 does not, 0.7 does
    assert kept(logits, top_p=0.71) == [[0, 1, 3]]
    for tiny in (1e-6, 1e-50):  # the likeliest always stays; 1e-50 is 0 in fp32
        assert kept(logits, top_p=tiny) == [[1]]
    assert kept(logits, min_p=0.6) == [[1, 3]]  # at least 0.24
    assert kept(logits, min_p=0.2) == [[0, 1, 2, 3]]  # at least 0.08
    assert kept(logits, min_p=1.0) == [[1]]


def test_ties_by_hand():
    quarters = np.zeros((1, 4))
    assert kept(quarters, top_k=2) == [[0, 1, 2, 3]]  # all tie with the second
    assert kept(quarters, min_p=1.0) == [[0, 1, 2, 3]]
    assert kept(quarters, top_p=0.5) == [[0, 1]]  # exactly reached: the lower indices
    assert kept(quarters, top_p=0.6) == [[0, 1, 2]]


def test_top_k_comes_before_top_p():
    # After top-k the two left have 4/7 and 3/7: the first alone reaches 0.5. The other way
    # round, 0.4 does not reach 0.5, and both would stay.
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    assert kept(logits, top_p=0.5) == [[0, 1]]
    assert kept(logits, top_k=2, top_p=0.5) == [[0]]


def draws(logits, count=4000, seen=None, **settings) -> np.ndarray:
    """How often each token is drawn from one row of logits."""
    logits = np.tile(np.asarray(logits, np.float32), (count, 1))
    seen = None if seen is None else np.tile(seen, (count, 1))
    tokens, _ = sample(logits, keys_of(1, count), seen, *rules(**settings))
    return np.bincount(tokens, minlength=logits.shape[1]) / count


def test_temperature_comes_before_the_other_rules():
    # Squared and renormalised, 0.6 0.3 0.1 are 36 9 1 of 46: 0.3 falls below 0.4 of the best,
    # and 0.6 alone reaches 0.75.
    logits = np.log([0.6, 0.3, 0.1])
    assert draws(logits, temperature=1.0, min_p=0.4).astype(bool).tolist() == [True, True, False]
    assert draws(logits, temperature=0.5, min_p=0.4).tolist() == [1, 0, 0]
    assert draws(logits, temperature=1.0, top_p=0.75).astype(bool).tolist() == [True, True, False]
    assert draws(logits, temperature=0.5, top_p=0.75).tolist() == [1, 0, 0]


def test_penalty_comes_before_the_other_rules():
    # 3 and -1 were seen: halved and doubled to 1.5 and -2, so that 2 is now the best.
    logits, seen = [3.0, 2.0, -1.0, -1.5], [True, False, True, False]
    numbers = {"temperature": 1.0, "repetition_penalty": 2.0, "seen": np.array(seen)}
    assert draws(logits, top_k=1, **numbers).tolist() == [0, 1, 0, 0]
    assert draws(logits, top_k=3, **numbers)[2] == 0  # -2 is behind -1.5
    greedy = numbers | {"temperature": 0.0}
    assert draws(logits, **greedy).tolist() == [0, 1, 0, 0]
    assert draws(logits, **greedy | {"repetition_penalty": 1.2}).tolist() == [1, 0, 0, 0]
    assert draws(logits, **greedy | {"seen": None}).tolist() == [1, 0, 0, 0]


# --------------------------------------------------------------------------- drawing
@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "repetition_penalty": 1.3},
        {"temperature": 1.8, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
    ],
    ids=["plain", "penalty", "all"],
)
def test_draws_follow_the_distribution(chosen):
    logits, count = random_logits(1, 12)[0] / 2, 20000
    seen = np.arange(12) % 3 == 0
    numbers = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0} | chosen
    numbers["penalty"] = numbers.pop("repetition_penalty", 1.0)
    expected = softmax(hugging_face(logits, seen, **numbers))
    observed = draws(logits, count, seen, **chosen)
    assert (observed[expected == 0] == 0).all()
    error = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(observed - expected) <= 5 * error).all()


def test_ruled_out_by_the_model():
    logits = np.array([-np.inf, 0, 0, -np.inf])
    for chosen in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.01}):
        observed = draws(logits, temperature=1.0, **chosen)
        assert observed[[0, 3]].tolist() == [0, 0]
        assert observed[1] > 0.3


def test_greedy():
    logits = random_logits(9, 40)
    logits[0, [7, 3, 30]] = 99.0  # the lowest of equals
    tokens, _ = sample(logits, keys_of(0, 9), None, *rules())
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert int(tokens[0]) == 3
    other, _ = sample(logits, keys_of(5, 9), None, *rules())
    np.testing.assert_array_equal(other, tokens)
    # Greedy is the limit of a low temperature.
    cold, _ = sample(logits[1:], keys_of(0, 8), None, *rules(temperature=1e-4))
    np.testing.assert_array_equal(cold, tokens[1:])


def test_seeds():
    numbers = rules(temperature=1.5, top_p=0.95)
    logits = random_logits(40, 50)
    tokens, log_probs = map(np.asarray, sample(logits, keys_of(1, 40), None, *numbers))
    again, _ = sample(logits, keys_of(1, 40), None, *numbers)
    np.testing.assert_array_equal(again, tokens)
    other, _ = sample(logits, keys_of(2, 40), None, *numbers)
    assert (np.asarray(other) != tokens).mean() > 0.3
    # A row's key alone decides: not its neighbours, nor where in the batch it stands.
    turned, turned_probs = sample(logits[::-1], keys_of(1, 40)[::-1], None, *numbers)
    np.testing.assert_array_equal(turned, tokens[::-1])
    np.testing.assert_allclose(turned_probs, log_probs[::-1], rtol=1e-6)


@pytest.mark.parametrize(
    "chosen", [{}, {"temperature": 0.3, "top_k": 4, "repetition_penalty": 5.0, "min_p": 0.5}]
)
def test_log_probs_are_the_models_own(chosen):
    logits, seen = random_logits(30, 50), np.ones((30, 50), bool)
    tokens, log_probs = sample(logits, keys_of(1, 30), seen, *rules(**chosen))
    expected = [
        math.log(softmax(row.astype(np.float64))[t]) for row, t in zip(logits, tokens, strict=True)
    ]
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-6)


def test_numbers_do_not_recompile_and_switches_do():
    run = jax.jit(sampling.sample, static_argnums=3)
    logits, keys = random_logits(2, 8), keys_of(0, 2)
    for temperature, top_p in ((0.5, 0.5), (1.0, 0.9), (2.0, 0.1)):
        run(logits, keys, None, *rules(temperature=temperature, top_p=top_p))
    assert run._cache_size() == 1
    run(logits, keys, None, *rules(temperature=1.0, top_k=3))
    assert run._cache_size() == 2


# --------------------------------------------------------------------------- settings
def test_switches():
    assert not any(Sampling(temperature=1.0).switches)
    assert Sampling().switches == (True, False, False, False, False)
    numbers = {"top_k": 1, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.9}
    on = Sampling(temperature=0.5, **numbers)
    assert on.switches == (False, True, True, True, True)
    np.testing.assert_allclose(on.values, [0.5, 1, 0.9, 0.1, 0.9], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "a number of at least 0"),
        ("temperature", math.nan, "a number of at least 0"),
        ("temperature", math.inf, "a number of at least 0"),
        ("top_k", -1, r"an integer from 0 \(all tokens\) to 2147483647"),
        ("top_k", 2**31, r"an integer from 0 \(all tokens\) to 2147483647"),
        ("top_p", 0.0, "a number above 0 and at most 1"),
        ("top_p", 1.1, "a number above 0 and at most 1"),
        ("min_p", -0.1, "a number from 0 to 1"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("repetition_penalty", 0.0, "a number above 0"),
        ("repetition_penalty", math.inf, "a number above 0"),
    ],
)
def test_values_outside_their_range(name, value, expected):
    with pytest.raises(ValueError, match=rf"^{name}={value}, expected {expected}$"):
        Sampling(**{name: value})


@pytest.mark.parametrize("seed", [-1, 2**32, True, [0, 2**40]])
def test_seeds_that_32_bits_do_not_hold(seed):
    """JAX would take the low half of a larger one: 2**32 would draw as 0 does."""
    with pytest.raises(ValueError, match=r"^seed=\S+, expected an integer from 0 to 4294967295$"):
        sampling.row_keys(seed, 2)


# ---------------------------------------------------------------------------- what a model suggests
@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, Sampling()),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
            Sampling(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1),
        ),
        # As in transformers: without do_sample the rest has no effect, but for the penalty.
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, Sampling()),
        ({"repetition_penalty": 1.05, "top_k": 20}, Sampling(repetition_penalty=1.05)),
    ],
)
def test_a_models_own_rules(stated, expected):
    assert suggestion.chosen("model", tuple(stated.items())) == expected


def test_rules_of_a_call_come_before_a_models():
    stated = (("do_sample", True), ("typical_p", 0.9))
    assert suggestion.chosen(None, stated) == Sampling()
    assert suggestion.chosen(Sampling(top_k=3), stated) == Sampling(top_k=3)


@pytest.mark.parametrize(
    ("asked", "stated", "message"),
    [
        ("greedy", {}, "sampling='greedy', expected a kvjax.Sampling, 'model' or None"),
        ("model", {"typical_p": 0.9}, "sampling='model': the checkpoint sets typical_p=0.9, which"),
        ("model", {"do_sample": True, "top_p": "0.9"}, "sampling='model': top_p='0.9', expected a"),
        ("model", {"do_sample": True, "top_p": 1.5}, "top_p=1.5, expected a number above 0 and"),
    ],
)
def test_rules_that_are_refused(asked, stated, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        suggestion.chosen(asked, tuple(stated.items()))
    assert str(caught.value).startswith(message)


def test_suggestions_in_words():
    stated = (("do_sample", True), ("temperature", 0.6), ("top_p", 0.9), ("num_beams", 2))
    assert suggestion.suggestion(stated) == "temperature=0.6, top_p=0.9"
    assert suggestion.suggestion(stated[1:]) is None
    assert suggestion.suggestion(stated[:1]) is None
