"""Turn pictures into what a vision tower reads, as a checkpoint's image processor does.

Pillow is needed here and nowhere else (`pip install kvjax[vision]`). The steps are those of
transformers' image processors on Pillow, and equal them; its classes are not used, because they
differ between the versions of transformers that kvjax takes, and need seconds to import.

I images, P patches of all of them, E values of a patch.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from kvjax.inputs.image_processor import ClipImages, QwenImages, expect

Picture = Any  # a PIL image, a path, or uint8 [height, width, 3]


def load_image(source: Picture) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as RGB values.

    Turned as its EXIF orientation says, and what is transparent laid on white. (transformers turns
    files alone, and lays on white what is not a file.)

    Args:
      source: a PIL image of any mode, the path of a file that Pillow reads, or uint8 [H, W, 3].

    Raises:
      ValueError: a file that cannot be read, a picture without pixels, an array of another shape or
        dtype, or another type.
      ImportError: Pillow is not installed.
    """
    if isinstance(source, np.ndarray):
        rgb = source.ndim == 3 and source.shape[2] == 3 and source.dtype == np.uint8
        kind = f"{source.dtype} {list(source.shape)}"
        expect(rgb, "image", "a uint8 array [height, width, 3]", kind)
        expect(source.size > 0, "image", "of at least one pixel", kind)
        return source
    pillow = _pillow()
    known = isinstance(source, str | Path | pillow.Image)
    expect(known, "image", "a PIL image, a path or an array", type(source).__name__)
    name = "" if isinstance(source, pillow.Image) else f" {source}"
    try:
        with contextlib.ExitStack() as files:
            image = files.enter_context(pillow.open(source)) if name else source
            expect(min(image.size) > 0, "image", "of at least one pixel", image.size)
            return _rgb(pillow, image)
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"image{name} cannot be read ({error})") from None


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images need Pillow: pip install 'kvjax[vision]'") from None
    return Image


def _rgb(pillow: Any, image: Any) -> np.ndarray:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def png(pixels: UInt8[np.ndarray, "H W 3"], side: int) -> bytes:
    """A picture as a PNG file, made smaller where a side is longer than `side`."""
    picture, file = _pillow().fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(file, "PNG")
    return file.getvalue()


def _resized(image: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    return np.array(_pillow().fromarray(image).resize((width, height), resample=resample))


def _squared(image: np.ndarray, mean: Sequence[float]) -> np.ndarray:
    """In the middle of a square of the mean colour."""
    height, width, _ = image.shape
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(x * 255) for x in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _cropped(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a picture, which lies on black where it is too small."""
    black = [max(0, size - have) for size, have in zip((height, width), image.shape, strict=False)]
    image = np.pad(image, [*((-(-x // 2), x // 2) for x in black), (0, 0)])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def clip_pixels(
    images: Sequence[Picture], config: ClipImages
) -> Float32[np.ndarray, "I 3 height width"]:
    """Pictures for a CLIP tower, all of one size.

    Raises:
      ValueError: no picture, or one that `load_image` rejects.
    """
    expect(len(images) > 0, "images", "at least one picture", images)
    pixels = []
    for source in images:
        image = load_image(source)
        if config.pad:
            image = _squared(image, config.levels.mean)
        if config.resize is not None:
            height, width = image.shape[:2]
            if isinstance(config.resize, tuple):
                height, width = config.resize
            else:
                short = min(height, width)
                height, width = (int(config.resize * side / short) for side in (height, width))
            image = _resized(image, height, width, config.levels.resample)
        if config.crop is not None:
            image = _cropped(image, *config.crop)
        pixels.append(config.levels.apply(image).transpose(2, 0, 1))
    return np.stack(pixels)


class Patches(NamedTuple):
    """Pictures as Qwen's tower reads them.

    Attributes:
      pixels: `[P, E]` all patches of a picture, then of the next. Patches of one token lie beside
        each other, tokens in rows; a patch's values in the order colour, frame, row, column.
      grids: `[I, 3]` of every picture: time steps (1), rows and columns of patches.
    """

    pixels: Float32[np.ndarray, "P E"]
    grids: Int[np.ndarray, "I 3"]


def qwen_patches(images: Sequence[Picture], config: QwenImages) -> Patches:
    """Pictures for Qwen's tower, each in its own size.

    Raises:
      ValueError: no picture, one that `load_image` rejects, or one with a side more than 200 times
        the other.
    """
    expect(len(images) > 0, "images", "at least one picture", images)
    pixels, grids = [], []
    for source in images:
        image = load_image(source)
        image = _resized(image, *config.fitted(*image.shape[:2]), config.levels.resample)
        values = config.levels.apply(image)
        pixels.append(_patches(values, config))
        grids.append([1, *(side // config.patch_size for side in image.shape[:2])])
    return Patches(np.concatenate(pixels), np.array(grids, np.int32))


def _patches(
    values: Float[np.ndarray, "height width 3"], config: QwenImages
) -> Float[np.ndarray, "P E"]:
    size, merge = config.patch_size, config.merge_size
    tall, colours = values.shape[0] // size // merge, values.shape[2]
    # Row and column of the token, of the patch in the token, of the pixel in the patch.
    parts = values.reshape(tall, merge, size, -1, merge, size, colours)
    parts = parts.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    frames = (*parts.shape[:5], config.temporal_patch_size, *parts.shape[6:])
    return np.broadcast_to(parts, frames).reshape(-1, math.prod(frames[4:]))
