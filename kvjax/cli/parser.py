"""Define the commands of `kvjax` and their flags."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

import kvjax
from kvjax.cli import (
    bench,
    calibrate,
    chat,
    commands,
    convert,
    demo,
    evaluate,
    inspect,
    plan,
    report,
    serve,
)
from kvjax.compression.scorers import decoding_scorers
from kvjax.methods import METHODS

_LARGEST = 2**31 - 1  # what an int32 holds


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def whole(least: int) -> Callable[[str], int]:
    """A type for argparse: an int32 of at least `least`."""

    def parse(text: str) -> int:
        expected = f"{text!r}, expected an integer from {least} to {_LARGEST}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(expected) from None
        if not least <= value <= _LARGEST:
            raise argparse.ArgumentTypeError(expected)
        return value

    return parse


def _recent(text: str) -> int | str:
    return text if text in ("window", "half") else whole(1)(text)


def build_parser() -> Parser:
    """The parser of `kvjax`; the chosen command is the attribute `run` of what it returns."""
    parser = Parser(prog="kvjax", description="KV-cache compression in JAX and Flax.")
    parser.add_argument("--version", action="version", version=f"kvjax {kvjax.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], None], name: str, summary: str) -> Parser:
        sub = subparsers.add_parser(name, help=summary, description=f"{summary}.")
        sub.set_defaults(run=run)
        return sub

    sub = command(demo.run, "demo", "Answer a question from the full cache and from a tenth of it")
    demo.add_flags(sub, whole)

    sub = command(commands.methods, "methods", "List the methods of compression")
    sub.add_argument("--json", action="store_true", help="one JSON object, keyed by name")

    sub = command(commands.generate, "generate", "Answer prompts with a compressed cache")
    _model_flags(sub)
    _generate_flags(sub)

    sub = command(chat.run, "chat", "Talk about a document that is compressed once")
    _model_flags(sub)
    chat.add_flags(sub)
    _turn_flags(sub)
    _method_flags(sub)
    _answer_flags(sub)

    sub = command(serve.run, "serve", "Answer many clients at once over HTTP")
    _model_flags(sub)
    serve.add_flags(sub, whole)

    sub = command(commands.score, "score", "Score texts after a compressed prefix")
    _model_flags(sub)
    _score_flags(sub)

    sub = command(evaluate.run, "eval", "Evaluate methods on tasks, example by example")
    evaluate.add_flags(sub)

    sub = command(report.run, "report", "Make a page of an evaluation's results")
    report.add_flags(sub)

    sub = command(inspect.run, "inspect", "Show what each head keeps of a prompt, as a page")
    inspect.add_flags(sub)

    sub = command(calibrate.run, "calibrate", "Measure a layer profile for PrefixKV")
    _model_flags(sub)
    _calibration_flags(sub)

    sub = command(convert.run, "convert", "Make a Hugging Face directory, or an Orbax checkpoint")
    convert.add_flags(sub)

    sub = command(plan.run, "plan", "Compile ahead of time: what fits on which TPU or GPU")
    plan.add_flags(sub, whole)

    sub = command(bench.run, "bench", "Measure speed on this machine")
    bench.add_flags(sub, whole)

    sub = command(commands.train_tiny, "train-tiny", "Train the bundled model")
    _training_flags(sub)
    return parser


def _generate_flags(parser: Parser) -> None:
    _prompt_flags(parser)
    _method_flags(parser)
    _answer_flags(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: answers, bytes, entries kept, seconds of each phase (null with"
        " --stop, which looks at the text between steps) and all settings",
    )


def _score_flags(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--tokens",
        required=True,
        metavar="FILE",
        help='JSON lines {"tokens": [ids], "prefix": n}; the first n tokens are compressed; with'
        ' "images": [files], beside the file, for the image tokens among them',
    )
    _method_flags(parser)
    add("--batch", type=whole(1), default=16, metavar="N", help="texts at once (16)")
    add("--positions", action="store_true", help="with --json: also which positions were kept")
    add("--json", action="store_true", help="print one JSON line a text, in order")


def _training_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="TOML, such as configs/tiny.toml")
    add(
        "--out",
        default="build/tiny",
        metavar="DIR",
        help="checkpoints, log.csv and, at the end, model/ and log.png; a run that was stopped goes"
        " on from its last checkpoint (build/tiny)",
    )


def _calibration_flags(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--prompts",
        required=True,
        metavar="FILE",
        help='JSON lines {"prompt": "text"} or {"tokens": [ids]}, of the kind to be answered later;'
        ' with "images": [files], beside the file, for a vision-language model',
    )
    add("--method", default="prefixkv", metavar="M", help="prefixkv, ada-prefixkv (prefixkv)")
    add(
        "--budget",
        metavar="N|P%",
        help="entries kept per KV head, on average over layers: a percentage of the prompt, or a"
        " number",
    )
    add("--batch", type=whole(1), default=16, metavar="N", help="prompts at once (16)")
    add(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="the profile, which generate and score take with --profile; a picture goes beside it",
    )
    add("--json", action="store_true", help="print one JSON object")


def _model_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="a folder with config.json, safetensors and tokenizer files, a GGUF file, or org/name"
        " on the Hugging Face hub",
    )
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit of a name on the hub (main)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and cache (float32)",
    )
    parser.add_argument(
        "--max-context",
        type=whole(1),
        metavar="N",
        help="most tokens of a prompt with its answer (what the model was trained for)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of random draws (0)")


def _prompt_flags(parser: Parser) -> None:
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    prompts.add_argument(
        "--prompt-file", metavar="F", help="one prompt: the whole file as it is, in UTF-8"
    )
    prompts.add_argument(
        "--tokens",
        metavar="F",
        help="token ids, one prompt a line: separated by spaces or commas, or a JSON list",
    )
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    _turn_flags(parser)
    parser.add_argument(
        "--image",
        action="append",
        metavar="F",
        help="a picture, for a vision-language model; repeatable: one for each placeholder of the"
        " one prompt (in front of a text without any)",
    )


def _turn_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--system", metavar="TEXT", help="instructions, which begin a chat (the template's own)")
    add(
        "--template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the chat template, such as enable_thinking=false; repeatable",
    )


def _method_flags(parser: Parser) -> None:
    add = parser.add_argument_group("compression").add_argument
    add("--method", default="full", metavar="M", help=f"{', '.join(METHODS)} (full)")
    add(
        "--budget",
        metavar="N|P%",
        help="entries kept per KV head, on average over heads and layers: a number, or a percentage"
        " of the prompt; full ignores it",
    )
    add("--window", type=whole(1), metavar="N", help="last tokens observed (min(32, budget // 2))")
    add("--pooling", choices=("max", "average", "none"), help="smoothing of window scores (max)")
    add("--kernel", type=whole(1), metavar="N", help="width of the pooling, odd (7)")
    add("--floor", type=float, metavar="A", help="Ada-KV's alpha, from 0 to 1 (0.2)")
    add("--beta", type=whole(1), metavar="N", help="PyramidKV's steepness (20)")
    add("--head-cap", type=whole(1), metavar="N", help="Ada-KV: most entries of a head (no cap)")
    add("--group", choices=("mean", "max"), help="over the query heads of a KV head (mean)")
    add("--layout", choices=("padded", "packed"), help="of the cache (packed where it saves bytes)")
    add("--quantize", choices=("int8",), help="store what is kept in 8 bits (the model's dtype)")
    add("--sinks", type=whole(0), metavar="N", help="first tokens always kept (the method's)")
    add("--recent", type=_recent, metavar="N", help="last tokens always kept (the method's)")
    add("--chunk", type=whole(1), metavar="N", help="tokens kept or evicted together (1)")
    add("--reduce", choices=("mean", "sum"), help="over the window's queries (mean)")
    add(
        "--profile",
        metavar="FILE",
        help="PrefixKV offline: a JSON list of the fraction EVICTED from each layer, as its"
        " authors publish them",
    )


def _answer_flags(parser: Parser) -> None:
    group = parser.add_argument_group("answer")
    add = group.add_argument
    add("--max-new-tokens", type=whole(1), default=128, metavar="N", help="(128)")
    add(
        "--sampling",
        choices=("model",),
        help="draw tokens as the checkpoint's generation_config.json suggests, in place of the next"
        " five flags",
    )
    add("--temperature", type=float, metavar="T", help="0 for greedy (0)")
    add("--top-k", type=whole(0), metavar="N", help="0 for all tokens (0)")
    add("--top-p", type=float, metavar="P", help="1 for all tokens (1)")
    add("--min-p", type=float, metavar="P", help="0 for all tokens (0)")
    add("--repetition-penalty", type=float, metavar="R", help="1 for none (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
    add(
        "--recompress-every",
        type=whole(2),
        metavar="N",
        help="compress again every N tokens of the answer, so that it needs no more memory",
    )
    add(
        "--recompress-budget",
        type=whole(4),
        metavar="N",
        help="entries a KV head of prompt and answer together (the prompt's ratio, with prefixkv)",
    )
    add(
        "--recompress-scorer",
        choices=decoding_scorers(),
        help="what the last queries look at, squared attention of all queries since the prompt's"
        " last, keys unlike the others, or small keys (window)",
    )
    add(
        "--recompress-layers",
        choices=("uniform", "global"),
        help="layers keep the slots they have, or one threshold over layers and heads, with"
        " squared-sum (uniform)",
    )
    ends = group.add_mutually_exclusive_group()
    ends.add_argument(
        "--eos",
        type=whole(0),
        action="append",
        metavar="ID",
        help="token that ends an answer; repeatable (the model's own)",
    )
    ends.add_argument("--ignore-eos", action="store_true", help="no token ends an answer")
