"""LLaVA: logits equal Hugging Face's, and images go the whole way (tests/fixtures/README.md)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vision_model import forced

import kvjax
from kvjax.compression.kvzip import reconstruction_scores
from kvjax.generation import prefill
from kvjax.inputs.multimodal import by_prompt, prepare_inputs
from kvjax.inputs.prompts import pad
from kvjax.model_interface import encode_images
from kvjax.models.load import load_model
from kvjax.sharding import make_mesh

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vl"
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


@pytest.mark.parametrize("name", ["one", "two", "batch"])
def test_logits_are_hugging_faces(case, name):
    model, expected = case
    rows, images = rows_of(expected, name)
    inputs = prepare_inputs(model, rows, by_prompt(images, rows, model))
    tokens, lengths = pad(inputs.rows, 45)
    held = forced(model, tokens, lengths, inputs.images(tokens), expected[f"{name}_step_tokens"])
    prompt, last, later = map(np.asarray, held)
    real = np.concatenate([row[:length] for row, length in zip(prompt, lengths, strict=True)])
    np.testing.assert_allclose(real, expected[f"{name}_logits"], atol=TOLERANCE, rtol=0)
    ends = np.cumsum(lengths) - 1
    np.testing.assert_allclose(last, expected[f"{name}_logits"][ends], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(later, expected[f"{name}_step_logits"], atol=TOLERANCE, rtol=0)
    assert np.abs(expected[f"{name}_logits"]).max() > 100 * TOLERANCE


@pytest.mark.slow
def test_a_row_alone_is_what_it_is_in_a_batch(case):
    """Slow: each number of images is a program, with a vision tower."""
    model, expected = case
    rows, images = rows_of(expected, "batch")
    config = kvjax.CompressionConfig.named("ada-snapkv", budget=12)
    call = {"max_new_tokens": 4, "eos_ids": ()}
    batch = kvjax.generate(model, rows, config, images=images, **call)
    for index, (row, given) in enumerate(zip(rows, images, strict=True)):
        one = kvjax.generate(model, row, config, images=given, **call)
        assert one.tokens[0] == batch.tokens[index]
        assert np.array_equal(one.kept[0], batch.kept[index])


@pytest.mark.slow
def test_groups_of_rows_share_the_images(model, pictures, monkeypatch):
    """Slow: towers of two batch sizes are compiled."""
    rows, images = [[5, IMAGE, 7], [9, 11], [IMAGE, 4, IMAGE]], [pictures[:1], [], pictures[1:]]
    config = kvjax.CompressionConfig.named("snapkv", budget=8)
    whole = kvjax.compress_prompt(model, rows, config, images=images)
    jax.clear_caches()
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 48)
    grouped = kvjax.compress_prompt(model, rows, config, images=images)
    assert np.array_equal(whole.kept_mask(48), grouped.kept_mask(48))
    for one, other in zip(whole.layers, grouped.layers, strict=True):
        np.testing.assert_allclose(one.values, other.values, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["prefixkv", "ada-prefixkv", "snapkv", "pyramidkv", "h2o", "ada-kvzip", "knorm"]
)
def test_a_budget_of_the_whole_prompt_is_the_full_cache(model, pictures, method):
    """Slow: seven methods, each a program with a vision tower."""
    row, call = [5, IMAGE, 7, 8], {"images": pictures[:1], "max_new_tokens": 3, "eos_ids": ()}
    full = kvjax.generate(model, row, **call)
    # 19 of 19 tokens: below the bucket of 32, so that the method runs.
    config = kvjax.CompressionConfig.named(method, budget=19)
    out = kvjax.generate(model, row, config, **call)
    assert out.tokens == full.tokens
    np.testing.assert_allclose(out.log_probs, full.log_probs, atol=1e-5)
    assert (out.kept == 19).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ada-kvzip", "ada-expected-attention", "prefixkv"])
def test_ways_to_run_agree(model, pictures, method):
    """Slow: each method is compiled whole, as a stream and timed."""
    rows, images = [[5, IMAGE, 7], [IMAGE, 4, IMAGE]], [pictures[:1], pictures[1:]]
    config = kvjax.CompressionConfig.named(method, budget=8)
    call = {"images": images, "max_new_tokens": 6, "eos_ids": ()}
    out = kvjax.generate(model, rows, config, **call)
    assert out.kept.sum((1, 2)).tolist() == [8 * 2 * 4] * 2
    streamed = [[], []]
    for step in kvjax.stream(model, rows, config, **call):
        for mine, new in zip(streamed, step.tokens, strict=True):
            mine += new
    timed, _ = kvjax.timed_generate(model, rows, config, **call)
    assert out.tokens == streamed == timed.tokens


def test_the_repetition_repeats_the_image(model, pictures):
    """KVzip's scores of an image's entries depend on its features being said again."""
    row = [5, IMAGE, 7]
    inputs = prepare_inputs(model, [row], [[pictures[0]]])
    tokens, lengths = map(jnp.asarray, pad(inputs.rows))
    features = encode_images(model, inputs.images(np.asarray(tokens)))
    config = kvjax.CompressionConfig.named("kvzip", budget=8)
    request = kvjax.probe_request(config, tokens.shape[1])
    read = prefill.prefill(model, tokens, lengths, request, features)
    keys, values, probes = read.keys, read.values, read.probes
    silent = features.replace(places=jnp.full_like(features.places, -1))
    arguments = model, tokens, lengths, keys, values, request.repeat
    mute = reconstruction_scores(*arguments, silent)
    said = probes[0].reconstruction[0, :, 4:18]
    assert float(jnp.abs(said - mute[0][0, :, 4:18]).max()) > 0.01


def test_score_sees_the_images(model, pictures):
    row = [5, IMAGE, 7, 8, 9, 10, 11]
    [full] = kvjax.score(model, row, 4, images=pictures[:1])
    [other] = kvjax.score(model, row, 4, images=pictures[1:2])
    forced_row = kvjax.generate(model, [5, IMAGE, 7, 8], images=pictures[:1], max_new_tokens=1)
    assert full.top1[0] == forced_row.tokens[0][0]
    assert full.kept == 19 * 2 * 4
    assert np.abs(np.array(full.nll) - np.array(other.nll)).max() > 1e-3


def test_an_image_changes_the_answer(model, pictures):
    row, call = [5, IMAGE, 7], {"max_new_tokens": 2, "eos_ids": ()}
    first, second = (kvjax.generate(model, row, images=[p], **call) for p in pictures[:2])
    assert first.log_probs != second.log_probs


def test_as_many_tokens_as_features_are_taken_as_they_are(model, pictures):
    call = {"images": pictures[:1], "max_new_tokens": 2, "eos_ids": ()}
    one = kvjax.generate(model, [5, IMAGE, 7], **call)
    many = kvjax.generate(model, [5, *[IMAGE] * 16, 7], **call)
    assert one.log_probs == many.log_probs


@pytest.mark.slow
def test_a_mesh_sees_what_one_device_sees(model, pictures):
    """Slow: a tower and an answer are compiled for a mesh."""
    rows, images = [[5, IMAGE, 7], [IMAGE, 4, IMAGE]], [pictures[:1], pictures[1:]]
    config = kvjax.CompressionConfig.named("ada-snapkv", budget=8)
    call = {"images": images, "max_new_tokens": 4, "eos_ids": ()}
    alone = kvjax.generate(model, rows, config, **call)
    split = kvjax.generate(model, rows, config, mesh=make_mesh(2, 2), **call)
    assert split.tokens == alone.tokens
    np.testing.assert_allclose(split.log_probs, alone.log_probs, atol=1e-4)
    loaded = load_model(FIXTURES / "llava-old", progress=False, mesh=make_mesh(1, 2))
    assert np.array_equal(loaded.tower.patch_EC[...], model.tower.patch_EC[...])
    assert not loaded.tower.layers[0].up_CF[...].sharding.is_fully_replicated
