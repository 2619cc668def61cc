"""Write the report's numbers as CSV, one a row, and as Markdown."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

COLUMNS = (
    "section", "protocol", "length", "measure", "task", "method", "budget", "base", "layer", "head",
    "depth", "mean", "low", "high", "n", "documents", "bytes_share", "bytes", "kept_share",
)  # fmt: skip
_NO = "-"


# ---------------------------------------------------------------------------- CSV
def as_csv(tables: dict[str, Any]) -> str:
    """A row a number, with the columns `COLUMNS`; an empty length means all lengths."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    sections = {"quality": "quality", "cells": "task", "paired": "paired", "needles": "needle"}
    for name, section in sections.items():
        for record in tables[name]:
            task = {} if section != "quality" else {"task": ""}
            writer.writerow({"section": section} | record | task)
    for record in tables["shares"]:
        for layer, heads in enumerate(record["share"]):
            for head, share in enumerate(heads):
                place = {"section": "share", "layer": layer, "head": head, "mean": share}
                writer.writerow(record | place)
    return out.getvalue()


# ---------------------------------------------------------------------------- Markdown
def as_markdown(tables: dict[str, Any]) -> str:
    """The report without pictures; differences are to the first base alone."""
    lines = ["# kvjax report", "", _summary(tables), ""]
    lines += [f"- {note}." for note in tables["notes"]] + [""] * bool(tables["notes"])
    if not tables["methods"]:
        return "\n".join([*lines, "No results yet.", ""])
    for protocol in tables["protocols"]:
        for measure in tables["measures"]:
            for length in [None, *tables["lengths"]]:
                where = {"protocol": protocol, "measure": measure, "length": length}
                lines += _quality_table(tables, where)
            where = {"protocol": protocol, "measure": measure}
            lines += _paired_table(tables, where | {"base": tables["base"]})
        lines += _needle_tables(tables, protocol)
        lines += _share_table(tables, protocol)
    return "\n".join([*lines, *_failure_lists(tables)]) + "\n"


def _summary(tables: dict[str, Any]) -> str:
    counts = tables["counts"]
    return (
        f"{counts['rows']} answers of {len(tables['methods'])} methods to"
        f" {len(tables['tasks'])} tasks, from {counts['folders']} folder(s). Intervals: 95 %,"
        f" bootstrap over documents, {tables['draws']} draws; all tasks weigh the same."
    )


def _quality_table(tables: dict[str, Any], where: dict[str, Any]) -> Iterator[str]:
    """Rows are methods at budgets; columns what they hold, all tasks, each task."""
    cells = _matching(tables["cells"], where)
    tasks = sorted({record["task"] for record in cells})
    quality = _matching(tables["quality"], where)
    if not quality:
        return
    unit = "%" if where["measure"] == "score" else "nats a token"
    said = "all lengths" if where["length"] is None else f"length {where['length']}"
    yield from (f"## {where['measure']}, question {where['protocol']}, {said} ({unit})", "")
    by_task = {(r["method"], r["budget"], r["task"]): r for r in cells}
    heads = ["method", "budget", "bytes", "all tasks", *tasks]
    rows = [
        [
            f"`{record['method']}`",
            record["budget"],
            _percent(record["bytes_share"]),
            _cell(record, where["measure"]),
            *(
                _cell(by_task.get((record["method"], record["budget"], task)), where["measure"])
                for task in tasks
            ),
        ]
        for record in quality
    ]
    yield from _table(heads, rows)


def _paired_table(tables: dict[str, Any], where: dict[str, Any]) -> Iterator[str]:
    records = _matching(tables["paired"], where)
    if not records:
        return
    yield f"## {where['measure']} less that of `{where['base']}`, question {where['protocol']}"
    yield ""
    budgets = [name for name in tables["budgets"] if any(r["budget"] == name for r in records)]
    by_cell = {(r["method"], r["budget"]): r for r in records}
    rows = [
        [
            f"`{method}`",
            *(_cell(by_cell.get((method, name)), where["measure"], sign="+") for name in budgets),
        ]
        for method in tables["methods"]
        if any(r["method"] == method for r in records)
    ]
    yield from _table(["method", *budgets], rows)


def _needle_tables(tables: dict[str, Any], protocol: str) -> Iterator[str]:
    found = _matching(tables["needles"], {"protocol": protocol})
    for task in sorted({record["task"] for record in found}):
        mine = _matching(found, {"task": task})
        depths = sorted({record["depth"] for record in mine})
        by_place = {(r["method"], r["budget"], r["length"], r["depth"]): r for r in mine}
        yield from (f"## {task} by depth, question {protocol} (%)", "")
        rows = [
            [f"`{method}`", budget, str(length)]
            + [_share_of(by_place.get((method, budget, length, depth))) for depth in depths]
            for method, budget, length in dict.fromkeys(place[:3] for place in by_place)
        ]
        yield from _table(["method", "budget", "length", *map(str, depths)], rows)


def _share_table(tables: dict[str, Any], protocol: str) -> Iterator[str]:
    records = _matching(tables["shares"], {"protocol": protocol})
    if not records:
        return
    yield from (f"## Fraction of the prompt kept by layer, question {protocol} (%)", "")
    yield from ("Means over heads, in brackets the least and the most of a head.", "")
    layers = max(len(record["share"]) for record in records)
    rows = [
        [f"`{record['method']}`", record["budget"], *map(_layer, record["share"])]
        + [_NO] * (layers - len(record["share"]))
        for record in records
    ]
    yield from _table(["method", "budget", *(f"layer {place}" for place in range(layers))], rows)


def _failure_lists(tables: dict[str, Any]) -> Iterator[str]:
    for name, words in (("errors", "Failed"), ("wrong", "Some wrong answers")):
        if not tables[name]:
            continue
        yield from (f"## {words}", "")
        for record in tables[name]:
            what = record.get("error") or (
                f"{_quoted(record['prediction'])}, expected"
                f" {' or '.join(map(_quoted, record['answers']))}"
            )
            place = f"`{record['method']}` {record['budget']} {record['protocol']}"
            yield f"- {place}, {_flat(record['ask'])}: {_flat(what)}"
        yield ""


# ---------------------------------------------------------------------------- cells
def _matching(records: Iterable[dict[str, Any]], where: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in records if all(r[name] == value for name, value in where.items())]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (heads, ["---"] * len(heads), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def _cell(record: dict[str, Any] | None, measure: str, sign: str = "") -> str:
    if record is None:
        return _NO
    scale, digits = (100, 1) if measure == "score" else (1, 4)
    mean, low, high = (
        f"{scale * record[name]:{sign}.{digits}f}" for name in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}] n={record['n']}"


def _percent(share: float | None) -> str:
    return _NO if share is None else f"{100 * share:.1f} %"


def _share_of(record: dict[str, Any] | None) -> str:
    return _NO if record is None else f"{100 * record['mean']:.0f}"


def _layer(shares: Sequence[float]) -> str:
    mean = sum(shares) / len(shares)
    return f"{100 * mean:.1f} [{100 * min(shares):.1f}, {100 * max(shares):.1f}]"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
