"""Teacher-forced scoring against logits computed another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CompressionConfig
from kvjax.cache.state import with_room
from kvjax.generation import prefill
from kvjax.generation.programs import prefill_compress_program
from kvjax.inputs.prompts import pad
from kvjax.model_interface import ProbeRequest


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(3)
    return [rng.integers(3, 80, size).tolist() for size in (60, 75, 33)]


PREFIXES = [40, 33, 32]
STEPS = 48


def whole_text_nll(model, text):
    """NLL and likeliest token at every position, from one uncompressed pass."""
    tokens, lengths = pad([text], 80)  # one shape for all texts
    x = model.embed(jnp.asarray(tokens))
    for layer in model.layers:
        x, _, _, _ = layer.prefill(x, jnp.asarray(lengths), ProbeRequest())
    logits = np.asarray(jax.nn.log_softmax(model.logits(x)))[0, : len(text)]
    return -logits[np.arange(len(text) - 1), text[1:]], logits.argmax(-1)


@jax.jit
def forced(model, cache, tokens):
    """Logits after each of every row's tokens, fed one by one."""

    def step(cache, token):
        x, cache = model.extend(token[:, None], jnp.ones_like(token), cache)
        return cache, model.logits(x[:, 0])

    return jax.lax.scan(step, with_room(cache, STEPS), tokens.T)[1].swapaxes(0, 1)


def test_full_cache_equals_one_forward_pass(model, texts, monkeypatch):
    monkeypatch.setattr(prefill, "BLOCK", 16)  # several blocks, the last one part full
    scored = kvjax.score(model, texts, PREFIXES)
    for text, prefix, mine in zip(texts, PREFIXES, scored, strict=True):
        nll, top1 = whole_text_nll(model, text)
        assert len(mine.nll) == len(mine.top1) == len(text) - prefix
        np.testing.assert_allclose(mine.nll, nll[prefix - 1 :], atol=2e-5)
        assert mine.top1 == top1[prefix - 1 : -1].tolist()
        assert mine.kept == prefix * 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapkv", "prefixkv"])
def test_compressed_equals_decoding_step_by_step(model, texts, monkeypatch, name):
    """Slow: scored in small blocks and step by step, with programs of their own."""
    monkeypatch.setattr(prefill, "BLOCK", 16)
    jax.clear_caches()  # nothing traced with blocks of another size
    config = CompressionConfig.named(name, budget=12)
    scored = kvjax.score(model, texts, PREFIXES, config, positions=True)
    pairs = list(zip(texts, PREFIXES, strict=True))
    tokens, lengths = pad([text[:prefix] for text, prefix in pairs])
    logits, cache = prefill_compress_program(
        model, tokens, lengths, jax.random.key(0), config=config
    )
    rests = [text[prefix:] for text, prefix in pairs]
    fed = np.array([rest[:-1] + [0] * (STEPS - len(rest) + 1) for rest in rests], np.int32)
    later = np.concatenate([logits[:, None], forced(model, cache, fed)], axis=1)
    for rest, row, mine in zip(rests, later, scored, strict=True):
        log_probs = np.asarray(jax.nn.log_softmax(row[: len(rest)]))
        np.testing.assert_allclose(mine.nll, -log_probs[np.arange(len(rest)), rest], atol=2e-5)
        assert mine.kept == 12 * 2 * 2 == sum(len(h) for layer in mine.positions for h in layer)


@pytest.mark.slow
def test_a_text_alone_and_in_a_batch(model, texts):
    """Slow: a text alone is a program of another batch."""
    config = CompressionConfig.named("ada-snapkv", budget=12)
    together = kvjax.score(model, texts, PREFIXES, config)[2]
    alone = kvjax.score(model, texts[2], PREFIXES[2], config)[0]
    np.testing.assert_allclose(together.nll, alone.nll, atol=2e-5)
    assert together.top1 == alone.top1


@pytest.mark.parametrize("prefix", [0, 60, [40, 33]])
def test_wrong_prefixes_are_named(model, texts, prefix):
    with pytest.raises(ValueError, match="prefix_length"):
        kvjax.score(model, texts, prefix)
