"""Rotary positions apart from true ones survive every way that a cache goes (Qwen2.5-VL)."""

from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax.generation import prefill
from kvjax.models.load import load_model

FOLDER = Path(__file__).parents[1] / "fixtures" / "vl" / "qwen25vl"
START, END, IMAGE = 96, 97, 98
ROWS = [[5, 6, START, IMAGE, END, 7], [8, 9, 10]]
CALL = {"max_new_tokens": 6, "eos_ids": ()}


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER, progress=False)


@pytest.fixture(scope="module")
def images():
    return [[np.load(FOLDER / "expected.npz")["image_2"]], []]


@pytest.fixture(scope="module")
def cache(model, images):
    config = kvjax.CompressionConfig.named("ada-snapkv", budget=8)
    return kvjax.compress_prompt(model, ROWS, config, images=images)


def test_text_alone_is_not_shifted(cache):
    assert cache.rotary_shift[0] < 0
    assert cache.rotary_shift[1] == 0


def test_a_saved_cache(model, cache, tmp_path):
    again = kvjax.load_cache(kvjax.save_cache(tmp_path / "cache", cache, model), model)
    assert np.array_equal(again.rotary_shift, cache.rotary_shift)
    unshifted = cache.replace(rotary_shift=cache.rotary_shift * 0)
    first, second, third = (
        kvjax.generate(model, [[11, 12]] * 2, cache=held, **CALL)
        for held in (cache, again, unshifted)
    )
    assert first.log_probs == second.log_probs
    assert first.log_probs[0] != third.log_probs[0]
    assert first.log_probs[1] == third.log_probs[1]


@pytest.mark.slow
def test_compressing_while_decoding(model, images):
    """With room for everything nothing is evicted, and the answer is the whole cache's.

    Slow: two whole programs with a vision tower.
    """
    whole = kvjax.generate(model, ROWS, images=images, **CALL)
    rule = kvjax.Recompress(every=3, budget=64)
    out = kvjax.generate(model, ROWS, images=images, recompress=rule, **CALL)
    assert out.tokens == whole.tokens
    np.testing.assert_allclose(out.log_probs, whole.log_probs, atol=1e-4)


@pytest.mark.slow
def test_groups_of_rows(model, images, cache, monkeypatch):
    """Slow: a prompt with a vision tower is compiled in groups."""
    jax.clear_caches()
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 32)
    config = kvjax.CompressionConfig.named("ada-snapkv", budget=8)
    grouped = kvjax.compress_prompt(model, ROWS, config, images=images)
    assert np.array_equal(grouped.rotary_shift, cache.rotary_shift)
    assert np.array_equal(grouped.kept_mask(32), cache.kept_mask(32))
    np.testing.assert_allclose(grouped.slots.entries, cache.slots.entries, atol=1e-5)


@pytest.mark.slow
def test_phases_apart(model, images):
    """Slow: compiled whole and in phases, with a vision tower."""
    config = kvjax.CompressionConfig.named("expected-attention", budget=8)
    out = kvjax.generate(model, ROWS, config, images=images, **CALL)
    timed, _ = kvjax.timed_generate(model, ROWS, config, images=images, **CALL)
    assert timed.tokens == out.tokens
    np.testing.assert_allclose(timed.log_probs, out.log_probs, atol=1e-5)
