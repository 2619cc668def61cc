"""Read users' files; every complaint names the file, and the line if there is one."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Sample = str | list[int]  # a text, or token ids


def read_text(path: str) -> str:
    """The whole file as it is, but for a byte order mark.

    Raises:
      ValueError: not UTF-8.
      OSError: it cannot be read.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}, byte {error.start})") from None


def read_prompts(path: str) -> dict[str, list[int]]:
    """Token ids, one prompt a line, by the line's place."""
    return {place: _prompt(line, place) for place, line in _lines(path)}


def read_documents(path: str) -> dict[str, tuple[list[int], int]]:
    """(tokens, prefix) of each JSON line {"tokens": [...], "prefix": n}, by the line's place."""
    return {place: _document(_parse(line, place), place) for place, line in _lines(path)}


def read_samples(path: str) -> dict[str, Sample]:
    """The prompt of each JSON line {"prompt": "text"} or {"tokens": [...]}, by the line's place."""
    return {place: _sample(_parse(line, place), place) for place, line in _lines(path)}


def read_images(path: str) -> list[list[str]] | None:
    """The files of "images" of each JSON line, relative to this one; None where no line has any."""
    images = [_images(_parse(line, place), place, path) for place, line in _lines(path)]
    return images if any(images) else None


def check_vocabulary(tokens: Sequence[int], place: str, vocab_size: int) -> None:
    """Raise ValueError where an id is not in 0 .. vocab_size - 1."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{place}: token id {token} is outside the vocabulary,"
                f" expected 0 to {vocab_size - 1}"
            )


def check_length(tokens: Sequence[int], place: str, context: int) -> None:
    """Raise ValueError where a prompt is longer than the model's context."""
    if len(tokens) > context:
        raise ValueError(
            f"{place} has {len(tokens)} tokens, expected at most the model's context of {context}"
        )


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """Each line with its place, "FILE line N"; empty lines at the end are left out."""
    text = read_text(path).rstrip()
    if not text:
        raise ValueError(f"{path} is empty, expected at least one line")
    for number, line in enumerate(text.split("\n"), start=1):
        yield f"{path} line {number}", line.strip()


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error})") from None


def _prompt(line: str, place: str) -> list[int]:
    if line.startswith("["):
        return _ids(_parse(line, place), place)
    try:
        ids = [int(word) for word in line.replace(",", " ").split()]
    except ValueError:
        raise ValueError(
            f"{place} is {_shortened(line)}, expected token ids separated by spaces or commas,"
            " or a JSON list of them"
        ) from None
    return _ids(ids, place)


def _document(value: Any, place: str) -> tuple[list[int], int]:
    if not isinstance(value, dict) or not {"tokens", "prefix"} <= value.keys():
        raise ValueError(f'{place}, expected an object with "tokens" and "prefix"')
    tokens, prefix = _ids(value["tokens"], f'{place}: "tokens"'), value["prefix"]
    if type(prefix) is not int or not 1 <= prefix < len(tokens):
        raise ValueError(
            f'{place}: "prefix" is {_shortened(prefix)}, expected an integer of at least 1 and'
            f" below its {len(tokens)} tokens"
        )
    return tokens, prefix


def _sample(value: Any, place: str) -> Sample:
    if not isinstance(value, dict) or len({"prompt", "tokens"} & value.keys()) != 1:
        raise ValueError(f'{place}, expected an object with either "prompt" or "tokens"')
    if "tokens" in value:
        return _ids(value["tokens"], f'{place}: "tokens"')
    text = value["prompt"]
    if not isinstance(text, str) or not text:
        raise ValueError(
            f'{place}: "prompt" is {_shortened(text)}, expected a text that is not empty'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{place}: "prompt" is not valid Unicode ({error.reason})') from None
    return text


def _images(value: Any, place: str, path: str) -> list[str]:
    names = value.get("images", []) if isinstance(value, dict) else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{place}: "images" is {_shortened(names)}, expected a list of files')
    return [str(Path(path).parent / name) for name in names]


def _ids(value: Any, place: str) -> list[int]:
    """`value` if it is a list of at least one integer."""
    if not isinstance(value, list) or any(type(token) is not int for token in value):
        raise ValueError(f"{place} is {_shortened(value)}, expected a list of token ids")
    if not value:
        raise ValueError(f"{place} is empty, expected at least one token id")
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
