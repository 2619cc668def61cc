"""CLIP's tower: which features it hands out, and configs that are refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.models.vision.clip import Clip
from kvjax.models.vision.config import VisionConfig

CONFIG = VisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=2,
    image_size=8,
    patch_size=4,
    projector_size=12,
    image_token_id=9,
    keeps_class=True,
)
PATCHES = np.random.default_rng(0).normal(size=(2, 4, 48)).astype(np.float32)


@pytest.fixture(scope="module")
def hidden():
    """Of a tower that gives all hidden states: each one's features with the class token."""
    config = dataclasses.replace(CONFIG, feature_layers=(0, 1, 2, 3))
    features = np.asarray(tower(config)(jnp.asarray(PATCHES)))
    return np.split(features, 4, axis=-1)


def tower(config):
    return Clip(config, dtype=np.float32, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("layers", "keeps_class"), [((-2,), False), ((-2,), True), ((1, -1), False), ((-4,), True)]
)
def test_features_are_hidden_states(hidden, layers, keeps_class):
    config = dataclasses.replace(CONFIG, feature_layers=layers, keeps_class=keeps_class)
    features = np.asarray(tower(config)(jnp.asarray(PATCHES)))
    wanted = np.concatenate([hidden[layer] for layer in layers], axis=-1)
    np.testing.assert_allclose(features, wanted if keeps_class else wanted[:, 1:], atol=1e-5)
    assert features.shape[1] == config.features
    assert len(tower(config).layers) == max(layer % 4 for layer in layers)


KEYS = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
}


def test_missing_keys_are_transformers_own():
    config = VisionConfig.from_hf(KEYS, 12)
    assert (config.intermediate_size, config.num_layers, config.layer_norm_eps) == (3072, 12, 1e-5)
    assert (config.image_token_id, config.feature_layers, config.features) == (32000, (-2,), 4)
    large = VisionConfig.from_hf({}, 4096)
    assert (large.hidden_size, large.num_layers, large.features) == (1024, 24, 576)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.model_type must"),
        ({"vision_config": KEYS["vision_config"] | {"patch_size": 3}}, "image_size must be a mult"),
        ({"vision_config": KEYS["vision_config"] | {"hidden_act": "relu"}}, "hidden_act must be"),
        ({"vision_config": KEYS["vision_config"] | {"hidden_size": 15}}, "hidden_size must be a m"),
        ({"vision_feature_layer": -14}, "vision_feature_layer must be layers from -13 to 12"),
        ({"vision_feature_layer": "last"}, "vision_feature_layer must be"),
        ({"vision_feature_select_strategy": "mean"}, "select_strategy must be 'default' or 'full'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act must be 'gelu', got 'relu'"),
        ({"multimodal_projector_bias": 1}, "multimodal_projector_bias must be true or false"),
        ({"image_token_index": -1}, "image_token_index must be a token id"),
    ],
)
def test_wrong_configs_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        VisionConfig.from_hf(KEYS | changes, 12)
