"""Read how a checkpoint prepares pictures: its `preprocessor_config.json`, validated.

Of CLIP and LLaVA (`ClipImages`) and of Qwen2-VL and Qwen2.5-VL (`QwenImages`); `images.py` does
what they say. A missing key has the default of transformers' class.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

_CLIP = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
_QWEN = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
_FILES = ("preprocessor_config.json", "processor_config.json")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MOST_OBLONG = 200  # Qwen's longest side over its shortest


def expect(condition: bool, name: str, expected: str, value: Any) -> None:
    """Raise ValueError, "NAME must be EXPECTED, got VALUE", unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_number(value: Any, least: int | float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= least


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        whole = isinstance(value, int) and _is_number(value, 1)
        expect(whole, name, "a positive integer", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels:
    """What becomes of a value 0 .. 255: `(value * scale - mean) / std`, for each colour.

    Attributes:
      scale: 1 / 255 unless a processor does not rescale (1).
      mean, std: red, green, blue, after scaling; 0 and 1 where a processor does not normalise.
      resample: Pillow's number of the filter for resizing, 0 .. 5; 3 is bicubic.

    Raises:
      ValueError: a value outside these ranges.
    """

    scale: float = 1 / 255
    mean: tuple[float, float, float] = _CLIP_MEAN
    std: tuple[float, float, float] = _CLIP_STD
    resample: int = 3

    def __post_init__(self):
        expect(_is_number(self.scale, 0), "rescale_factor", "a number >= 0", self.scale)
        for name, least in (("mean", -math.inf), ("std", 1e-12)):
            value = getattr(self, name)
            three = isinstance(value, tuple) and len(value) == 3
            fits = three and all(_is_number(x, least) for x in value)
            kind = "numbers" if name == "mean" else "numbers above 0"
            expect(fits, f"image_{name}", f"three {kind}", value)
        expect(self.resample in range(6), "resample", "one of Pillow's 0 .. 5", self.resample)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> "Levels":
        """Read an image processor's dictionary."""
        rescaled = _flag(mapping, "do_rescale", True)
        normalized = _flag(mapping, "do_normalize", True)
        return cls(
            scale=mapping.get("rescale_factor", 1 / 255) if rescaled else 1.0,
            mean=_three(mapping.get("image_mean", _CLIP_MEAN)) if normalized else (0.0, 0.0, 0.0),
            std=_three(mapping.get("image_std", _CLIP_STD)) if normalized else (1.0, 1.0, 1.0),
            resample=mapping.get("resample", 3),
        )

    def apply(self, image: UInt8[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "H W 3"]:
        """The picture in the model's units."""
        scaled = (image.astype(np.float64) * self.scale).astype(np.float32)
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipImages:
    """An image processor of CLIP or LLaVA: pad, resize, crop, scale, normalise.

    Attributes:
      resize: None, the length that the shortest side gets (the other in proportion, rounded down),
        or (height, width) whatever the proportions.
      crop: None, or (height, width) cut from the middle; what a picture lacks is black.
      pad: make the picture square first, it in the middle and the mean colour beside it (LLaVA's
        `image_aspect_ratio: "pad"`, transformers' `do_pad`).
      levels: of the values.

    Raises:
      ValueError: sizes that are not positive, or that leave pictures of different sizes.
    """

    resize: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    pad: bool = False
    levels: Levels = Levels()

    def __post_init__(self):
        for name, value in (("size", self.resize), ("crop_size", self.crop)):
            listed = value if isinstance(value, tuple) else () if value is None else (value,)
            whole = all(isinstance(x, int) and _is_number(x, 1) for x in listed)
            expect(whole, name, "made of positive integers", value)
        known = self.crop is not None or isinstance(self.resize, tuple)
        known |= self.pad and self.resize is not None
        expected = "given, or pictures have different sizes in the end"
        expect(known, "crop_size", expected, self.crop)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> "ClipImages":
        """Read an image processor's dictionary, or that of LLaVA's own `image_aspect_ratio`.

        Raises:
          ValueError: one sentence that names the key, its value and what was expected.
        """
        ratio = mapping.get("image_aspect_ratio")
        expect(ratio in (None, "pad", "square"), "image_aspect_ratio", "'pad' or 'square'", ratio)
        size: Any = mapping.get("size", {"shortest_edge": 224})
        if isinstance(size, Mapping):
            known = set(size) in ({"shortest_edge"}, {"height", "width"})
            expect(known, "size", "an object of shortest_edge, or of height and width", size)
            size = size.get("shortest_edge") or (size["height"], size["width"])
        crop: Any = mapping.get("crop_size", 224)
        if isinstance(crop, Mapping):
            expect(set(crop) == {"height", "width"}, "crop_size", "height and width", crop)
            crop = (crop["height"], crop["width"])
        return cls(
            resize=size if _flag(mapping, "do_resize", True) else None,
            crop=(crop if isinstance(crop, tuple) else (crop, crop))
            if _flag(mapping, "do_center_crop", True)
            else None,
            pad=_flag(mapping, "do_pad", False) or ratio == "pad",
            levels=Levels.from_hf(mapping),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenImages:
    """An image processor of Qwen2-VL or Qwen2.5-VL: resize in proportion, scale, cut into patches.

    Attributes:
      patch_size: pixels of each side of a patch.
      merge_size: patches of each side of what becomes one token; sides are multiples of both.
      temporal_patch_size: frames of a patch; a still picture is repeated.
      min_pixels, max_pixels: between which the picture is brought, in proportion.
      levels: of the values.

    Raises:
      ValueError: a number that is not a positive integer, or max_pixels below min_pixels or below
        one token.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    levels: Levels = Levels()

    def __post_init__(self):
        sizes = ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels")
        _check_positive(self, *sizes)
        least = max(self.min_pixels, (self.patch_size * self.merge_size) ** 2)
        expect(self.max_pixels >= least, "max_pixels", f"at least {least}", self.max_pixels)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> "QwenImages":
        """Read an image processor's dictionary; `min_pixels` goes before `size.shortest_edge`.

        Raises:
          ValueError: one sentence that names the key, its value and what was expected.
        """
        expect(_flag(mapping, "do_resize", True), "do_resize", "true", False)
        size = mapping.get("size") or {}
        expect(isinstance(size, Mapping), "size", "an object", size)
        given = {name: mapping[name] for name in _QWEN_SIZES if mapping.get(name) is not None}
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            given.setdefault(name, size.get(edge, size.get(name, getattr(cls, name))))
        return cls(**given, levels=Levels.from_hf(mapping))

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a picture of this size is brought to.

        Raises:
          ValueError: one side more than 200 times the other.
        """
        ratio = max(height, width) / min(height, width)
        if ratio > _MOST_OBLONG:
            raise ValueError(
                f"the picture is {height} by {width} pixels, expected no side more than"
                f" {_MOST_OBLONG} times the other"
            )
        unit = self.patch_size * self.merge_size
        tall, wide = (round(side / unit) * unit for side in (height, width))
        if tall * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            tall, wide = (
                max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)
            )
        elif tall * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            tall, wide = (math.ceil(side * grow / unit) * unit for side in (height, width))
        return tall, wide


_QWEN_SIZES = ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels")
ImageConfig = ClipImages | QwenImages


def load_image_config(directory: str | Path, kind: type[ImageConfig] | None = None) -> ImageConfig:
    """Read `preprocessor_config.json`, or `image_processor` of `processor_config.json`.

    Args:
      directory: of the checkpoint.
      kind: that the model needs; any by default.

    Raises:
      ValueError: neither file is there, or one is damaged or of a processor that is not
        implemented; the message names the file.
    """
    paths = [Path(directory) / name for name in _FILES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{directory} must hold {' or '.join(_FILES)}")
    try:
        mapping = json.loads(path.read_text(encoding="utf-8-sig"))
        expect(isinstance(mapping, dict), "the file", "a JSON object", mapping)
        mapping = mapping.get("image_processor", mapping)
        found = mapping.get("image_processor_type", mapping.get("feature_extractor_type"))
        names = {kind: _CLIP + _QWEN, ClipImages: _CLIP, QwenImages: _QWEN}[kind]
        name = str(found).removesuffix("Fast").removesuffix("Pil")
        expect(name in names, "image_processor_type", f"one of {', '.join(names)}", found)
        return (ClipImages if name in _CLIP else QwenImages).from_hf(mapping)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def _flag(mapping: Mapping[str, Any], name: str, missing: bool) -> bool:
    value = mapping.get(name)
    value = missing if value is None else value
    expect(isinstance(value, bool), name, "true or false", value)
    return value


def _three(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else (value,) * 3
    return tuple(float(x) if isinstance(x, int) else x for x in values)
