"""Qwen2.5-VL's tower and positions equal Hugging Face's (tests/fixtures/README.md)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from kvjax.models.vision.qwen_config import QwenVisionConfig
from kvjax.models.vision.qwen_layout import lay_out, merged_tokens, mrope_positions
from kvjax.models.vision.qwen_tower import QwenTower, segment_attention
from kvjax.models.vision.qwen_weights import tower_specs

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vl"
TOLERANCE = 1e-4
NAMES = {"qwen25vl": "visual.", "qwen25vl-new": "model.visual."}
run = jax.jit(lambda tower, patches: tower(patches))


def at(node, attribute):
    for part in attribute.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    folder = FIXTURES / request.param
    keys = json.loads((folder / "config.json").read_text())
    config = QwenVisionConfig.from_hf(keys, 48)
    tower = nnx.eval_shape(lambda: QwenTower(config, rngs=nnx.Rngs(0)))
    tensors = load_file(folder / "model.safetensors")
    specs = tower_specs(config, NAMES[request.param], "")
    for name, spec in specs.items():
        value = tensors.pop(name)
        assert value.shape == spec.file_shape
        value = value.reshape(len(value), -1) if value.ndim > 1 else value
        value = value.T if spec.transposed else value
        assert value.shape == spec.shape
        at(tower, spec.attribute).set_value(jnp.asarray(value, jnp.float32))
    assert not [name for name in tensors if "visual" in name]
    return tower, np.load(folder / "expected.npz")


@pytest.mark.parametrize("total", [236, 300])
def test_features_of_three_pictures(case, total):
    tower, expected = case
    patches = lay_out(expected["pixels"], expected["grids"], tower.config, total)
    features = run(tower, patches)
    assert features.shape == (total // 4, 48)
    got = np.asarray(features)[: len(expected["features"])]
    np.testing.assert_allclose(got, expected["features"], atol=TOLERANCE, rtol=0)


def test_a_picture_alone_is_what_it_is_in_a_batch(case):
    tower, expected = case
    counts = np.prod(expected["grids"], axis=-1)
    first, last = counts[0], counts[0] + counts[1]
    patches = lay_out(expected["pixels"][first:last], expected["grids"][1:2], tower.config, 236)
    got = np.asarray(run(tower, patches))[: counts[1] // 4]
    wanted = expected["features"][first // 4 : last // 4]
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["one", "two", "batch"])
def test_positions(case, name):
    tower, expected = case
    mask = expected[f"{name}_mask"].astype(bool)
    rows = [row[kept] for row, kept in zip(expected[f"{name}_tokens"], mask, strict=True)]
    grids = expected["grids"][: expected[f"{name}_images"].sum()]
    positions, shift = mrope_positions(rows, grids, tower.config)
    for b, kept in enumerate(mask):
        wanted = expected[f"{name}_positions"][b, kept]
        np.testing.assert_array_equal(positions[b, : len(rows[b])], wanted)
    np.testing.assert_array_equal(shift, expected[f"{name}_shift"])


def dense_attention(q, k, v, segments):
    scores = np.einsum("pnh,snh->nps", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(segments[:, None] == segments, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nps,snh->pnh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("lengths", [(700,), (300, 5, 250, 145), (100,) * 7])
def test_attention_in_blocks(lengths):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 700, 2, 8)).astype(np.float32)
    segments = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    got = jax.jit(segment_attention)(q, k, v, segments)
    wanted = dense_attention(*(x.astype(np.float64) for x in (q, k, v)), segments)
    np.testing.assert_allclose(got, wanted, atol=2e-6, rtol=0)


def test_attention_holds_blocks_of_scores_alone():
    shape = jax.ShapeDtypeStruct((8192, 2, 8), jnp.float32)
    segments = jax.ShapeDtypeStruct((8192,), jnp.int32)
    compiled = jax.jit(segment_attention).lower(shape, shape, shape, segments).compile()
    scores = 2 * 8192 * 8192 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 20


def config(**others):
    sizes = {"num_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    sizes |= {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2, "window_size": 8}
    return QwenVisionConfig(**sizes | {"projector_size": 8, "full_layers": (1,)} | others)


def test_windows_and_frames_of_a_small_grid():
    """Tokens 3 by 3 in windows of 2 by 2: corners of 4, 2, 2 and 1 tokens."""
    pixels = np.repeat(np.arange(36.0, dtype=np.float32)[:, None], 24, axis=1)
    patches = lay_out(pixels, np.array([[1, 6, 6]]), config(), 40)
    tokens = patches.pixels[:36:4, 0] // 4
    np.testing.assert_array_equal(tokens, [0, 1, 3, 4, 2, 5, 6, 7, 8])
    np.testing.assert_array_equal(patches.order, [0, 1, 4, 2, 3, 5, 6, 7, 8, 9])
    np.testing.assert_array_equal(patches.windows, np.repeat(np.arange(5), [16, 8, 8, 4, 4]))
    np.testing.assert_array_equal(patches.frames, np.repeat([0, 1], [36, 4]))
    np.testing.assert_array_equal(patches.places[4:8], [[0, 2], [0, 3], [1, 2], [1, 3]])
    np.testing.assert_array_equal(merged_tokens(np.array([[1, 6, 6], [1, 4, 2]]), 2), [9, 2])


def test_wrong_layouts_are_rejected():
    pixels = np.zeros((24, 24), np.float32)
    for grids, total, message in (
        ([[1, 3, 8]], None, "multiples of 2"),
        ([[1, 4, 4]], None, r"expected \(16, 24\)"),
        ([[1, 4, 6]], 20, "at least 24"),
        ([[1, 4, 6]], 26, "a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            lay_out(pixels, np.array(grids), config(), total)


def test_wrong_prompts_are_rejected():
    image = config().image_token_id
    grids = np.array([[1, 4, 4]])
    for prompt, given, message in (
        ([1, *[image] * 3, 2], grids, "prompt 0 has other image tokens"),
        ([1, *[image] * 3], grids, "prompt 0 has other image tokens"),
        ([1, *[image] * 5], grids, "prompt 0 has other image tokens"),
        ([1, 2], grids, "1 of the images have no token"),
        ([1, *[image] * 4], np.array([[2, 4, 4]]), "one time step"),
    ):
        with pytest.raises(ValueError, match=message):
            mrope_positions([prompt], given, config())
    with pytest.raises(ValueError, match="width=3"):
        mrope_positions([[1, 2, 3, 4]], np.zeros((0, 3), int), config(), 3)


def test_text_alone_has_its_true_positions():
    positions, shift = mrope_positions([[5, 6, 7], [5]], np.zeros((0, 3), int), config(), 4)
    np.testing.assert_array_equal(positions[0], [[0] * 3, [1] * 3, [2] * 3, [0] * 3])
    np.testing.assert_array_equal(shift, [0, 0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 36}, "hidden_size must be a multiple of 4 num_heads = 64"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"in_chans": 1}, "in_chans must be 3"),
        ({"out_hidden_size": 9}, "out_hidden_size must be the decoder's width, 3584"),
        ({"window_size": 27}, "window_size must be at least"),
        ({"fullatt_block_indexes": [32]}, "fullatt_block_indexes must be a list"),
        ({"depth": 0}, "depth must be a positive integer"),
    ],
)
def test_wrong_configs_are_rejected(keys, message):
    with pytest.raises(ValueError, match=message):
        QwenVisionConfig.from_hf({"vision_config": keys}, 3584)
