"""Checks of a checkpoint's files: each names the key, its value and what was expected."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def expect(condition: bool, name: str, expected: str, value: Any) -> None:
    """Raise ValueError, "NAME must be EXPECTED, got VALUE", unless the condition holds."""
    if not condition:
        got = repr(value)
        got = got if len(got) <= 200 else f"{got[:200]}..."
        raise ValueError(f"{name} must be {expected}, got {got}")


def is_int(value: Any, least: int) -> bool:
    """Whether a value is an integer (no bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def positive_int(name: str, value: Any) -> int:
    """The value, an integer of at least 1."""
    expect(is_int(value, 1), name, "a positive integer", value)
    return value


def positive_float(name: str, value: Any) -> float:
    """The value as a float, finite and above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    positive = number and math.isfinite(value) and value > 0
    expect(positive, name, "a positive finite number", value)
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """The value, true or false."""
    expect(isinstance(value, bool), name, "true or false", value)
    return value


def token_id(name: str, value: Any) -> int:
    """The value, an integer of at least 0."""
    # No upper bound: published models with a cut vocabulary keep the ids of the full one.
    expect(is_int(value, 0), name, "a token id (an integer >= 0)", value)
    return value


def optional_token_id(name: str, value: Any) -> int | None:
    """The value, an integer of at least 0 or None."""
    return None if value is None else token_id(name, value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A token id, several in a list, or None for none, as a tuple."""
    listed = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple(token_id(name, token) for token in listed)


def check_fields(config: Any) -> None:
    """Check every field of a dataclass that is given and whose type is int, float or bool alone."""
    checks = {int: positive_int, float: positive_float, bool: boolean}
    for field in dataclasses.fields(config):
        if field.type in checks and field.init:
            checks[field.type](field.name, getattr(config, field.name))


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put the file's name before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds, a byte order mark aside."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    expect(isinstance(value, dict), "the file", "a JSON object", value)
    return value


def bin_hint(names: Iterable[str], model: str) -> str:
    """What to do where a checkpoint's files are PyTorch's alone; nothing where they are not."""
    found = [name for name in names if re.fullmatch(r"pytorch_model.*\.bin", Path(name).name)]
    if not found:
        return ""
    return (
        f"; {min(found)} is not read, convert it with transformers:"
        f" AutoModelForCausalLM.from_pretrained({model!r}).save_pretrained(FOLDER)"
    )
