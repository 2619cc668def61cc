"""The tokenizer beside a checkpoint, read by transformers; torch is not needed."""

import codecs
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(directory: str | Path) -> Any:
    """Load the tokenizer of a folder in the layout of the Hugging Face hub.

    `transformers.AutoTokenizer` reads it, from the folder alone and without running code from it.
    Where that fails, `tokenizer.json` is read by itself, which knows no chat template and no role
    of a special token. Byte order marks, on which transformers fails, are passed over.

    Args:
      directory: the folder.

    Returns:
      A transformers tokenizer, or None where the folder has no tokenizer files.

    Raises:
      ValueError: no such folder, or damaged tokenizer files; one sentence that names the file.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"directory must be an existing folder, got {str(folder)!r}")
    if not any((folder / name).is_file() for name in _FILES):
        return None
    settings, vocabulary = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if settings.is_file():
        try:
            json.loads(settings.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{settings} is not valid JSON ({error})") from None
    with quiet_transformers() as transformers, _without_marks(folder) as clean:
        # What a damaged file raises is not documented; KeyError and bare Exception are among it.
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                clean, local_files_only=True, trust_remote_code=False
            )
            if tokenizer.chat_template is None:
                tokenizer.chat_template = _processors_template(folder)
            return tokenizer
        except Exception as error:
            reason = _one_line(error)
        if not vocabulary.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json and cannot be read without ({reason})"
            )
        try:
            file = str(clean / vocabulary.name)
            return transformers.PreTrainedTokenizerFast(tokenizer_file=file)
        except Exception as error:
            raise ValueError(
                f"{vocabulary} is not a valid tokenizer.json ({_one_line(error)})"
            ) from None


@contextlib.contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or where a text in it begins with a byte order mark a copy of its small files."""
    marked = [path for path in _texts(folder) if _begins_with_mark(path)]
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for path in [*_texts(folder), *folder.glob("*.model")]:
            if path in marked:
                (copy / path.name).write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
            else:
                shutil.copyfile(path, copy / path.name)
        yield copy


def _texts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".txt")]


def _begins_with_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def _processors_template(folder: Path) -> str | None:
    """The template that older vision-language checkpoints keep in a file of their processor's."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8-sig"))["chat_template"]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """transformers, imported without its advice to install torch, and silent until the end."""
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(verbosity)
