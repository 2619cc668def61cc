"""Make pages that need no other file: template, styles, scripts and data in one."""

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

_BASE = "base.css"


def fill(
    template: str, *, title: str, data: Any, styles: Sequence[str] = (), scripts: Sequence[str] = ()
) -> str:
    """A page.

    Args:
      template: its name in `pages`, with %TITLE%, %STYLE%, %DATA% and %SCRIPT%, once each.
      title: as text.
      data: what JSON can hold; the scripts find it in the element `#data`.
      styles, scripts: names in `pages`, in order; `base.css` comes first of all.
    """
    # A "<" in a string would let data end its own element.
    content = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "%TITLE%": html.escape(title),
        "%STYLE%": "\n".join(map(_read, (_BASE, *styles))),
        "%DATA%": content.replace("<", "\\u003c").replace("\u2028", "\\u2028"),
        "%SCRIPT%": "\n".join(map(_read, scripts)),
    }
    text = _read(template)
    pieces = []
    for mark, part in sorted(parts.items(), key=lambda item: text.index(item[0])):
        before, text = text.split(mark, 1)
        pieces += [before, part]
    return "".join([*pieces, text])


def _read(name: str) -> str:
    return (files("kvjax.eval.report") / "pages" / name).read_text(encoding="utf-8")
