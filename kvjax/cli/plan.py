"""Run `kvjax plan`; slow imports come late."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvjax.cli import plan_rows

_INSTALL = "pip install kvjax[ahead]"


def add_flags(parser: argparse.ArgumentParser, whole: Callable[[int], Any]) -> None:
    """The flags of `kvjax plan`; `whole` makes a type of a least integer."""
    from kvjax.models.presets import PRESETS
    from kvjax.plan.topology import TOPOLOGIES
    from kvjax.spelling import FORM

    add = parser.add_argument
    add(
        "--config",
        action="append",
        metavar="FILE",
        help="TOML of several rows, such as configs/plan/llama.toml; repeatable, in place of the"
        " flags up to --limits",
    )
    add(
        "--model",
        metavar="M",
        help=f"a directory with config.json, a GGUF file, or {', '.join(PRESETS)}",
    )
    add("--topology", metavar="T", help=", ".join(TOPOLOGIES))
    add("--split", default="", metavar="DxM", help="parts of the batch x of the model")
    add("--batch", type=whole(1), metavar="N", help="rows (one a part of the batch)")
    add("--prompt", type=whole(1), default=8192, metavar="N", help="tokens (8192)")
    add("--new", type=whole(1), default=128, metavar="N", help="tokens of an answer (128)")
    add(
        "--methods",
        default="full,ada-snapkv",
        metavar="M,M",
        help=f"{FORM}, side by side (%(default)s)",
    )
    add("--budget", default="1024", metavar="N|P%", help="of all but full (1024)")
    add("--profile", metavar="FILE", help="PrefixKV offline, as `kvjax generate` takes it")
    add(
        "--limits",
        choices=("verified", "fit", "none"),
        default="verified",
        help="the largest batch and the longest prompt: compiled for, at most four times each, or"
        " from the row's own compilation and shapes (verified)",
    )
    add(
        "--layers",
        choices=("all", "few"),
        default="all",
        help="few: programs of two and of six layers are compiled, and their bytes continued to the"
        " model's depth; faster, near on a GPU, too much for some programs on a TPU (all)",
    )
    add("--estimate", action="store_true", help="compile nothing: everything from shapes")
    add(
        "--cache",
        default="build/plan",
        metavar="DIR",
        help="compilations are kept there, and a plan that was stopped goes on (build/plan)",
    )
    add(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="N",
        help="after so many, rows that were not compiled before are estimates (no limit)",
    )
    _server_flags(parser.add_argument_group("a server").add_argument, whole)
    add("-o", "--out", metavar="FILE.md", help="also write the table, and JSON beside it")
    add("--json", action="store_true", help="print one JSON object on the last line")


def _server_flags(add: Callable[..., Any], whole: Callable[[int], Any]) -> None:
    from kvjax.plan.topology import CARDS

    add(
        "--rows",
        metavar="N,N",
        help="in place of all that: requests that a server answers at once, of prompts of so many"
        f" tokens, on each of --topology, single devices with commas ({', '.join(CARDS)} as well)",
    )
    add(
        "--recompress-every",
        type=whole(2),
        metavar="N",
        help="also with answers that are compressed again every N tokens, to the budget",
    )


def run(arguments: argparse.Namespace) -> None:
    """`kvjax plan`."""
    if arguments.rows is not None:
        plan_rows.run(arguments)
        return
    if arguments.recompress_every is not None:
        raise ValueError("--recompress-every, expected --rows beside it")
    from kvjax.plan.rows import as_json
    from kvjax.plan.table import cost_table, markdown

    groups = _groups(arguments)
    rows = _planned(groups, arguments)
    text = markdown(rows)
    costs = cost_table(rows)
    text += (
        f"\nA decode step of one device, from shapes and as its compiler counts it.\n\n{costs}"
        if costs
        else ""
    )
    found = {"rows": [as_json(row) for row in rows]}
    if arguments.out is not None:
        _write(Path(arguments.out), text, found, arguments)
    print(text)
    if arguments.json:
        print(json.dumps(found))


def _groups(arguments: argparse.Namespace) -> Sequence[Any]:
    from kvjax.calibrate import read_profile
    from kvjax.plan.table import PlanSettings, read_plan
    from kvjax.spelling import parse_methods

    if arguments.config:
        if arguments.model or arguments.topology:
            raise ValueError("--config has models and topologies, expected no --model beside it")
        return [read_plan(path) for path in arguments.config]
    for name in ("model", "topology"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is missing, expected it or --config")
    return [
        PlanSettings(
            models=(arguments.model,),
            topologies=(arguments.topology,),
            methods=parse_methods(arguments.methods),
            prompt=arguments.prompt,
            new_tokens=arguments.new,
            budget=arguments.budget,
            splits=(arguments.split,),
            batches=(arguments.batch,) if arguments.batch else (),
            profile=read_profile(arguments.profile) if arguments.profile else (),
            limits=arguments.limits,
            layers=arguments.layers,
        )
    ]


def _planned(groups: Sequence[Any], arguments: argparse.Namespace) -> list[Any]:
    """The rows, compiled where the target's compiler is there."""
    from tqdm import tqdm

    from kvjax.compile_for import missing
    from kvjax.plan.depth import DEPTHS, by_depth
    from kvjax.plan.program import compiled, step_cost
    from kvjax.plan.rows import plan
    from kvjax.plan.store import Store

    asks = [(group, ask) for group in groups for ask in group.asks()]
    absent = {ask.topology.target: missing(ask.topology.target) for _, ask in asks}
    for target, reason in absent.items():
        if reason and not arguments.estimate:
            print(f"kvjax: {target} {reason}; its rows are estimates", file=sys.stderr)
    store = Store(compiled, arguments.cache)
    began = time.monotonic()
    rows = []
    with tqdm(asks, desc="plan", unit="row", disable=None) as bar:
        for group, ask in bar:
            bar.set_postfix_str(f"{ask.name} {ask.topology.name} {ask.compression.method}")
            late = time.monotonic() - began > 60 * arguments.minutes
            few = group.layers == "few"
            parts = [ask.with_layers(depth) for depth in DEPTHS] if few else [ask]
            stored = all(map(store.holds, parts))
            possible = absent[ask.topology.target] is None and (not late or stored)
            here = (partial(by_depth, store) if few else store) if possible else None
            here = None if arguments.estimate else here
            cost = step_cost if group.cost and here is not None else None
            rows.append(plan(ask, here, limits=group.limits, cost=cost))
    return rows


def _write(out: Path, text: str, found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The table and the JSON, whole or not at all."""
    configs = "".join(f" --config {path}" for path in arguments.config or ())
    command = f"kvjax plan{configs or ' ...'} -o {out}"
    header = _HEADER.format(command=command)
    plan_rows.write(out, header + text, found)


_COST = """A decode step of one device, from shapes and as its compiler counts it. A compiler knows
nothing of what a kernel of the library's own reads: each layer's call counts the whole pool."""

_HEADER = """# The plan

Written by `{command}`; the JSON beside it has all digits.
GiB of one device, for the whole `generate` in bf16: prefill, compression and decode loop are one
program, compiled ahead of time for chips that are not here. Nothing on this page has run.

- *Weights*, *pool* (what is kept of the prompts; of `full` all of it) and *tail* (room for the
  answer) follow from shapes. *Prefill* is what the program's temporaries hold beside pool and
  tail. *Total* is what `memory_analysis()` says of arguments, temporaries, results and code.
- *Of* is what a program may take. A TPU's compiler says it; for a GPU it is the data sheet's HBM
  less 1 GiB. A TPU's compiler refuses what does not fit, and names its total. What it takes fits,
  even where the parts sum to more than that, for they are not all needed at once.
- `≈`: programs of two and six layers were compiled, and what they need beside weights, pool and
  tail was continued to the model's depth. On a GPU that comes near (Llama-3-8B on an H200 stands
  here both ways). On a TPU it does not always: `full` on v5e-8 came to 15.0 GiB that way, and takes
  9.5, for its compiler spends spare memory differently in a deep program. So rows of TPUs that are
  close are compiled whole.
- `~` is an estimate. Of bytes: no compiler was asked. Of a limit: it follows from the row's own
  compilation and from shapes, and was not compiled itself. Limits hold all else equal, and ignore
  the context that a model was trained for.
- *Collectives* are those of one pass through the decode loop, and the bytes that a device has of
  them afterwards. A step reads weights, pool and tail once; its time is what HBM and matrix units
  need at least.

"""
