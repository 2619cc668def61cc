"""Read files of tasks; every complaint names the file, and the line if there is one."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 file (a byte order mark aside), unzipped where its name ends in .gz.

    Raises:
      ValueError: neither UTF-8 nor, for that name, gzip.
      OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        if str(path).endswith(".gz"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}, byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a gzip file ({error})") from None


def read_json(path: str | Path) -> Any:
    """The value that a JSON file holds.

    Raises:
      ValueError: not JSON.
      OSError: it cannot be read.
    """
    return _parse(read_text(path), str(path))


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JSON object of a file with one a line, after its place, "FILE line N".

    Raises:
      ValueError: no line, a line that is not a JSON object.
      OSError: the file cannot be read.
    """
    text = read_text(path).rstrip()
    if not text:
        raise ValueError(f"{path} is empty, expected at least one line")
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{path} line {number}"
        row = _parse(line, place)
        if not isinstance(row, dict):
            raise ValueError(f"{place} is {shortened(row)}, expected a JSON object")
        yield place, row


def text_of(row: Mapping[str, Any], name: str, place: str) -> str:
    """The text at `name`; "FILE line N" in complaints is `place`."""
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f'{place}: "{name}" is {shortened(value)}, expected a text')
    return value


def texts_of(row: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    """The list of texts or whole numbers at `name`, at least one of them, as texts."""
    value = row.get(name)
    kinds = (str, int)
    if not isinstance(value, list) or not value or any(type(one) not in kinds for one in value):
        raise ValueError(
            f'{place}: "{name}" is {shortened(value)}, expected a list of at least one text'
        )
    return tuple(map(str, value))


def list_of(row: Any, name: str, place: str) -> list[Any]:
    """The list at `name` of a JSON object."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, list):
        raise ValueError(f'{place}: "{name}" is {shortened(value)}, expected a list')
    return value


def shortened(value: Any) -> str:
    """A value as a complaint shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error})") from None
