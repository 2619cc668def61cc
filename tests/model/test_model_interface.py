"""What a model has: every family's is a `Model`, those with a tower are a `VisionModel` too."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kvjax.generation.programs import flat, whole
from kvjax.model_interface import NO_IMAGES, Images, Model, VisionModel, encode_images
from kvjax.models.load import load_model

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def decoder():
    return load_model(FIXTURES / "hf" / "llama2-gqa", progress=False)


@pytest.mark.parametrize(
    ("folder", "sees"),
    [("hf/llama2-gqa", False), ("vl/llava-old", True), ("vl/qwen25vl", True)],
)
def test_which_models_see(folder, sees):
    model = load_model(FIXTURES / folder, progress=False)
    assert isinstance(model, Model)
    assert isinstance(model, VisionModel) == sees


def test_a_model_in_parts_is_none_until_it_is_put_together(decoder):
    parts = flat(decoder)
    assert not isinstance(parts, Model)
    assert isinstance(whole(parts), Model)


def test_a_model_is_one_inside_a_program(decoder):
    found = []
    jax.jit(lambda model: found.append((isinstance(model, Model), isinstance(model, VisionModel))))(
        decoder
    )
    assert found == [(True, False)]


def test_images_need_a_vision_language_model(decoder):
    assert encode_images(decoder, None) is NO_IMAGES
    images = Images(pixels=jnp.zeros((1, 3, 2, 2)), places=jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(TypeError, match="images for a Decoder, expected a vision-language model"):
        encode_images(decoder, images)
