"""Read folders of results as rows, each once and checked."""

import json
import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.eval.journal import CONFIG

# Settings that tell methods of several folders apart, and the one that tells documents apart.
_VARIANTS = ("model", "dtype", "chat", "window", "layout", "quantize")
_DRAW = "seed"
_TEXTS = ("task", "protocol", "method", "budget", "document", "ask")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One answer to one question; the fields of a line that the report looks at.

    Attributes:
      task, length, protocol, method, budget, document, ask: the key.
      prompt_tokens: of the prompt before compression.
      prediction, answers: what was said, and what would have been right.
      metric: how they were compared.
      score: 0 to 1, or None.
      nll: nats a token, or None.
      kept_LK: entries of each layer and KV head, or None.
      bytes, full_bytes: of the compressed and of the full cache, or None.
      seconds: or None.
      depth: where the needle lies, 0 (start) to 1 (end), or None.
      error: why there is no answer, or None.
    """

    task: str
    length: int
    protocol: str
    method: str
    budget: str
    document: str
    ask: str
    prompt_tokens: int | None = None
    prediction: str | None = None
    answers: tuple[str, ...] = ()
    metric: str | None = None
    score: float | None = None
    nll: float | None = None
    kept_LK: np.ndarray | None = field(default=None, compare=False)
    bytes: int | None = None
    full_bytes: int | None = None
    seconds: float | None = None
    depth: float | None = None
    error: str | None = None

    @property
    def key(self) -> tuple:
        """What tells this row from every other."""
        return (self.task, self.length, self.protocol, self.method, self.budget, self.document,
                self.ask)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Results:
    """Rows in the order of their keys, and what was found on the way.

    Attributes:
      rows: each key once; the last line of a key counts.
      settings: of each folder, by its path.
      counts: "folders", "files", "rows", "failed", "duplicates" (lines that a later one replaced)
        and "half_written" (last lines that a kill cut off).
    """

    rows: tuple[Row, ...]
    settings: Mapping[str, Mapping[str, Any]]
    counts: dict[str, int]


def read_results(folders: Sequence[str | Path]) -> Results:
    """Read every results*.jsonl of these folders.

    Where folders differ in the model or in another setting of the cache, a method's name says so:
    "snapkv (window=8)"; where they differ in the seed, a document's does.

    Raises:
      ValueError: no folder, one without settings, a damaged settings file, a damaged line.
    """
    if not folders:
        raise ValueError("folders is empty, expected at least one folder that `kvjax eval` wrote")
    paths = list(dict.fromkeys(map(Path, folders)))
    settings = {path: _settings(path) for path in paths}
    found: dict[tuple, Row] = {}
    counts: Counter[str] = Counter(folders=len(paths))
    for path in paths:
        method, document = _labels(settings[path], list(settings.values()))
        for file in sorted(path.glob("results*.jsonl")):
            rows, half = _rows(file)
            counts.update(files=1, half_written=half)
            for row in rows:
                row = replace(row, method=row.method + method, document=row.document + document)
                counts["duplicates"] += row.key in found
                found[row.key] = row
    unique = tuple(found[key] for key in sorted(found))
    counts.update(rows=len(unique), failed=sum(row.error is not None for row in unique))
    names = ("folders", "files", "rows", "failed", "duplicates", "half_written")
    return Results(
        rows=unique,
        settings={str(path): settings[path] for path in paths},
        counts={name: counts[name] for name in names},
    )


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}, expected a folder that `kvjax eval` wrote")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML ({error})") from None


def _labels(mine: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What to add to the names of a folder's methods and of its documents."""

    def differs(name: str) -> bool:
        return len({json.dumps(other.get(name), default=str) for other in each}) > 1

    said = [f"{name}={_short(mine.get(name))}" for name in _VARIANTS if differs(name)]
    method = f" ({', '.join(said)})" if said else ""
    return method, f" (seed={mine.get(_DRAW, 0)})" if differs(_DRAW) else ""


def _short(value: Any) -> str:
    return "default" if value is None else str(value).rstrip("/").rsplit("/", 1)[-1]


def _rows(path: Path) -> tuple[list[Row], int]:
    """Rows of a file, and whether (1 or 0) its last line was not whole."""
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        place = f"{path}: line {number}"
        try:
            value = json.loads(line)
        except ValueError:
            raise ValueError(f"{place} is damaged, expected a JSON object") from None
        rows.append(_row(value, place))
    return rows, int(bool(last))


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is damaged, expected a JSON object")
    facts = value.get("facts")
    depth: Any = facts.get("depth") if isinstance(facts, dict) else None
    answers = value.get("answers") or []
    texts = {name: _text(value, name, place) for name in _TEXTS}
    optional: dict[str, Any] = {
        name: None if value.get(name) is None else str(value[name])
        for name in ("prediction", "metric", "error")
    }
    return Row(
        **texts,
        **optional,
        length=int(_number(value, "length", place, needed=True) or 0),
        prompt_tokens=_whole(value, "prompt_tokens", place),
        answers=tuple(map(str, answers)) if isinstance(answers, list) else (str(answers),),
        score=_number(value, "score", place, most=1.0),
        nll=_number(value, "nll", place),
        kept_LK=_kept(value.get("kept_LK"), place),
        bytes=_whole(value, "bytes", place),
        full_bytes=_whole(value, "full_bytes", place),
        seconds=_number(value, "seconds", place),
        depth=float(depth) if type(depth) in (int, float) and 0 <= depth <= 1 else None,
    )


def _text(value: Mapping[str, Any], name: str, place: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{place}: {name} is {text!r}, expected a text")
    return text


def _number(
    value: Mapping[str, Any], name: str, place: str, *, needed: bool = False, most: float = math.inf
) -> float | None:
    """A number of at least 0, or None where it is not needed."""
    number: Any = value.get(name)
    if number is None and not needed:
        return None
    if type(number) not in (int, float) or not math.isfinite(number) or not 0 <= number <= most:
        expected = "a number of at least 0" if most == math.inf else f"a number from 0 to {most:g}"
        raise ValueError(f"{place}: {name} is {number!r}, expected {expected}")
    return float(number)


def _whole(value: Mapping[str, Any], name: str, place: str) -> int | None:
    number = _number(value, name, place)
    return None if number is None else round(number)


def _kept(value: Any, place: str) -> np.ndarray | None:
    if value is None:
        return None
    try:
        kept = np.array(value, np.int32)
    except (ValueError, TypeError, OverflowError):
        kept = np.zeros(0, np.int32)
    if kept.ndim != 2 or not kept.size:
        raise ValueError(f"{place}: kept_LK is damaged, expected a list of integers for each layer")
    return kept
