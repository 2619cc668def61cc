"""Checkpoints by their name on the Hugging Face hub: the files that are read, and no others.

huggingface_hub does the transfer: its cache, its token, its offline mode and its endpoint
(`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`) are those of transformers.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, errors, snapshot_download, utils

from kvjax.models.checkpoints.checks import bin_hint

# What ends like a file is a path.
_NAME = re.compile(r"[\w.-]*\w[\w.-]*/[\w.-]*\w[\w.-]*(?<!\.gguf)(?<!\.safetensors)")
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SMALL = (
    _CONFIG, _INDEX, "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json",
    "chat_template.jinja",
)  # fmt: skip
# Seconds that the hub may take to say what a repository holds. A transfer has huggingface_hub's own
# limit, `HF_HUB_DOWNLOAD_TIMEOUT`.
_TIMEOUT = 10


def local_folder(
    model: str | Path,
    revision: str | None = None,
    *,
    progress: bool = True,
    endpoint: str | None = None,
) -> Path:
    """The folder of a checkpoint: itself, or where the hub's files of that name are.

    What is missing in the cache is fetched: configs, the tokenizer's and the image processor's
    files, and safetensors. A file takes its place once it is whole.

    Args:
      model: a path, which wins where it exists, or `org/name`.
      revision: branch, tag or commit on the hub; its main branch by default.
      progress: whether to show huggingface_hub's bars on stderr.
      endpoint: of the hub; `HF_ENDPOINT`'s by default.

    Returns:
      The folder. A path that does not exist is returned as it is, unless it has the form of a name.

    Raises:
      ValueError: a revision beside a path; a name or a revision that the hub does not have or does
        not show; a hub that cannot be reached, or does not answer, while files are missing; a
        repository without safetensors.
    """
    if Path(model).exists() or not (isinstance(model, str) and _NAME.fullmatch(model)):
        if revision is not None:
            raise ValueError(f"revision={revision!r} beside the path {str(model)!r}, expected none")
        return Path(model)
    api = HfApi(endpoint=endpoint)
    with _silent(progress):
        try:
            found = api.model_info(model, revision=revision, timeout=_TIMEOUT)
        except Exception as error:  # of whichever HTTP client huggingface_hub is built on
            return _cached(model, revision, error)
        names = [file.rfilename for file in found.siblings or ()]
        _check_files(names, model, revision)
        try:
            return _fetched(api, model, revision, str(found.sha), names)
        except Exception as error:
            if isinstance(error, errors.RepositoryNotFoundError):  # a gated one shows its names
                _refuse(error, model, revision)
            raise ValueError(
                f"{_named(model, revision)} could not be fetched, what came whole is kept"
                f" ({_told(error)})"
            ) from None


def _check_files(names: Sequence[str], model: str, revision: str | None) -> None:
    """Raise ValueError where a repository holds no config or no safetensors."""
    named = _named(model, revision)
    if _CONFIG not in names:
        raise ValueError(f"{named} has no {_CONFIG} on the hub, expected a model")
    if not {_WEIGHTS, _INDEX} & set(names):
        raise ValueError(f"{named} has no {_WEIGHTS} on the hub{bin_hint(names, model)}")


def _fetched(
    api: HfApi, model: str, revision: str | None, commit: str, names: Sequence[str]
) -> Path:
    """The folder of a repository that holds these files, once all that are needed are there."""

    def fetch(name: str, at: str | None = commit) -> Path:
        return Path(api.hf_hub_download(model, name, revision=at))

    # By the revision's own name, so that the cache knows its commit when the hub is out of reach.
    folder = fetch(_CONFIG, revision).parent
    for name in _SMALL:
        if name in names and name != _CONFIG:
            fetch(name)
    for name in [_WEIGHTS] if _WEIGHTS in names else _shards(folder / _INDEX):
        fetch(name)
    return folder


def _cached(model: str, revision: str | None, error: Exception) -> Path:
    """The folder in the cache, if it is complete, as the hub said no or cannot be asked."""
    named = _named(model, revision)
    try:
        found = snapshot_download(model, revision=revision, local_files_only=True)
    except Exception:
        if _is_answer(error):
            _refuse(error, model, revision)
        raise ValueError(
            f"{named} is no folder here, not in the cache, and the hub cannot be asked"
            f" ({_told(error)})"
        ) from None
    folder = Path(found)
    weights = [_WEIGHTS]
    if not (folder / _WEIGHTS).is_file() and (folder / _INDEX).is_file():
        weights = _shards(folder / _INDEX)
    for name in (_CONFIG, *weights):
        if not (folder / name).is_file():
            raise ValueError(
                f"{named} lacks {name} in the cache, and the hub cannot be asked ({_told(error)})"
            )
    return folder


def _shards(index: Path) -> list[str]:
    """The files that an index names; of one that is damaged `load` itself complains."""
    try:
        return sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _is_answer(error: Exception) -> bool:
    """Whether the hub answered, and not with a fault of its own."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, errors.HFValidationError) or (status is not None and status < 500)


def _refuse(error: Exception, model: str, revision: str | None) -> NoReturn:
    if isinstance(error, errors.RevisionNotFoundError):
        reason = f"revision={revision!r} is not one of model {model!r} on the hub"
    elif isinstance(error, errors.GatedRepoError):
        reason = f"model {model!r} is gated: ask for access on its page, and set HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = f"model {model!r} is no folder here, and no public model on the hub"
        reason += " (a private one needs HF_TOKEN)"
    else:
        reason = f"{_named(model, revision)} is refused by the hub ({_told(error)})"
    raise ValueError(reason) from None


def _named(model: str, revision: str | None) -> str:
    return f"model {model!r}" + ("" if revision is None else f" at revision={revision!r}")


def _told(error: Exception) -> str:
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def _silent(progress: bool) -> Iterator[None]:
    """huggingface_hub without its log, and without bars where none are wanted."""
    tools: Any = utils
    verbosity, hidden = tools.logging.get_verbosity(), tools.are_progress_bars_disabled()
    tools.logging.set_verbosity_error()
    if not (progress or hidden):
        tools.disable_progress_bars()
    try:
        yield
    finally:
        tools.logging.set_verbosity(verbosity)
        if not (progress or hidden):
            tools.enable_progress_bars()
