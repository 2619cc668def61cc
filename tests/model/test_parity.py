"""Logits equal Hugging Face's, for every architecture (tests/fixtures/README.md)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.state import with_room
from kvjax.config import CompressionConfig
from kvjax.generation import prefill
from kvjax.inputs.prompts import pad
from kvjax.model_interface import ProbeRequest
from kvjax.models.checkpoints.weights import load_decoder

CASES = sorted(path.name for path in (Path(__file__).parents[1] / "fixtures" / "hf").iterdir())
STEPS = 16
TOLERANCE = 1e-4  # the fixtures' own cached and uncached passes differ by up to 1e-5


@pytest.fixture(scope="module", params=CASES)
def case(request):
    directory = Path(__file__).parents[1] / "fixtures" / "hf" / request.param
    return load_decoder(directory, progress=False), np.load(directory / "expected.npz")


@jax.jit
def prompt_logits(model, tokens, lengths):
    """Logits of every position, through the layers' prefill."""
    x = model.embed(tokens)
    for layer in model.layers:
        x, _, _, _ = layer.prefill(x, lengths, ProbeRequest())
    return model.logits(x)


@jax.jit
def forced_steps(model, tokens, lengths, step_tokens):
    """Prefill, then feed given tokens one by one: logits after the prompt and after each."""
    full = CompressionConfig.named("full")
    logits, cache = prefill.prefill_compress(model, tokens, lengths, jax.random.key(0), full)

    def step(cache, token):
        x, cache = model.extend(token[:, None], jnp.ones_like(lengths), cache)
        return cache, model.logits(x[:, 0])

    _, later = jax.lax.scan(step, with_room(cache, STEPS), step_tokens.T)
    return jnp.concatenate([logits[None], later])


def unpadded(expected):
    """The one prompt in every row of the batch's shape, so that both share their programs."""
    rows, width = expected["batch_tokens"].shape
    return pad([expected["tokens"][0]] * rows, width)


def test_unpadded_prompt(case):
    model, expected = case
    tokens, lengths = unpadded(expected)
    logits = np.asarray(prompt_logits(model, tokens, lengths))[0, : lengths[0]]
    np.testing.assert_allclose(logits, expected["logits"], atol=TOLERANCE, rtol=0)


def test_unpadded_decode(case):
    model, expected = case
    tokens, lengths = unpadded(expected)
    step_tokens = np.stack([expected["step_tokens"]] * len(lengths))
    logits = np.asarray(forced_steps(model, tokens, lengths, step_tokens))[:, 0]
    np.testing.assert_allclose(logits[0], expected["logits"][-1], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(logits[1:], expected["step_logits"], atol=TOLERANCE, rtol=0)


def test_left_padded_batch(case):
    model, expected = case
    mask = expected["batch_mask"].astype(bool)
    rows = [tokens[keep] for tokens, keep in zip(expected["batch_tokens"], mask, strict=True)]
    tokens, lengths = pad(rows, max(mask.shape[1], expected["tokens"].shape[1]))
    logits = np.asarray(prompt_logits(model, tokens, lengths))
    real = np.concatenate([row[:length] for row, length in zip(logits, lengths, strict=True)])
    np.testing.assert_allclose(real, expected["batch_logits"], atol=TOLERANCE, rtol=0)
    stepped = np.asarray(forced_steps(model, tokens, lengths, expected["batch_step_tokens"].T))
    np.testing.assert_allclose(stepped[0], expected["batch_last_logits"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(stepped[1:], expected["batch_step_logits"], atol=TOLERANCE, rtol=0)
