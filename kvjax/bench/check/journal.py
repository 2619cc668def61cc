"""Keep the results of parts: `results.jsonl`, written part by part, and a summary."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.bench.check.part import Part
from kvjax.eval.journal import repair

PASSED, FAILED = "passed", "failed"
NAME = "results.jsonl"


class Journal:
    """A folder's results; what was written before is read, a last line cut short is dropped.

    Args:
      folder: made where it is missing.
      settings: what the results are of; a folder with others is refused.

    Attributes:
      rows: the last row of each part, by name.

    Raises:
      ValueError: results of other settings, or a folder that cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.path = folder / NAME
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            repair(self.path)
            lines = self.path.read_text().splitlines() if self.path.exists() else []
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written ({error.strerror})") from None
        first, *rows = map(json.loads, lines or [json.dumps(settings)])
        if first != settings:
            raise ValueError(
                f"--out {folder} holds results of {first}, expected a new folder, or one of"
                f" {dict(settings)}"
            )
        if not lines:
            self._append(settings)
        self.rows = {row["part"]: row for row in rows}

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a part's row; it is on the disk when this returns."""
        self._append(row)
        self.rows[row["part"]] = dict(row)

    def _append(self, row: Mapping[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def waiting(self, parts: Sequence[Part]) -> list[Part]:
        """Parts without a result, then those that failed."""
        new = [part for part in parts if part.name not in self.rows]
        failed = [part for part in parts if self.result(part) == FAILED]
        return new + failed

    def result(self, part: Part) -> str | None:
        """PASSED, FAILED, or None."""
        return self.rows.get(part.name, {}).get("result")


def told(row: Mapping[str, Any]) -> str:
    """What a row found, in one line."""
    return row.get("error") or row.get("found", {}).get("shown", "")


def summary(journal: Journal, parts: Sequence[Part]) -> str:
    """A table of all parts, and how many passed."""
    lines = ["| part | result | s | found |", "|---|---|---|---|"]
    for part in parts:
        row = journal.rows.get(part.name, {})
        seconds = f"{row['seconds']:.0f}" if row else ""
        what = told(row).replace("|", "/")
        lines.append(f"| {part.name} | {row.get('result', 'not run')} | {seconds} | {what} |")
    counted = Counter(journal.result(part) for part in parts)
    devices = sorted({row["device"] for row in journal.rows.values() if row.get("device")})
    ended = f"{counted[PASSED]} of {len(parts)} parts passed, {counted[FAILED]} failed"
    if counted[None]:
        ended += f", {counted[None]} not run: the same command goes on there"
    return "\n".join(lines) + f"\n\n{' and '.join(devices) or 'no device'}: {ended}.\n"
