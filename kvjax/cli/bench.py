"""Run `kvjax bench KIND`: speed on this machine; slow imports come late."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.bench.decode import OWNERS
from kvjax.bench.report import DEFAULTS, KINDS
from kvjax.cli.serve import byte_count
from kvjax.models.presets import PRESETS
from kvjax.spelling import FORM, parse_methods

_TOLD = {
    "decode": "decode steps on caches of given shapes",
    "scores": "what scoring adds to a layer",
    "generate": "the whole path",
    "budgets": "what sharing a budget out takes of random scores",
    "pages": "a decode step through a server's pages beside one on a cache of its own",
    "serve": "a server: many requests from one amount of cache memory",
}
_KNOWN = f"{', '.join(PRESETS)}, random weights, or a folder, a GGUF file or org/name"
_Whole = Callable[[int], Any]


def add_flags(parser: argparse.ArgumentParser, whole: _Whole) -> None:
    """What is measured, and the flags of each; `whole` makes a type of a least integer."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind in KINDS:
        sub = kinds.add_parser(kind, help=_TOLD[kind], description=f"Measure {_TOLD[kind]}.")
        _speed_flags(sub, whole, DEFAULTS[kind])
    sub = kinds.add_parser("serve", help=_TOLD["serve"], description=f"Measure {_TOLD['serve']}.")
    _serve_flags(sub, whole)
    sub.set_defaults(run=serve)


def _speed_flags(parser: argparse.ArgumentParser, whole: _Whole, usual: dict[str, Any]) -> None:
    add = parser.add_argument
    add("--model", default=usual["model"], metavar="M", help=f"{_KNOWN} (%(default)s)")
    add("--batch", default=usual["batch"], metavar="N,N", help="rows (%(default)s)")
    add(
        "--prompt",
        type=whole(64),
        default=usual["prompt"],
        metavar="N",
        help="tokens (%(default)s)",
    )
    add("--new", type=whole(2), default=64, metavar="N", help="tokens to decode (64)")
    add(
        "--budget",
        type=whole(2),
        default=usual["budget"],
        metavar="N",
        help="entries a KV head (%(default)s)",
    )
    add(
        "--methods",
        default="snapkv/padded,snapkv/packed,ada-snapkv/padded,ada-snapkv/packed,h2o,prefixkv",
        metavar="M,M",
        help=f"{FORM}, beside full (%(default)s)",
    )
    add("--owners", choices=OWNERS, default="even", help="of synthetic pools (even)")
    add("--repeats", type=whole(1), default=5, metavar="N", help="timed runs (5)")
    add("--out", metavar="DIR", help="also write the JSON and a picture there")


def run(arguments: argparse.Namespace) -> None:
    """`kvjax bench` of everything but `serve`."""
    from kvjax.bench.report import Settings, run

    batches = arguments.batch.split(",")
    if not all(batch.isdecimal() and int(batch) for batch in batches):
        raise ValueError(f"--batch {arguments.batch}, expected integers of at least 1, as in 1,4")
    settings = Settings(
        model=arguments.model,
        batches=tuple(map(int, batches)),
        prompt=arguments.prompt,
        new=arguments.new,
        budget=arguments.budget,
        methods=parse_methods(arguments.methods),
        owners=arguments.owners,
        repeats=arguments.repeats,
    )
    run(arguments.kind, settings, _folder(arguments))


def _folder(arguments: argparse.Namespace) -> Path | None:
    return Path(arguments.out) if arguments.out else None


# ---------------------------------------------------------------------------- serve
def _serve_flags(parser: argparse.ArgumentParser, whole: _Whole) -> None:
    add = parser.add_argument
    add("--model", default="100m", metavar="M", help=f"{_KNOWN} (%(default)s)")
    add(
        "--methods",
        default="full,ada-snapkv",
        metavar="M,M",
        help=f"{FORM}, one after the other; the others are compared with the first (%(default)s)",
    )
    add(
        "--budget",
        type=whole(2),
        default=128,
        metavar="N",
        help="entries a KV head that all but full keep: T (%(default)s)",
    )
    add("--requests", type=whole(1), default=64, metavar="N", help="prompts in all (%(default)s)")
    add("--tokens", default="1000", metavar="N,N", help="of prompts, in turn (%(default)s)")
    add("--text", metavar="FILE", help="what prompts are cut from (random token ids)")
    add("--save-prompts", metavar="FILE", help="write their ids, a JSON list a line, for others")
    add("--new", type=whole(2), default=100, metavar="N", help="tokens of an answer (%(default)s)")
    add("--rate", type=_rate, metavar="R", help="requests a second, at random times (all at once)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of ids and times (%(default)s)")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "--full-rows",
        type=whole(1),
        default=4,
        metavar="N",
        help="memory: as much as so many of the longest prompts and their answers take whole"
        " (%(default)s)",
    )
    memory.add_argument(
        "--cache-bytes", type=byte_count, metavar="N", help="memory: of pages and tails, as 200M"
    )
    add(
        "--decode-steps",
        type=whole(1),
        default=8,
        metavar="N",
        help="tokens of every row in a dispatch (%(default)s)",
    )
    add(
        "--reads",
        type=whole(1),
        metavar="N",
        help="prompts between two dispatches at most (with --rate 1, else as many as fit)",
    )
    add(
        "--tail-slots",
        type=whole(1),
        metavar="N",
        help="tokens of an answer beside the pages (all of at most 128, else 32)",
    )
    add(
        "--recompress-every",
        type=whole(2),
        metavar="N",
        help="compress answers of all but full again every N tokens, to the budget",
    )
    add("--out", metavar="DIR", help="also write the JSON and a picture there")


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0, such as 0.5")
    return value


def serve(arguments: argparse.Namespace) -> None:
    """`kvjax bench serve`."""
    from kvjax.bench import serve_report
    from kvjax.bench.serve import Settings

    lengths = arguments.tokens.split(",")
    if not all(length.isdecimal() and int(length) for length in lengths):
        raise ValueError(
            f"--tokens {arguments.tokens}, expected integers of at least 1, as in 1000"
        )
    methods = parse_methods(arguments.methods)
    if not methods:
        raise ValueError(f"--methods {arguments.methods!r}, expected {FORM}")
    at_once = arguments.requests if arguments.rate is None else 1
    settings = Settings(
        model=arguments.model,
        methods=methods,
        budget=arguments.budget,
        requests=arguments.requests,
        lengths=tuple(map(int, lengths)),
        new_tokens=arguments.new,
        cache_bytes=arguments.cache_bytes,
        full_rows=arguments.full_rows,
        rate=arguments.rate,
        decode_steps=arguments.decode_steps,
        reads=arguments.reads or at_once,
        tail=arguments.tail_slots,
        recompress_every=arguments.recompress_every,
        seed=arguments.seed,
    )
    text, saved = (
        Path(name) if name else None for name in (arguments.text, arguments.save_prompts)
    )
    serve_report.run(settings, text=text, saved=saved, out=_folder(arguments))
