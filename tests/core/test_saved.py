"""Caches that an earlier version wrote, and forks of one document."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import probe_of

import kvjax
from kvjax import CompressionConfig, Recompress
from kvjax.models.checkpoints.weights import load_decoder

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXPECTED = json.loads((FIXTURES / "saved" / "expected.json").read_text())


@pytest.fixture(scope="module")
def model():
    return load_decoder(FIXTURES / "hf" / "llama2-gqa", progress=False)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_cache_of_version_1_answers_as_it_did(model, name, tmp_path):
    """Prompts of 40 and 23 tokens; what version 1 answered stands beside its files."""
    expected = EXPECTED[name]
    cache = kvjax.load_cache(FIXTURES / "saved" / f"{name}.cache", model)
    counts = np.asarray(cache.counts)
    np.testing.assert_array_equal(counts, expected["kept"])
    np.testing.assert_array_equal((np.asarray(cache.slots.owners) >= 0).sum(1), counts.sum((1, 2)))
    again = kvjax.load_cache(kvjax.save_cache(tmp_path / "new", cache, model), model)
    for held in (cache, again):
        found = kvjax.generate(model, [[5, 6, 7]] * 2, cache=held, max_new_tokens=8, eos_ids=())
        assert found.tokens == expected["tokens"]
        np.testing.assert_allclose(found.log_probs, expected["log_probs"], atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        CompressionConfig.named("prefixkv", 0.5, layout="padded"),
        CompressionConfig.named("prefixkv", 0.5, layout="packed"),
        CompressionConfig.named("snapkv", 8, quantize="int8", keep_ratio=True),
        CompressionConfig.named("ada-snapkv", 8, layout="packed"),
    ],
    ids=["padded-ratio", "ratio", "int8-ratio", "packed"],
)
def test_all_of_a_cache_is_saved(model, config, tmp_path):
    """Arrays and all that is static, the ratio too: what is read is what was written."""
    keys = [jax.random.normal(jax.random.key(layer), (2, 24, 2, 8)) for layer in range(2)]
    probes = [jax.tree.map(jnp.asarray, probe_of(layer, 2, 24, 6, 2, 8, 24)) for layer in range(2)]
    lengths = jnp.array([24, 17])
    cache = kvjax.compress(keys, keys, probes, config, lengths=lengths, tail_slots=4)
    assert cache.keep_ratio == config.keep_ratio
    again = kvjax.load_cache(kvjax.save_cache(tmp_path / "cache", cache, model, config), model)
    again = again.replace(origin=cache.origin)
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    jax.tree.map(np.testing.assert_array_equal, again, cache)


@pytest.mark.slow
def test_a_fork_that_is_compressed_again_leaves_the_others_alone(model):
    """16 questions of one document hold its pages once; one goes on with room of its own.

    What the fork frees is poisoned, and the others answer as before.

    Slow: 16 questions and a second compression are compiled.
    """
    prompt = np.random.default_rng(3).integers(3, 80, 60).tolist()
    document = kvjax.compress_prompt(model, prompt, CompressionConfig.named("ada-snapkv", 16))
    call = {"max_new_tokens": 6, "eos_ids": ()}
    questions = [[5 + index, 7] for index in range(16)]
    asked = kvjax.generate(model, questions, cache=document, return_cache=True, **call)
    assert asked.cache_bytes == document.nbytes
    assert asked.cache.shared == 16
    assert asked.cache.slots.entries.shape == document.slots.entries.shape
    rule = Recompress(every=4, budget=17, window=2)
    fork = kvjax.generate(
        model, questions[:1], cache=document, recompress=rule, return_cache=True, **call
    )
    free = (fork.cache.slots.owners < 0)[..., None]
    assert bool(free.any())
    poisoned = jnp.where(free, jnp.nan, fork.cache.slots.entries)
    dirty = fork.cache.replace(slots=fork.cache.slots.replace(entries=poisoned))
    again = [kvjax.generate(model, [[9]], cache=c, **call) for c in (fork.cache, dirty)]
    assert again[0].tokens == again[1].tokens
    assert again[0].log_probs == again[1].log_probs
    after = kvjax.generate(model, questions, cache=document, **call)
    assert (after.tokens, after.log_probs) == (asked.tokens, asked.log_probs)
