"""List failed examples, and a sample of wrong answers."""

import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kvjax.eval.report.read import Row

_WRONG = 0.5  # a score below this
_EACH = 3  # wrong answers of a method at a budget
_MOST = 200  # of either list
_CHARACTERS = 300


def failures(rows: Sequence[Row]) -> dict[str, Any]:
    """Answers that failed ("errors", the first ones) and some that were wrong ("wrong").

    The sample is the same for the same rows, and no more than a few of a method at a budget.
    """
    failed = [row for row in rows if row.error is not None]
    wrong = [
        row for row in rows if row.error is None and row.score is not None and row.score < _WRONG
    ]
    by_cell: dict[tuple, list[Row]] = defaultdict(list)
    for row in sorted(wrong, key=_shuffled):
        by_cell[row.method, row.budget].append(row)
    # Rank by rank, so that the limit falls on all methods alike.
    sample = [mine[rank] for rank in range(_EACH) for mine in by_cell.values() if rank < len(mine)][
        :_MOST
    ]
    return {
        "errors": [_named(row) | {"error": _clip(row.error)} for row in failed[:_MOST]],
        "wrong": [
            _named(row)
            | {
                "prediction": _clip(row.prediction),
                "answers": [_clip(answer) for answer in row.answers[:5]],
                "score": round(row.score or 0.0, 4),
            }
            for row in sorted(sample, key=lambda row: row.key)
        ],
    }


def _named(row: Row) -> dict[str, Any]:
    return {
        "protocol": row.protocol,
        "method": row.method,
        "budget": row.budget,
        "task": row.task,
        "length": row.length,
        "ask": row.ask,
    }


def _shuffled(row: Row) -> tuple:
    return zlib.crc32("\x1f".join(map(str, row.key)).encode()), row.key


def _clip(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}…"
