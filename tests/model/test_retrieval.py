"""Evaluation by questions: the same answers as `generate`, entries counted in the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CompressionConfig, figures
from kvjax.studies import retrieval
from kvjax.studies.dispersion import _count, entries_needed
from kvjax.studies.retrieval import ask, interval
from kvjax.tiny.questions import Item

NEW = 6


@pytest.fixture(scope="module")
def items():
    """Documents of different lengths; the answers are filled in by each test."""
    rng = np.random.default_rng(0)
    return [
        Item(rng.integers(3, 80, size).tolist(), rng.integers(3, 80, 3 + size % 2).tolist(), [1])
        for size in (60, 41, 53)
    ]


def answers(model, items, config, protocol):
    """The public calls."""
    call = {"max_new_tokens": NEW, "eos_ids": ()}
    if protocol == "seen":
        prompts = [[*item.document, *item.question] for item in items]
        out = kvjax.generate(model, prompts, config, **call)
    else:
        cache = kvjax.compress_prompt(model, [item.document for item in items], config)
        questions = [item.question for item in items]
        out = kvjax.generate(model, questions, cache=cache, **call)
    return list(zip(out.tokens, out.kept, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "protocol"), [("ada-snapkv", "seen"), ("full", "unseen"), ("prefixkv", "unseen")]
)
def test_answers_are_those_of_generate(model, items, name, protocol, monkeypatch):
    """Slow: every item is answered by `generate` too, each length a program."""
    monkeypatch.setattr(retrieval, "ROWS", 2)  # three items: two batches, the last filled up
    config = CompressionConfig.named(name, None if name == "full" else 0.4)
    expected = answers(model, items, config, protocol)
    asked = [
        Item(item.document, item.question, tokens)
        for item, (tokens, _) in zip(items, expected, strict=True)
    ]
    asked[1] = Item(asked[1].document, asked[1].question, [*expected[1][0][:-1], 0])
    (outcome,) = ask(model, asked, [config], protocol)
    assert outcome.right.tolist() == [True, False, True]
    np.testing.assert_array_equal(outcome.kept, np.stack([kept for _, kept in expected]))
    held = (outcome.positions >= 0).sum(-1)
    np.testing.assert_array_equal(held, outcome.kept[0])


@pytest.mark.slow
def test_random_draws_per_row_and_by_seed(model, items):
    """Slow: 10 s or more with no program kept: the stages of a study are compiled."""
    config = CompressionConfig.named("random", 0.4)
    (one,), (same,), (other,) = (
        ask(model, items, [config], "unseen", seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.positions, same.positions)
    assert (one.positions != other.positions).any()


def test_unknown_protocol_is_refused(model, items):
    with pytest.raises(ValueError, match="protocol='before', expected 'seen' or 'unseen'"):
        ask(model, items, [], "before")


def test_interval_holds_the_share_and_narrows():
    few, many = np.arange(20) < 15, np.arange(2000) < 1500
    low, high = interval(few)
    assert 0.5 < low < 0.75 < high < 0.95
    narrow_low, narrow_high = interval(many)
    assert low < narrow_low < 0.75 < narrow_high < high
    # Normal approximation: 0.75 +- 1.96 * sqrt(0.75 * 0.25 / 2000) = 0.731 .. 0.769.
    assert narrow_low == pytest.approx(0.731, abs=0.003)
    assert narrow_high == pytest.approx(0.769, abs=0.003)
    assert interval(np.ones(10, bool)) == (1.0, 1.0)


# ---------------------------------------------------------------------------- dispersion
def test_entries_needed_by_hand():
    """Query head 0 attends one key, head 1 all alike, of keys 0..p for p = 8 and 9."""
    keys = jnp.zeros((1, 10, 1, 2)).at[0, 0, 0].set(jnp.array([30.0, 0.0]))
    queries = jnp.zeros((1, 2, 2, 2)).at[:, :, 0, 0].set(10.0)
    counts = _count(queries, keys, jnp.array([10]), 0.75)
    # 0.75 of 9 and of 10 equal parts: 7 and 8 entries.
    np.testing.assert_allclose(counts, [1.0, 7.5])


def test_entries_needed_matches_float64(model):
    prompts = [np.random.default_rng(i).integers(3, 80, size).tolist() for i, size in
               enumerate((40, 30))]  # fmt: skip
    counts = entries_needed(model, prompts, share=0.9, queries=5)
    config = model.config
    assert counts.shape == (config.num_layers, config.num_heads)
    assert (counts >= 1).all()
    assert (counts <= 40).all()
    # Layer 0 again in numpy, from its queries and keys.
    tokens = np.array(prompts[1])[None]
    x = model.layers[0].attention_norm(model.embed(jnp.asarray(tokens)))
    positions = jnp.arange(30)[None]
    attention = model.layers[0].attention
    q, k, _ = attention._project(x)
    q, k = (np.asarray(a, np.float64)[0] for a in attention._rotate(q, k, positions))
    for head in range(config.num_heads):
        needed = []
        for place in range(25, 30):
            scores = k[: place + 1, head // config.group_size] @ q[place, head]
            p = np.exp(scores / np.sqrt(config.head_dim))
            p = np.sort(p / p.sum())[::-1]
            needed.append(1 + (np.cumsum(p) < 0.9).sum())
        alone = entries_needed(model, prompts[1:], share=0.9, queries=5)
        assert alone[0, head] == pytest.approx(np.mean(needed))


def test_entries_needed_refuses(model):
    with pytest.raises(ValueError, match=r"share=1\.0, expected a number between 0 and 1"):
        entries_needed(model, [[3] * 40], share=1.0)
    with pytest.raises(ValueError, match="a prompt has 10 tokens, expected at least queries=32"):
        entries_needed(model, [[3] * 40, [3] * 10])


# ---------------------------------------------------------------------------- pictures
def read_png(path):
    from matplotlib import image

    return image.imread(path)


def test_heat_map_shows_what_was_kept(tmp_path):
    pytest.importorskip("matplotlib")
    few = np.full((2, 3, 50), -1)
    few[..., :5] = np.arange(5)
    many = np.broadcast_to(np.arange(50), (2, 3, 50))
    pictures = [
        read_png(figures.heat_map(tmp_path / f"{i}.png", {"m": kept}, 100, needles=[(10, 15)]))
        for i, kept in enumerate((few, many))
    ]
    assert pictures[0].shape == pictures[1].shape
    blue = [((p[..., 2] - p[..., 0]) > 0.3).mean() for p in pictures]
    assert blue[1] > 5 * blue[0] > 0


def test_other_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    counts = np.array([[1.0, 30.0], [5.0, 200.0]])
    shares = {"seen": {"full": np.array([1.0, 1.0]), "snapkv": np.array([0.9, 0.4])}}
    rows = [
        {"step": "10", "length": "64", "alphabet": "32", "loss": "3.5", "repeat": ""},
        {"step": "20", "length": "128", "alphabet": "32", "loss": "1.5", "repeat": "0.4"},
    ]
    made = [
        figures.dispersion(tmp_path / "a" / "dispersion.png", counts, 512),
        figures.accuracy(tmp_path / "methods.png", shares, ["50%", "10%"]),
        figures.training(tmp_path / "training.png", rows),
    ]
    for path in made:
        assert read_png(path).std() > 0.02
    assert jax.default_backend() == "cpu"
