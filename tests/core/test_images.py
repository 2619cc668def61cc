"""Pictures become the pixels that transformers makes of them (tests/fixtures/README.md)."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvjax.inputs.image_processor import ClipImages, Levels, QwenImages, load_image_config
from kvjax.inputs.images import clip_pixels, load_image, qwen_patches

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(path.name for path in (FIXTURES / "vl").iterdir())
STEP = 1 / 255  # of a picture's values; Pillow's versions may round one differently
SAMPLES, STRIDE = 60, 1_000_003  # as of make_photo_samples.py


def pixels_of(images, config):
    kind = isinstance(config, ClipImages)
    return clip_pixels(images, config) if kind else qwen_patches(images, config).pixels


def scaled(pixels, config):
    """Within 1 / 255 before normalising is within this after it."""
    return STEP / min(config.levels.std)


@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_transformers(name):
    config = load_image_config(FIXTURES / "vl" / name)
    expected = np.load(FIXTURES / "vl" / name / "expected.npz")
    pictures = [expected[f"image_{i}"] for i in range(3)]
    got = pixels_of(pictures, config)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected["pixels"], atol=scaled(got, config), rtol=0)
    if isinstance(config, QwenImages):
        np.testing.assert_array_equal(qwen_patches(pictures, config).grids, expected["grids"])


@pytest.mark.parametrize("photo", ["astronaut", "chelsea", "coffee"])
@pytest.mark.parametrize("name", ["clip", "llava", "qwen"])
def test_photographs_equal_transformers(name, photo, shared_data):
    facts = json.loads((FIXTURES / "photo_samples.json").read_text())
    kind = QwenImages if name == "qwen" else ClipImages
    config, expected = kind.from_hf(facts["settings"][name]), facts[photo][name]
    got = pixels_of([shared_data / "images" / f"{photo}.png"], config)
    assert list(got.shape) == expected["shape"]
    sampled = got.ravel()[np.arange(SAMPLES) * STRIDE % got.size]
    np.testing.assert_allclose(sampled, expected["samples"], atol=scaled(got, config), rtol=0)
    np.testing.assert_allclose(got.mean(), expected["mean"], atol=1e-3)
    np.testing.assert_allclose(got.std(), expected["std"], atol=1e-3)


def grey(height=4, width=6):
    return (np.arange(height * width) * 9 % 256).astype(np.uint8).reshape(height, width)


def test_modes_become_rgb():
    values = grey()
    rgb = np.repeat(values[..., None], 3, axis=-1)
    for mode in ("L", "RGB", "P", "CMYK"):
        got = load_image(Image.fromarray(values).convert(mode))
        np.testing.assert_array_equal(got, rgb, err_msg=mode)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparent_pictures_lie_on_white(alpha):
    values = np.repeat(grey()[..., None], 4, axis=-1)
    values[..., 3] = alpha
    part = alpha / 255
    blended = values[..., :3] * part + 255 * (1 - part)
    assert np.abs(load_image(Image.fromarray(values)) - blended).max() <= 1


def test_a_transparent_palette_lies_on_white(tmp_path):
    image = Image.fromarray(np.eye(4, dtype=np.uint8), "L").convert("P")
    image.putpalette([200, 0, 0, 0, 100, 0])
    image.save(tmp_path / "p.png", transparency=0)
    expected = np.where(np.eye(4, dtype=bool)[..., None], [0, 100, 0], 255)
    np.testing.assert_array_equal(load_image(tmp_path / "p.png"), expected)


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    Image.fromarray(grey()).save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(grey(), -1)
    np.testing.assert_array_equal(load_image(tmp_path / "turned.png")[..., 0], expected)
    with Image.open(tmp_path / "turned.png") as image:
        np.testing.assert_array_equal(load_image(image)[..., 0], expected)


def test_llava_pads_with_the_mean_colour():
    plain = Levels(scale=1.0, mean=(0.25, 0.5, 0.75), std=(1.0, 1.0, 1.0))
    config = ClipImages(resize=None, crop=(6, 6), pad=True, levels=plain)
    image = np.full((3, 6, 3), 9, np.uint8)
    got = clip_pixels([image], config)[0] + np.array(plain.mean)[:, None, None]
    np.testing.assert_allclose(got[:, 1:4], 9)
    for row in (0, 4, 5):
        np.testing.assert_allclose(got[:, row], np.repeat([[63], [127], [191]], 6, axis=1))
    assert ClipImages.from_hf({"image_aspect_ratio": "pad"}).pad


def test_a_crop_larger_than_the_picture_is_black_outside():
    config = ClipImages(resize=None, crop=(5, 6), levels=Levels(mean=(0.0,) * 3, std=(1.0,) * 3))
    got = clip_pixels([np.full((2, 3, 3), 255, np.uint8)], config)[0, 0]
    expected = np.zeros((5, 6))
    expected[2:4, 2:5] = 1  # the odd pixel goes above and to the left, as transformers has it
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((224, 224), (224, 224)),
        ((3, 600), (28, 812)),  # at least one token high
        ((70, 98), (56, 112)),  # halves go to the even neighbour: 2.5 to 2, 3.5 to 4
        ((4000, 3000), (1148, 840)),  # at most max_pixels
        ((5, 5), (56, 56)),  # at least min_pixels
    ],
)
def test_qwen_sizes(size, fitted):
    assert QwenImages().fitted(*size) == fitted


def test_a_file_cut_short_and_no_picture(tmp_path):
    Image.fromarray(grey(64, 64)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png", "absent.png"):
        with pytest.raises(ValueError, match=rf"image .*{name} cannot be read"):
            load_image(tmp_path / name)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.zeros((4, 4), np.uint8), r"uint8 array \[height, width, 3\]"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (Image.new("RGB", (0, 3)), "at least one pixel"),
        (7, "a PIL image, a path or an array, got 'int'"),
    ],
)
def test_wrong_pictures_are_rejected(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image)


def test_wrong_calls_are_rejected():
    with pytest.raises(ValueError, match="no side more than 200 times the other"):
        qwen_patches([np.zeros((2, 402, 3), np.uint8)], QwenImages())
    for call, config in ((clip_pixels, ClipImages()), (qwen_patches, QwenImages())):
        with pytest.raises(ValueError, match="at least one picture"):
            call([], config)


def test_pillow_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"kvjax\[vision\]"):
        load_image("picture.png")
    assert load_image(np.ones((2, 2, 3), np.uint8)).shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_processor_type": "ViltImageProcessor"}, "image_processor_type must be one of"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 9}}, "size"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "crop_size"),
        ({"image_processor_type": "CLIPImageProcessor", "image_std": [1, 1, 0]}, "image_std"),
        ({"image_processor_type": "CLIPImageProcessor", "do_resize": 1}, "do_resize"),
        ({"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 0}, "patch_size"),
        ({"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 9}, "max_pixels"),
        ({"image_processor_type": "Qwen2VLImageProcessor", "resample": 9}, "resample"),
        ([], "JSON object"),
    ],
)
def test_wrong_settings_are_rejected(keys, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: .*{message}"):
        load_image_config(tmp_path)


def test_settings_are_looked_for_in_both_files(tmp_path):
    with pytest.raises(ValueError, match=r"preprocessor_config.json or processor_config\.json"):
        load_image_config(tmp_path)
    keys = {"image_processor_type": "CLIPImageProcessorFast", "size": 30, "crop_size": 20}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": keys}))
    config = load_image_config(tmp_path)
    assert dataclasses.replace(config, levels=Levels()) == ClipImages(resize=30, crop=(20, 20))
