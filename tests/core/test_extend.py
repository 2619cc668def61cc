"""One's own model against the low-level calls, and caches on disk."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import kvjax
from kvjax import CompressionConfig
from kvjax.models.checkpoints.weights import load_decoder

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "hf"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("own_model", ROOT / "docs" / "own_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def own(example):
    """The example's model, and its prefill and step as programs."""
    from flax import nnx

    decoder = example.Decoder(nnx.Rngs(0))
    prefill = nnx.jit(example.Decoder.prefill, static_argnums=2)
    step = nnx.jit(example.Decoder.step)
    return partial(prefill, decoder), partial(step, decoder)


@pytest.fixture(scope="module")
def model():
    return load_decoder(FIXTURES / "llama2-gqa", progress=False)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 80, size).tolist() for size in (64, 41)]


# ---------------------------------------------------------------------------- one's own model
def test_the_example_owes_nothing_to_our_models():
    text = (ROOT / "docs" / "own_model.py").read_text()
    assert "kvjax.models" not in text
    assert len(text.splitlines()) < 150


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_example_decodes_as_without_a_cache(example, own, layout):
    """With everything kept but a slot, each step's logits are those of the whole sequence.

    Slow: each step is compared with the whole sequence, and every length is a program.
    """
    prefill, decode = own
    prompt = jax.random.randint(jax.random.key(1), (2, 30), 0, example.VOCAB)
    config = CompressionConfig.named("snapkv", budget=29, window=4, layout=layout)
    kept = CompressionConfig.named("full")
    later = jax.random.randint(jax.random.key(2), (2, 3), 0, example.VOCAB)
    _, whole = prefill(prompt, kept)
    _, less = prefill(prompt, config)
    # Packed, 58 slots of a layer's two heads are four pages of 16.
    slots = {"padded": 58, "packed": 64}[layout]
    assert less.nbytes == whole.nbytes * slots // 60
    for step in range(3):
        logits, whole = decode(later[:, step : step + 1], whole)
        near, less = decode(later[:, step : step + 1], less)
        exact, _ = prefill(jnp.concatenate([prompt, later[:, : step + 1]], axis=1), kept)
        np.testing.assert_allclose(logits, exact, atol=1e-4)
        assert 0 < float(jnp.abs(near - exact).max()) < float(jnp.abs(exact).max())


@pytest.mark.slow
def test_several_tokens_at_once_are_several_in_turn(example, own):
    """Slow: 10 s or more with no program kept: the example compiles a layer at a time."""
    prompt = jax.random.randint(jax.random.key(1), (1, 40), 0, example.VOCAB)
    _, cache = own[0](prompt, CompressionConfig.named("ada-snapkv", budget=16))
    shape = (1, 3, example.KV_HEADS, example.WIDTH)
    k, v = (jax.random.normal(jax.random.key(i), shape) for i in (3, 4))
    q = jax.random.normal(jax.random.key(5), (1, 3, example.HEADS, example.WIDTH))
    block = kvjax.append(kvjax.claim(cache, 3), 1, k, v)
    together = kvjax.decode_attention(q, block, 1)
    for step in range(3):
        at = slice(step, step + 1)
        cache = kvjax.append(kvjax.claim(cache, 1), 1, k[:, at], v[:, at])
        alone = kvjax.decode_attention(q[:, at], cache, 1)
        np.testing.assert_allclose(together[:, at], alone, atol=1e-6)
    assert kvjax.claimed_positions(block, 3).tolist() == [[40, 41, 42]]


def test_claims_need_room(model, prompts):
    cache = kvjax.compress_prompt(model, prompts, CompressionConfig.named("snapkv", 16))
    with pytest.raises(ValueError, match="tokens=1, expected 1 to the tail's 0 slots"):
        kvjax.claim(cache, 1)


# ---------------------------------------------------------------------------- on disk
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [("full", {}), ("ada-snapkv", {"quantize": "int8"}), ("prefixkv", {"layout": "padded"})],
)
def test_a_saved_cache_answers_alike(model, prompts, tmp_path, name, settings):
    """Slow: a prompt and a question are compiled for each kind of cache."""
    config = CompressionConfig.named(name, 16, **settings)
    cache = kvjax.compress_prompt(model, prompts, config)
    path = kvjax.save_cache(tmp_path / "document.cache", cache, model, config)
    again = kvjax.load_cache(path, model)
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    question = [[5, 6, 7], [8, 9]]
    outs = [
        kvjax.generate(model, question, cache=c, max_new_tokens=4, eos_ids=())
        for c in (cache, again)
    ]
    assert outs[0].tokens == outs[1].tokens
    assert list(tmp_path.iterdir()) == [path]
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["config"]["method"] == name


@pytest.mark.slow
def test_half_precision_and_a_tail_are_saved(prompts, tmp_path):
    """Slow: a whole `generate` is compiled for a dtype of its own."""
    model = load_decoder(FIXTURES / "llama2-gqa", dtype=jnp.bfloat16, progress=False)
    config = CompressionConfig.named("ada-snapkv", 16)
    out = kvjax.generate(model, prompts, config, max_new_tokens=5, eos_ids=(), return_cache=True)
    again = kvjax.load_cache(kvjax.save_cache(tmp_path / "c", out.cache, model), model)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(out.cache), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


def test_what_does_not_fit_is_refused(model, prompts, tmp_path):
    cache = kvjax.compress_prompt(model, prompts, CompressionConfig.named("ada-snapkv", 16))
    path = kvjax.save_cache(tmp_path / "document.cache", cache, model)
    data = path.read_bytes()

    other = load_decoder(FIXTURES / "qwen3", progress=False)
    with pytest.raises(ValueError, match="was made by another model"):
        kvjax.load_cache(path, other)
    path.write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"document\.cache is damaged"):
        kvjax.load_cache(path, model)
    changed = bytearray(data)
    changed[-5] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(ValueError, match=r"document\.cache is damaged: its checksum differs"):
        kvjax.load_cache(path, model)
    path.write_bytes(b"not a cache")
    with pytest.raises(ValueError, match=r"document\.cache is damaged"):
        kvjax.load_cache(path, model)
    path.write_bytes(data)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="is not one of kvjax, expected format kvjax-cache-2"):
        kvjax.load_cache(path, model)
    with pytest.raises(ValueError, match="expected a file that save_cache wrote"):
        kvjax.load_cache(tmp_path / "missing", model)
