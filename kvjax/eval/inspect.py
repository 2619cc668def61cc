"""One prompt on a page: its tokens, shaded by how many layers and heads kept them."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from kvjax.eval.report.page import fill
from kvjax.text import decode_after

# Tokens before one that its text is decoded after: what a piece looks like depends on them.
_CONTEXT = 6


def write_inspection(
    path: str | Path,
    tokens: Sequence[str],
    kept: Mapping[str, Bool[np.ndarray, "L K T"]],
    title: str = "",
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a page that shows which tokens of a prompt each layer and head kept.

    Args:
      path: of the HTML file; its folder is made where it is missing.
      tokens: T pieces of text, which together are the prompt.
      kept: masks by method, at least one; all of one shape.
      title: above everything.
      facts: names and values shown beside it, such as the model and the budget.

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


def pack_mask(mask: Bool[np.ndarray, "L K T"]) -> str:
    """A mask in base64: a bit a token, the first in a byte's lowest, each head from a new byte."""
    return base64.b64encode(np.packbits(mask, axis=-1, bitorder="little").tobytes()).decode()


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token as it continues those before it; special tokens by their names."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    found = []
    for place, token in enumerate(ids):
        if token in special:
            found.append(str(tokenizer.convert_ids_to_tokens([token])[0]))
            continue
        found.append(decode_after(ids[max(0, place - _CONTEXT) : place], [token], tokenizer))
    return found
