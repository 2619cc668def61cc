"""Show one prompt on a page: its tokens, shaded by how many layers and heads kept them."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from kvjax.eval.report.page import fill
from kvjax.generation.detokenize import decode_after
from kvjax.inputs.image_processor import ClipImages, Levels
from kvjax.inputs.images import png
from kvjax.inputs.prompts import ModelInputs
from kvjax.model_interface import Model, VisionModel

# Tokens before one that its text is decoded after: what a piece looks like depends on them.
_CONTEXT = 6
# Pixels of an image's longest side on the page.
_SIDE = 1024


@dataclass(frozen=True)
class Shown:
    """An image among the tokens.

    Attributes:
      pixels: `[height, width, 3]` uint8, as the model reads it.
      first: the token of its first patch; the others follow in rows.
      rows, columns: of patches.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    first: int
    rows: int
    columns: int


def write_inspection(
    path: str | Path,
    tokens: Sequence[str],
    kept: Mapping[str, Bool[np.ndarray, "L K T"]],
    title: str = "",
    facts: Mapping[str, Any] | None = None,
    images: Sequence[Shown] = (),
) -> Path:
    """Write a page that shows which tokens of a prompt each layer and head kept.

    Args:
      path: of the HTML file; its folder is made where it is missing.
      tokens: T pieces of text, which together are the prompt.
      kept: masks by method, at least one; all of one shape.
      title: above everything.
      facts: names and values shown beside it, such as the model and the budget.
      images: shown with their patches shaded likewise.

    Returns:
      `path`.

    Raises:
      ValueError: no token, no method, or masks that fit neither each other nor the tokens.
      OSError: the file cannot be written.
    """
    masks = {name: np.asarray(mask, bool) for name, mask in kept.items()}
    if not len(tokens) or not masks:
        raise ValueError(
            f"tokens has {len(tokens)} entries and kept {len(masks)}, expected at least one of each"
        )
    layers, heads = next(iter(masks.values())).shape[:2]
    for name, mask in masks.items():
        if mask.shape != (layers, heads, len(tokens)) or not layers * heads:
            raise ValueError(
                f"kept[{name!r}] has shape {mask.shape}, expected layers, heads and tokens"
                f" {(layers, heads, len(tokens))}"
            )
    data = {
        "title": title or "Kept tokens",
        "facts": {str(name): str(value) for name, value in (facts or {}).items()},
        "tokens": list(tokens),
        "images": [_picture(image) for image in images],
        "layers": layers,
        "heads": heads,
        "methods": [{"name": name, "mask": pack_mask(mask)} for name, mask in masks.items()],
    }
    page = fill(
        "inspect.html",
        title=data["title"],
        data=data,
        styles=("inspect.css",),
        scripts=("base.js", "inspect.js"),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Half of a character that takes two would not be UTF-8.
    target.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    return target


def _picture(image: Shown) -> dict[str, Any]:
    """An image for the page, its pixels as the text of a PNG."""
    source = f"data:image/png;base64,{base64.b64encode(png(image.pixels, _SIDE)).decode()}"
    return {"src": source, "first": image.first, "rows": image.rows, "columns": image.columns}


def shown(model: Model, inputs: ModelInputs, pictures: Sequence[np.ndarray]) -> list[Shown]:
    """The images of one prompt: what `prepare_inputs` made of these pictures."""
    if not pictures:
        return []
    places = np.flatnonzero(np.array(inputs.rows[0]) == inputs.token)
    skipped, images = 0, list(pictures)
    assert isinstance(model, VisionModel)  # it was given pictures
    if isinstance(model.image_config, ClipImages):  # it crops, and may have the class token
        skipped, levels = int(model.vision_config.keeps_class), model.image_config.levels
        images = [_unnormalised(pixels, levels) for pixels in inputs.pixels]
    found, start = [], 0
    for (rows, columns), pixels in zip(inputs.shapes, images, strict=True):
        found.append(Shown(pixels, int(places[start + skipped]), rows, columns))
        start += rows * columns + skipped
    return found


def _unnormalised(pixels: np.ndarray, levels: Levels) -> np.ndarray:
    """A picture `[3, height, width]` as the tower reads it, as what can be shown."""
    values = (pixels.transpose(1, 2, 0) * levels.std + levels.mean) / levels.scale
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def pack_mask(mask: Bool[np.ndarray, "L K T"]) -> str:
    """A mask in base64: a bit a token, the first in a byte's lowest, each head from a new byte."""
    return base64.b64encode(np.packbits(mask, axis=-1, bitorder="little").tobytes()).decode()


def pieces(ids: Sequence[int], tokenizer: Any, image: int | None = None) -> list[str]:
    """The text of each token as it continues those before it; special tokens by their names.

    `image` is the token that stands for a patch, which is written as a small square.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    found = []
    for place, token in enumerate(ids):
        if token == image:
            found.append("▪")
            continue
        if token in special:
            found.append(str(tokenizer.convert_ids_to_tokens([token])[0]))
            continue
        found.append(decode_after(ids[max(0, place - _CONTEXT) : place], [token], tokenizer))
    return found
