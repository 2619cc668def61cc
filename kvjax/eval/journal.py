"""Write results to disk: one JSON line for each example, whole or absent, never twice.

    OUT/config.toml          the settings that made them
    OUT/results-00000.jsonl  one line an example, of the first team of processes

A run that was killed is run again with the same command: it reads what is there, drops a last line
that is not whole, and does the rest.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.toml"
# What tells an example from every other.
KEY = ("task", "length", "protocol", "method", "budget", "document", "ask")


def key_of(row: Mapping[str, Any]) -> tuple:
    """What tells a row from every other."""
    return tuple(row[name] for name in KEY)


class Journal:
    """The results file of one team; a context manager.

    Args:
      folder: made where it is missing.
      settings: the text of the settings file; a folder of other settings is refused.
      team: its number.
      writes: whether this process of the team writes; the others only remember what is done.
    """

    def __init__(self, folder: str | Path, settings: str, team: int = 0, *, writes: bool = True):
        self.folder = Path(folder)
        self.path = self.folder / f"results-{team:05}.jsonl"
        self.done: set[tuple] = set()
        self._file = None
        if writes:
            _claim(self.folder, settings, team)
            repair(self.path)
            # What any team has finished need not be done again, whatever their number was then.
            self.done = {key_of(row) for row in read_rows([self.folder])}
            self._file = open(self.path, "ab")  # noqa: SIM115 (closed by close)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows that are not there yet; they are on the disk when this returns."""
        lines = b""
        for row in rows:
            if (key := key_of(row)) not in self.done:
                self.done.add(key)
                lines += json.dumps(row, ensure_ascii=False).encode() + b"\n"
        if self._file is not None:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_rows(folders: Iterable[str | Path]) -> Iterator[dict[str, Any]]:
    """Rows of all processes in these folders; a last line that is not whole is left out.

    Raises:
      ValueError: a folder without results, or a damaged line; names file and line.
    """
    for folder in map(Path, folders):
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} has no {CONFIG}, expected a folder that `kvjax eval` wrote")
        for path in sorted(folder.glob("results*.jsonl")):
            *lines, _ = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    key_of(row)
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{path}: line {number} is damaged, expected a row") from None
                yield row


def _claim(folder: Path, settings: str, team: int) -> None:
    """Make the folder this run's, or find that it is."""
    config = folder / CONFIG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not config.exists():
            if any(folder.iterdir()) and team == 0 and not any(folder.glob("results*.jsonl")):
                raise ValueError(f"--out {folder} has other files in it, expected a new folder")
            part = folder / f"{CONFIG}.{team}.part"
            part.write_text(settings, encoding="utf-8")
            os.replace(part, config)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written ({error.strerror})") from None
    if config.read_text(encoding="utf-8-sig") != settings:
        raise ValueError(
            f"--out {folder} holds results of other settings ({config}), expected a new folder"
        )


def repair(path: Path) -> None:
    """Cut off a last line that a kill left half-written."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
