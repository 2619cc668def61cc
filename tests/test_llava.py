"""LLaVA: logits equal Hugging Face's, and images go the whole way (tests/fixtures/README.md)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import stages
from kvjax.cache import with_room
from kvjax.load import load_model
from kvjax.placeholders import by_prompt, look
from kvjax.prompts import pad
from kvjax.seen import see

FIXTURES = Path(__file__).parent / "fixtures" / "vl"
TOLERANCE = 1e-4  # the fixtures' own cached and uncached passes differ by up to 1e-5
IMAGE = 98  # the fixtures' image token
FULL = kvjax.CompressionConfig.named("full")


@pytest.fixture(scope="module", params=["llava-old", "llava-new"])
def case(request):
    folder = FIXTURES / request.param
    return load_model(folder, progress=False), np.load(folder / "expected.npz")


@pytest.fixture(scope="module")
def model():
    return load_model(FIXTURES / "llava-old", progress=False)


@pytest.fixture(scope="module")
def pictures():
    expected = np.load(FIXTURES / "llava-old" / "expected.npz")
    return [expected[f"image_{index}"] for index in range(3)]


def rows_of(expected, name):
    """The batch's rows, each with one token an image, and its images."""
    left = iter([expected[f"image_{index}"] for index in range(3)])
    rows, images = [], []
    masked = zip(expected[f"{name}_tokens"], expected[f"{name}_mask"], strict=True)
    for (tokens, mask), count in zip(masked, expected[f"{name}_images"], strict=True):
        real = tokens[mask > 0]
        first = np.diff(real == IMAGE, prepend=0) == 1
        rows.append(real[(real != IMAGE) | first].tolist())
        images.append([next(left) for _ in range(count)])
    return rows, images


@jax.jit
def forced(model, tokens, lengths, images, steps):
    """Logits of every position of the prompt, and after it and each of the given tokens."""
    seen = see(model, images)
    x = seen.put(model.embed(tokens))
    for layer in model.layers:
        x, *_ = layer.prefill(x, lengths, stages.ProbeRequest(), seen.rotary)
    key = jax.random.key(0)
    last, cache = stages.prefill_compress(model, tokens, lengths, key, FULL, images)

    def step(cache, token):
        x, cache = model.extend(token[:, None], jnp.ones_like(lengths), cache)
        return cache, model.logits(x[:, 0])

    _, later = jax.lax.scan(step, with_room(cache, len(steps)), steps)
    return model.logits(x), last, later


@pytest.mark.parametrize("name", ["one", "two", "batch"])
def test_logits_are_hugging_faces(case, name):
    model, expected = case
    rows, images = rows_of(expected, name)
    looked = look(model, rows, by_prompt(images, rows, model))
    tokens, lengths = pad(looked.rows, 45)
    held = forced(model, tokens, lengths, looked.images(tokens), expected[f"{name}_step_tokens"])
    prompt, last, later = map(np.asarray, held)
    real = np.concatenate([row[:length] for row, length in zip(prompt, lengths, strict=True)])
    np.testing.assert_allclose(real, expected[f"{name}_logits"], atol=TOLERANCE, rtol=0)
    ends = np.cumsum(lengths) - 1
    np.testing.assert_allclose(last, expected[f"{name}_logits"][ends], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(later, expected[f"{name}_step_logits"], atol=TOLERANCE, rtol=0)
    assert np.abs(expected[f"{name}_logits"]).max() > 100 * TOLERANCE
