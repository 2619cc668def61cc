"""Put images into prompts: one token for each feature in place of one for each image."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.inputs.image_processor import QwenImages
from kvjax.inputs.images import clip_pixels, load_image, qwen_patches
from kvjax.inputs.prompts import ModelInputs, Prompts, bucket, is_one
from kvjax.model_interface import Model, VisionModel

# One of `kvjax.inputs.images.Picture` or a list for one prompt, a list of lists for several.
Pictures = Any


def by_prompt(images: Pictures | None, prompts: Prompts, model: Model) -> list[list[Any]] | None:
    """Each prompt's images, as pixels `[height, width, 3]` uint8; None where none are given.

    Args:
      images: PIL images, paths or uint8 arrays `[height, width, 3]`: one or a list of them for one
        prompt, a list of lists for several.
      prompts: as in `generate`.
      model: that is going to see them.

    Raises:
      ValueError: a model that reads text alone, as many lists as there are no prompts, a file that
        is missing or no image, an array of another shape or dtype.
    """
    if images is None:
        return None
    if isinstance(images, str | Path | np.ndarray) or not isinstance(images, Sequence):
        images = [images]
    _vision(model)
    count = 1 if is_one(prompts) else len(prompts)
    nested = all(isinstance(row, list | tuple) for row in images)
    if count == 1 and not (nested and len(images)):
        images = [images]
    if not all(isinstance(row, list | tuple) for row in images) or len(images) != count:
        raise ValueError(
            f"images has {len(images)} entries, expected a list of images for each of the"
            f" {count} prompts"
        )
    return [
        [_loaded(image, row, index) for index, image in enumerate(given)]
        for row, given in enumerate(images)
    ]


def _vision(model: Model) -> VisionModel:
    if not isinstance(model, VisionModel):
        raise ValueError(
            f"images are given to a {model.config.architecture}, which reads text alone, expected"
            " a vision-language model"
        )
    return model


def _loaded(image: Any, row: int, index: int) -> np.ndarray:
    try:
        return load_image(image)
    except ValueError as error:
        raise ValueError(f"image {index} of prompt {row}: {error}") from None


def placeholder(model: Model, tokenizer: Any) -> str:
    """What stands for an image in a text.

    Raises:
      ValueError: a model that reads text alone, a tokenizer that has no such token.
    """
    token = _vision(model).vision_config.image_token_id
    text = tokenizer.convert_ids_to_tokens([token])[0]
    if text is None:
        raise ValueError(f"the tokenizer has no token {token}, which stands for an image")
    return str(text)


def with_placeholders(model: Model, tokenizer: Any, text: str, images: int) -> str:
    """The text, with placeholders in front of it where it has none.

    A line each (LLaVA), or each between the tokens that such a model has around an image (Qwen).
    """
    if placeholder(model, tokenizer) in text:
        return text
    line = "\n" if getattr(_vision(model).vision_config, "around", None) is None else ""
    return (mark(model, tokenizer) + line) * images + text


def mark(model: Model, tokenizer: Any) -> str:
    """A placeholder with the tokens that the model has around an image."""
    around = getattr(_vision(model).vision_config, "around", None)
    before, after = ("", "") if around is None else tokenizer.convert_ids_to_tokens(list(around))
    return f"{before}{placeholder(model, tokenizer)}{after}"


def prepare_inputs(
    model: Model, rows: Sequence[Sequence[int]], pictures: Sequence[Sequence[Any]] | None
) -> ModelInputs:
    """Read the images of each prompt, and give each as many tokens as it has features.

    Args:
      model: a vision-language model has a `vision_config` and an `image_config`.
      rows: token ids, one that stands for each image, or one for each of its features already.
      pictures: from `by_prompt`.

    Raises:
      ValueError: another number of such tokens in a prompt, a model that nobody has told how its
        pictures are prepared.
    """
    if not isinstance(model, VisionModel):
        return ModelInputs(list(map(list, rows)))
    token = model.vision_config.image_token_id
    pictures = [[] for _ in rows] if pictures is None else pictures
    every = [picture for given in pictures for picture in given]
    if every and model.image_config is None:
        raise ValueError("model.image_config is None, expected how its pictures are prepared")
    pixels: Any = None
    sizes: list[int] = []
    shapes: list[tuple[int, int]] = []
    rotary = None
    if every and isinstance(model.image_config, QwenImages):
        pixels, sizes, shapes, rotary = _qwen(model, every)
    elif every:
        pixels, sizes, shapes = _clip(model, every)
    left, expanded = iter(sizes), []
    for index, (row, given) in enumerate(zip(rows, pictures, strict=True)):
        mine = [next(left) for _ in given]
        expanded.append(_expanded(list(row), mine, token, index))
    return ModelInputs(expanded, pixels, token, shapes, rotary)


def _clip(model: VisionModel, pictures: Sequence[Any]) -> tuple[np.ndarray, list[int], list]:
    """What a CLIP tower reads of pictures, how many features each has, and its patches."""
    pixels, side = clip_pixels(pictures, model.image_config), model.vision_config.image_size
    if pixels.shape[2:] != (side, side):
        raise ValueError(
            f"the checkpoint's image processor makes pictures of {pixels.shape[2]} by"
            f" {pixels.shape[3]} pixels, expected its tower's {side} by {side}"
        )
    patches = side // model.vision_config.patch_size
    count = len(pictures)
    return pixels, [model.vision_config.features] * count, [(patches, patches)] * count


def _qwen(model: Any, pictures: Sequence[Any]) -> tuple[Any, list[int], list, Callable]:
    """What Qwen's tower reads of pictures, the features of each, as a grid, where they turn."""
    patches, merged = qwen_patches(pictures, model.image_config), model.vision_config.merged
    sizes = (np.prod(patches.grids, axis=-1) // merged).tolist()
    # Pictures of nearly as many patches share a program.
    laid_out = model.lay_out(*patches, total=bucket(sum(sizes)) * merged)
    shapes = [
        tuple(n // model.vision_config.merge_size for n in g[1:]) for g in patches.grids.tolist()
    ]
    return laid_out, sizes, shapes, partial(model.rotary_positions, grids=patches.grids)


def _expanded(row: list[int], sizes: Sequence[int], token: int, index: int) -> list[int]:
    found = row.count(token)
    if found == sum(sizes) and found != len(sizes):
        return row
    if found != len(sizes):
        raise ValueError(
            f"prompt {index} has {found} tokens that stand for an image (id {token}) and"
            f" {len(sizes)} images, expected as many"
        )
    left = iter(sizes)
    return [one for given in row for one in ([given] * (next(left) if given == token else 1))]
