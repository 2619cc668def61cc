"""Turn rows into the report's numbers: plain dictionaries and lists, as JSON holds them.

A cell is a method at a budget. Each measure ("score", the more the better; "nll", nats a token, the
less the better) of each protocol has a grid: a row a cell, a column a question.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kvjax.eval.report.failures import failures
from kvjax.eval.report.read import Results, Row
from kvjax.eval.report.stats import DRAWS, Estimate, estimates
from kvjax.methods import METHODS

MEASURES = ("score", "nll")
FULL = "full"
# The method that others are compared with at first: the first of these that there is.
_BASES = ("ada-snapkv", "snapkv", FULL)
_DEPTHS = 11  # more different ones are rounded to tenths
Cell = tuple[str, str]


def tabulate(results: Results) -> dict[str, Any]:
    """Every number of the report.

    Returns:
      Names ("methods", "budgets", "tasks", "protocols", "lengths", "measures", "base"), "counts",
      "notes", "settings", and lists of records: "quality", "cells", "paired", "needles", "shares",
      "errors", "wrong". A length of None stands for all lengths together.
    """
    rows = results.rows
    methods = sorted({row.method for row in rows}, key=_method_order)
    grids = [
        grid
        for protocol in sorted({row.protocol for row in rows})
        for measure in MEASURES
        if (grid := _grid(rows, protocol, measure)) is not None
    ]
    tables: dict[str, Any] = {
        "methods": methods,
        "budgets": sorted({row.budget for row in rows}, key=_budget_order),
        "tasks": sorted({row.task for row in rows}),
        "protocols": sorted({row.protocol for row in rows}),
        "lengths": sorted({row.length for row in rows}),
        "measures": [name for name in MEASURES if any(grid.measure == name for grid in grids)],
        "base": next((name for name in (*_BASES, *methods) if name in methods), None),
        "draws": DRAWS,
        "counts": results.counts,
        "settings": {path: dict(settings) for path, settings in results.settings.items()},
    }
    shares, odd = _shares(rows)
    tables |= {
        "notes": _notes(results, odd),
        "quality": [record for grid in grids for record in _quality(grid, rows)],
        "cells": [record for grid in grids for record in _per_task(grid)],
        "paired": [record for grid in grids for record in _paired(grid)],
        "needles": _needles(rows),
        "shares": shares,
        **failures(rows),
    }
    return tables


# ---------------------------------------------------------------------------- names
def _method_order(name: str) -> tuple:
    plain = re.split(r" \(|:", name)[0]
    known = list(METHODS)
    return (known.index(plain) if plain in known else len(known), name)


def _budget_order(budget: str) -> tuple:
    match = re.fullmatch(r"(\d+(?:\.\d*)?)(%?)", budget)
    return (match[2], float(match[1]), budget) if match else ("~", 0.0, budget)


def _cell_order(cell: Cell) -> tuple:
    return _method_order(cell[0]), _budget_order(cell[1])


# ---------------------------------------------------------------------------- grids
@dataclass(frozen=True)
class _Grid:
    """All answers of one protocol under one measure."""

    protocol: str
    measure: str
    cells: list[Cell]
    tasks: np.ndarray  # [A], as everything below
    lengths: Int[np.ndarray, " A"]
    documents: Int[np.ndarray, " A"]
    values: Float[np.ndarray, "C A"]

    def choices(self) -> Iterator[tuple[int | None, np.ndarray]]:
        """Lengths to choose from, and which columns are theirs."""
        yield None, np.ones(len(self.lengths), bool)
        lengths = np.unique(self.lengths)
        if len(lengths) > 1:
            for length in lengths:
                yield int(length), self.lengths == length


def _grid(rows: Sequence[Row], protocol: str, measure: str) -> _Grid | None:
    mine = [row for row in rows if row.protocol == protocol and getattr(row, measure) is not None]
    if not mine:
        return None
    questions = sorted({(row.task, row.length, row.document, row.ask) for row in mine})
    texts = {text: place for place, text in enumerate(dict.fromkeys(q[:3] for q in questions))}
    place = {question: column for column, question in enumerate(questions)}
    cells = sorted({(row.method, row.budget) for row in mine}, key=_cell_order)
    line = {cell: index for index, cell in enumerate(cells)}
    values = np.full((len(cells), len(questions)), np.nan)
    for row in mine:
        column = place[row.task, row.length, row.document, row.ask]
        values[line[row.method, row.budget], column] = getattr(row, measure)
    return _Grid(
        protocol=protocol,
        measure=measure,
        cells=cells,
        tasks=np.array([question[0] for question in questions]),
        lengths=np.array([question[1] for question in questions]),
        documents=np.array([texts[question[:3]] for question in questions]),
        values=values,
    )


def _rounded(estimate: Estimate) -> dict[str, Any]:
    return {
        "mean": round(estimate.mean, 6),
        "low": round(estimate.low, 6),
        "high": round(estimate.high, 6),
        "n": estimate.questions,
        "documents": estimate.documents,
    }


def _quality(grid: _Grid, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Each cell over all its tasks, beside what it holds."""
    held: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row.protocol == grid.protocol and getattr(row, grid.measure) is not None:
            for length in (None, row.length):
                held[length, row.method, row.budget].append(row)
    for length, mask in grid.choices():
        found = estimates(grid.values[:, mask], grid.tasks[mask], grid.documents[mask])
        for (method, budget), estimate in zip(grid.cells, found, strict=True):
            if estimate is not None:
                yield {
                    "protocol": grid.protocol,
                    "length": length,
                    "measure": grid.measure,
                    "method": method,
                    "budget": budget,
                    **_rounded(estimate),
                    "tasks": estimate.strata,
                    **_held(held[length, method, budget]),
                }


def _held(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """Bytes, entries and seconds of these answers."""
    sized = [row for row in rows if row.bytes is not None and row.full_bytes]
    full = sum(row.full_bytes or 0 for row in sized)
    mass = sum(row.bytes or 0 for row in sized)
    counted = [row for row in rows if row.kept_LK is not None and row.prompt_tokens]
    shares = [float(row.kept_LK.mean()) / (row.prompt_tokens or 1) for row in counted]  # type: ignore[union-attr]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    return {
        "bytes": round(mass / len(sized)) if sized else None,
        "bytes_share": round(mass / full, 6) if full else None,
        "kept_share": round(float(np.mean(shares)), 6) if shares else None,
        "seconds": round(float(np.mean(seconds)), 6) if seconds else None,
    }


def _per_task(grid: _Grid) -> Iterator[dict[str, Any]]:
    for length, mask in grid.choices():
        for task in np.unique(grid.tasks[mask]):
            columns = mask & (grid.tasks == task)
            found = estimates(grid.values[:, columns], grid.tasks[columns], grid.documents[columns])
            for (method, budget), estimate in zip(grid.cells, found, strict=True):
                if estimate is not None:
                    yield {
                        "protocol": grid.protocol,
                        "length": length,
                        "measure": grid.measure,
                        "task": str(task),
                        "method": method,
                        "budget": budget,
                        **_rounded(estimate),
                    }


def _paired(grid: _Grid) -> Iterator[dict[str, Any]]:
    """Each cell less each method's at the same budget, over the questions that both answered."""
    line = {cell: index for index, cell in enumerate(grid.cells)}
    budgets: dict[str, list[str]] = defaultdict(list)
    for method, budget in grid.cells:
        budgets[method].append(budget)
    for base, known in budgets.items():
        # The full cache has one budget, which all others are compared with.
        partner = {
            cell: cell[1] if cell[1] in known else known[0]
            for cell in grid.cells
            if cell[0] != base and (cell[1] in known or len(known) == 1)
        }
        others = [line[base, budget] for budget in partner.values()]
        gaps = grid.values[[line[cell] for cell in partner]] - grid.values[others]
        found = estimates(gaps, grid.tasks, grid.documents)
        for (method, budget), estimate in zip(partner, found, strict=True):
            if estimate is not None:
                yield {
                    "protocol": grid.protocol,
                    "measure": grid.measure,
                    "base": base,
                    "method": method,
                    "budget": budget,
                    **_rounded(estimate),
                }


# ---------------------------------------------------------------------------- needles, shares
def _grouped(rows: Iterable[Row], key: Callable[[Row], tuple]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _needles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean score by depth and length."""
    hidden = [row for row in rows if row.depth is not None and row.score is not None]
    many = {
        task
        for (task,), mine in _grouped(hidden, lambda row: (row.task,)).items()
        if len({row.depth for row in mine}) > _DEPTHS
    }

    def key(row: Row) -> tuple:
        depth = round(row.depth or 0.0, 1 if row.task in many else 6)
        return row.protocol, row.task, _cell_order((row.method, row.budget)), row.length, depth

    return [
        {
            "protocol": mine[0].protocol,
            "task": mine[0].task,
            "method": mine[0].method,
            "budget": mine[0].budget,
            "length": where[3],
            "depth": where[4],
            "mean": round(sum(row.score or 0.0 for row in mine) / len(mine), 6),
            "n": len(mine),
        }
        for where, mine in sorted(_grouped(hidden, key).items())
    ]


def _shares(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], int]:
    """Mean fraction of the prompt that each layer and head kept; rows of another shape, counted."""
    counted = [row for row in rows if row.kept_LK is not None and row.prompt_tokens]
    odd, found = 0, []
    groups = _grouped(counted, lambda row: (row.protocol, _cell_order((row.method, row.budget))))
    for _, mine in sorted(groups.items(), key=lambda item: item[0]):
        shapes = [row.kept_LK.shape for row in mine]  # type: ignore[union-attr]
        usual = max(sorted(set(shapes)), key=shapes.count)
        fractions = [
            row.kept_LK / (row.prompt_tokens or 1)
            for row in mine
            if row.kept_LK is not None and row.kept_LK.shape == usual
        ]
        odd += len(mine) - len(fractions)
        mean_LK = np.mean(fractions, axis=0)
        found.append(
            {
                "protocol": mine[0].protocol,
                "method": mine[0].method,
                "budget": mine[0].budget,
                "n": len(fractions),
                "share": [[round(float(share), 5) for share in layer] for layer in mean_LK],
            }
        )
    return found, odd


def _notes(results: Results, odd: int) -> list[str]:
    counts, rows = results.counts, results.rows
    silent = sum(row.score is None and row.nll is None and row.error is None for row in rows)
    said = {
        "half-written last lines were left out": counts["half_written"],
        "lines were replaced by a later one with the same key": counts["duplicates"],
        "answers failed and are in no mean": counts["failed"],
        "answers have neither score nor NLL": silent,
        "answers have kept_LK of another shape and are in no mean of it": odd,
    }
    return [f"{count} {words}" for words, count in said.items() if count]
