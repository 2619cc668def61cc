"""Read settings files (TOML), and replace result files whole.

A settings file is flat TOML, read into a frozen dataclass: every field a key, an unknown key an
error. A result replaces the file of its name once it is whole.
"""

import dataclasses
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_settings[Kind](path: str | Path, kind: type[Kind]) -> Kind:
    """Read a file into the dataclass `kind`; a field with a default may be missing.

    A byte order mark is passed over.

    Raises:
      ValueError: not TOML, an unknown or missing key, a value of the wrong type or range.
      OSError: it cannot be read.
    """
    try:
        keys = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML ({error})") from None
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    unknown, missing = sorted(keys.keys() - fields.keys()), sorted(needed - keys.keys())
    if unknown or missing:
        which = f"unknown key {unknown[0]}" if unknown else f"missing key {missing[0]}"
        raise ValueError(f"{path}: {which}, expected {', '.join(fields)}")
    try:
        return kind(
            **{name: _typed(name, value, fields[name].type) for name, value in keys.items()}
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _typed(name: str, value: Any, kind: Any) -> Any:
    listed = kind in (tuple[int, ...], tuple[float, ...], tuple[str, ...])
    inner = kind.__args__[0] if listed else kind
    entries = value if listed and isinstance(value, list) else [value]
    allowed = (int, float) if inner is float else (inner,)
    if listed != isinstance(value, list) or not all(type(entry) in allowed for entry in entries):
        what = f"a list of {inner.__name__}" if listed else f"one {inner.__name__}"
        raise ValueError(f"{name} = {value!r}, expected {what}")
    return tuple(map(inner, entries)) if listed else inner(value)


# ---------------------------------------------------------------------------- results
@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name next to `path` to write to; it replaces `path` if the block ends without an error.

    After an error, or an interrupt, what was at `path` is as it was, and nothing is left beside it.
    """
    target, part = _target_and_part(path)
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise ValueError where `replacing(path)` could not put a file; nothing is changed."""
    target, part = _target_and_part(path)
    # A folder, or a device such as /dev/stdout, which a rename would put a file in the place of.
    if target.exists() and not target.is_file():
        raise ValueError(f"output {path} is not a file, expected the name of a file to write")
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise ValueError(
            f"output {path} cannot be written ({error.strerror}), expected a name in a folder that"
            " exists and can be written to"
        ) from None


def _target_and_part(path: str | Path) -> tuple[Path, Path]:
    target = Path(path).resolve()  # what a link points to is replaced, not the link
    # The suffix stays the last one: writers of pictures choose their format by it.
    return target, target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
