"""Run `kvjax eval`; slow imports come late."""

import argparse
import json
import sys
from pathlib import Path

import kvjax


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `kvjax eval`."""
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="TOML, such as configs/eval/tiny.toml")
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="one JSON line an example; a run that was stopped goes on from what is there",
    )
    add(
        "--distributed",
        action="store_true",
        help="share the documents among processes: on a TPU slice, under Slurm, or by the"
        " environment",
    )
    add(
        "--split",
        type=int,
        metavar="N",
        help="devices that each copy of the model is split over; where a process has more of them,"
        " its batches are split over its copies, where it has fewer, processes share one (each"
        " process uses its first device alone)",
    )
    add("--json", action="store_true", help="print one JSON object: examples run, found, failed")


def run(arguments: argparse.Namespace) -> None:
    """`kvjax eval`."""
    from kvjax import tiny
    from kvjax.eval.pod import join, workers
    from kvjax.eval.runner import evaluate
    from kvjax.eval.settings import load_eval_settings

    settings = load_eval_settings(arguments.config)
    text = Path(arguments.config).read_text(encoding="utf-8-sig")
    if arguments.distributed:
        join()
    mine = workers(arguments.split)
    quiet = not (mine.speaks and sys.stderr.isatty())
    directory = tiny.WEIGHTS if settings.model == "tiny" else settings.model
    model, tokenizer = kvjax.load(
        directory, dtype=settings.dtype, progress=not quiet, mesh=mine.mesh,
        max_context=settings.max_context or None, revision=settings.revision or None,
    )  # fmt: skip
    if tokenizer is None:
        raise ValueError(f"model = {settings.model!r} has no tokenizer, expected one")
    counts = evaluate(
        settings,
        arguments.out,
        text,
        model=model,
        tokenizer=tokenizer,
        workers=mine,
        progress=not quiet,
    )
    if mine.speaks:
        _say(counts, arguments)


def _say(counts: dict[str, int], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(counts | {"out": str(arguments.out)}))
    else:
        print(f"{arguments.out}: {counts['run']} run, {counts['found']} found, "
              f"{counts['failed']} failed; kvjax report {arguments.out}")  # fmt: skip
