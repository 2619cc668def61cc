"""Run `kvjax plan --rows`: how many requests a server answers at once; slow imports come late."""

import argparse
import json
from pathlib import Path
from typing import Any

from kvjax.config import Recompress, parse_budget
from kvjax.spelling import parse_method, parse_methods

_HEADER = """# Rows that fit

Written by `{command}`; the JSON beside it has all digits.
Requests that a server answers at once on one device in bf16, of prompts of so many tokens with
answers of {new}. Nothing on this page has run.

- Weights, tails and pages follow from shapes, as `kvjax.serve` divides its memory: a request is
  admitted when there are pages for all that it can come to hold.
- Reading one prompt is an estimate from shapes times {allowance}, which is more than any compiled
  program of [plan.md](plan.md) needs, and what is kept of the prompt before it has pages.
- A decode step needs three arrays of logits in fp32 and the tables of pages, for every row.
- Of a GPU's memory 1 GiB is left alone; of a TPU's what its compiler refuses.
- *Kept* are entries a head. *Answers* are kept whole behind them, or compressed together with them
  every so many tokens, back to as many entries.

"""


def run(arguments: argparse.Namespace) -> None:
    """Print the table, and write it with its JSON where `--out` says."""
    from kvjax.plan import served

    fits = [served.fit(serving) for serving in _asked(arguments)]
    text, found = served.table(fits), {"rows": [served.as_json(one) for one in fits]}
    if arguments.out is not None:
        header = _HEADER.format(
            command=_command(arguments), new=arguments.new, allowance=served.ALLOWANCE
        )
        write(Path(arguments.out), header + text, found)
    print(text)
    if arguments.json:
        print(json.dumps(found))


def _asked(arguments: argparse.Namespace) -> list[Any]:
    from kvjax.plan.served import Serving
    from kvjax.plan.table import model_config
    from kvjax.plan.topology import CARDS, TOPOLOGIES

    for name in ("model", "topology"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is missing, expected it beside --rows")
    prompts = arguments.rows.split(",")
    if not all(prompt.isdecimal() and int(prompt) for prompt in prompts):
        raise ValueError(f"--rows {arguments.rows}, expected lengths of prompts, as in 500,4000")
    chips = {**TOPOLOGIES, **CARDS}
    one = [name for name, chip in chips.items() if chip.devices == 1]
    for name in arguments.topology.split(","):
        if name not in one:
            raise ValueError(f"--topology {name}, expected one device: {', '.join(one)}")
    config = model_config(arguments.model, max(map(int, prompts)) + arguments.new)
    found = []
    for name in arguments.topology.split(","):
        for method in parse_methods(arguments.methods):
            compression = parse_method(method, parse_budget(arguments.budget))
            for rule in _rules(arguments, compression):
                found += [
                    Serving(
                        name=Path(arguments.model).name, model=config, chip=chips[name],
                        prompt=int(prompt), new_tokens=arguments.new, compression=compression,
                        recompress=rule,
                    )
                    for prompt in prompts
                ]  # fmt: skip
    return found


def _rules(arguments: argparse.Namespace, compression: Any) -> list[Recompress | None]:
    """Answers kept whole, and compressed where that is asked for and the method compresses."""
    every, budget = arguments.recompress_every, compression.budget
    if every is None or not compression.compresses:
        return [None]
    if not isinstance(budget, int):
        raise ValueError(
            f"--budget {arguments.budget} beside --recompress-every, expected a number of entries"
        )
    return [None, Recompress(every=every, budget=budget)]


def _command(arguments: argparse.Namespace) -> str:
    every = arguments.recompress_every
    flags = [f"--rows {arguments.rows}", f"--model {arguments.model}"]
    flags += [f"--topology {arguments.topology}", f"--methods {arguments.methods}"]
    flags += [f"--budget {arguments.budget}", f"--new {arguments.new}"]
    flags += [] if every is None else [f"--recompress-every {every}"]
    return f"kvjax plan {' '.join(flags)} -o {arguments.out}"


def write(out: Path, text: str, found: dict[str, Any]) -> None:
    """The table and the JSON beside it, each whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (out, text),
        (out.with_suffix(".json"), json.dumps(found, indent=1) + "\n"),
    ):
        part = path.with_name(path.name + ".part")
        part.write_text(content, encoding="utf-8")
        part.replace(path)
