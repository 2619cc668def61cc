"""Turn flags into a CompressionConfig, and a config into words."""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, Literal

from kvjax.calibrate import read_profile
from kvjax.compression.row_budgets import largest
from kvjax.config import CompressionConfig, Recompress, parse_budget
from kvjax.generation.sampling import Sampling
from kvjax.generation.suggestion import chosen, suggestion
from kvjax.inputs.chat import check_template_args
from kvjax.model_interface import Model

_OPTIONAL = (
    "window", "pooling", "kernel", "floor", "beta", "head_cap", "group", "reduce", "layout",
    "quantize", "sinks", "recent", "chunk",
)  # fmt: skip


def compression(arguments: argparse.Namespace) -> CompressionConfig:
    """The config that the flags of compression ask for; what is not given has its default."""
    given = {name: getattr(arguments, name) for name in _OPTIONAL}
    settings = {name: value for name, value in given.items() if value is not None}
    if arguments.profile is not None:
        settings["profile"] = read_profile(arguments.profile)
    budget = None if arguments.budget is None else parse_budget(arguments.budget)
    return CompressionConfig.named(arguments.method, budget=budget, **settings)


def recompression(arguments: argparse.Namespace) -> Recompress | None:
    """What the flags of compression while decoding ask for."""
    names = "every", "budget", "scorer", "layers"
    given = {name: getattr(arguments, f"recompress_{name}") for name in names}
    settings = {name: value for name, value in given.items() if value is not None}
    if settings and "every" not in settings:
        raise ValueError(f"--recompress-{next(iter(settings))} needs --recompress-every N")
    return Recompress(**settings) if settings else None


def sampling(arguments: argparse.Namespace) -> Sampling | Literal["model"] | None:
    """How the flags of the answer ask tokens to be drawn; None where none of them is given."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    given = {name: getattr(arguments, name) for name in names}
    settings = {name: value for name, value in given.items() if value is not None}
    if arguments.sampling is None:
        return Sampling(**settings) if settings else None
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} {value} beside --sampling model, expected one of the two")
    return arguments.sampling


def drawn_by(asked: Sampling | Literal["model"] | None, model: Model) -> Sampling:
    """The rules that flags ask for; a line on stderr says what the checkpoint suggests, or not.

    It is said where no flag says how to draw, and where `--sampling model` finds no suggestion: a
    GGUF file has none.

    Raises:
      ValueError: as of `kvjax.generation.suggestion.chosen`.
    """
    stated = model.config.stated_sampling
    found = suggestion(stated) if asked is None else None
    if found is not None:
        line = f"the checkpoint suggests {found}; greedy is used, --sampling model follows it"
        print(line, file=sys.stderr, flush=True)
    rules = chosen(asked, stated)
    if asked == "model" and rules == Sampling():
        line = "--sampling model: the checkpoint suggests nothing; greedy is used"
        print(line, file=sys.stderr, flush=True)
    return rules


def loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags of a model come to as keywords of `kvjax.load`.

    From here on transformers keeps to itself that a text is longer than its tokenizer expects.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return {
        "revision": arguments.revision,
        "dtype": arguments.dtype,
        "progress": sys.stderr.isatty(),
        "max_context": arguments.max_context,
    }


def template_args(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a chat template, NAME=VALUE each; values are JSON, or text as it is.

    Raises:
      ValueError: one without a name.
    """
    found: dict[str, Any] = {}
    for given in arguments.template_arg:
        name, equals, value = given.partition("=")
        if not (name and equals):
            raise ValueError(f"--template-arg {given!r}, expected NAME=VALUE")
        check_template_args([name])
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def resolved(config: CompressionConfig, lengths: Sequence[int]) -> dict[str, Any]:
    """`config` as a dictionary, with the window that the longest prompt gets.

    Args:
      lengths: tokens of each prompt.
    """
    window = largest(config, max(lengths)).window if _observes(config) else None
    return dataclasses.asdict(config) | {"window": window}


def announce(config: CompressionConfig, lengths: Sequence[int]) -> None:
    """One line on stderr: the method and those of its settings that have an effect."""
    shown = resolved(config, lengths)
    if isinstance(config.budget, float):
        shown["budget"] = f"{100 * config.budget:g}%"
    if _observes(config):
        # It grows with the budget, and that with the prompt.
        least, most = (largest(config, end(lengths)).window for end in (min, max))
        shown["window"] = most if least == most else f"{least}..{most}"
    if config.profile is not None:
        shown["profile"] = f"{len(config.profile)} layers"
    pooled = config.compresses and config.scorer == "window"
    effective = {
        "method": True,
        "budget": config.budget is not None,
        "window": _observes(config),
        "sinks": config.compresses and config.sinks > 0,
        "recent": config.compresses and config.recent != "window",
        "chunk": config.chunk > 1,
        "reduce": pooled,
        "pooling": pooled,
        "kernel": pooled and config.pooling != "none",
        "group": pooled or (config.compresses and config.scorer == "accumulated"),
        "floor": config.compresses and config.heads == "ada",
        "head_cap": config.head_cap is not None,
        "beta": config.compresses and config.layers == "pyramid",
        "profile": config.profile is not None,
        "layout": config.layout is not None,
        "quantize": config.quantize is not None,
    }
    line = " ".join(f"{name}={shown[name]}" for name, shows in effective.items() if shows)
    print(line, file=sys.stderr, flush=True)


def _observes(config: CompressionConfig) -> bool:
    return config.compresses and config.uses_window
