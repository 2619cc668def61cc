"""Run `kvjax methods`, `generate`, `score` and `train-tiny`; slow imports come late."""

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import kvjax
from kvjax.cli.files import (
    check_length,
    check_vocabulary,
    read_documents,
    read_images,
    read_prompts,
    read_text,
)
from kvjax.cli.settings import (
    announce,
    compression,
    drawn_by,
    loading,
    recompression,
    resolved,
    sampling,
    template_args,
)
from kvjax.compression.capacity import slot_bytes
from kvjax.compression.scorers import SCORERS
from kvjax.config import CompressionConfig
from kvjax.generation.request import check_rows
from kvjax.inputs.chat import user_turns
from kvjax.inputs.images import load_image
from kvjax.inputs.multimodal import placeholder, prepare_inputs, with_placeholders
from kvjax.inputs.prompts import bucket
from kvjax.inputs.read import read
from kvjax.likelihood import Document, batches
from kvjax.methods import METHODS, Method
from kvjax.model_interface import Model, VisionModel


# ---------------------------------------------------------------------------- methods
def methods(arguments: argparse.Namespace) -> None:
    """`kvjax methods`."""
    if arguments.json:
        table = {
            name: dataclasses.asdict(method)
            | {"always_kept": _always_kept(method), "needs": _needs(method)}
            for name, method in METHODS.items()
        }
        print(json.dumps(table))
        return
    rows = [_HEADS, *(_row(name, method) for name, method in METHODS.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


_HEADS = (
    "NAME", "SCORER", "LAYERS", "HEADS", "ALWAYS KEPT", "READS", "QUESTION", "PREFILLS", "PAPER"
)  # fmt: skip


def _row(name: str, method: Method) -> tuple[str, ...]:
    """What the table says of a method."""
    scorer, always = SCORERS[method.scorer], _always_kept(method)
    question = "must be seen" if scorer.question else "may come later"
    return (
        name, method.scorer, method.layers, method.heads, always, scorer.words, question,
        scorer.passes, method.paper,
    )  # fmt: skip


def _needs(method: Method) -> dict[str, Any]:
    """What its scorer reads and costs."""
    scorer = SCORERS[method.scorer]
    facts = {name: getattr(scorer, name) for name in ("question", "all_queries", "passes")}
    return {"reads": scorer.words} | facts


def _always_kept(method: Method) -> str:
    if method.scorer == "none":
        return "everything"
    names = {"window": "the window", "half": "last half of the budget"}
    recent = names.get(str(method.recent), f"last {method.recent}")
    return f"first {method.sinks}, {recent}" if method.sinks else recent


# ---------------------------------------------------------------------------- train-tiny
def train_tiny(arguments: argparse.Namespace) -> None:
    """`kvjax train-tiny`."""
    from kvjax import figures
    from kvjax.tiny.settings import load_settings
    from kvjax.tiny.train import read_log, train

    settings = load_settings(arguments.config)
    print(train(settings, arguments.out))
    if figures.available():
        print(figures.training(Path(arguments.out) / "log.png", read_log(arguments.out)))


# ---------------------------------------------------------------------------- generate
def generate(arguments: argparse.Namespace) -> None:
    """`kvjax generate`."""
    config, asked = compression(arguments), sampling(arguments)
    texts, ids = _given(arguments)
    prompts: Any = texts or list(ids.values())
    images = _pictures(arguments.image, prompts)
    model, tokenizer = kvjax.load(arguments.model, **loading(arguments))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if texts and tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer, expected token ids (--tokens)")
    vocab_size = model.config.vocab_size
    for place, row in ids.items():
        check_vocabulary(row, place, vocab_size)
    check_vocabulary(arguments.eos or [], "--eos", vocab_size)
    if images and texts and isinstance(model, VisionModel) and not arguments.chat:
        texts = [with_placeholders(model, tokenizer, texts[0], len(images[0]))]
    rows = _rows(model, tokenizer, texts or prompts, images, arguments)
    rules = drawn_by(asked, model)
    call = {
        "images": images,
        "max_new_tokens": arguments.max_new_tokens,
        "tokenizer": tokenizer,
        "sampling": rules,
        "seed": arguments.seed,
        "eos_ids": () if arguments.ignore_eos else arguments.eos,
        "recompress": recompression(arguments),
    }
    # This checks the whole call, and runs nothing until it is asked for a step.
    steps = kvjax.stream(model, rows, config, stop=arguments.stop, **call)
    lengths = [len(row) for row in rows]
    announce(config, lengths)
    if arguments.json:
        report = _measured(model, rows, config, arguments.stop, call)
        report |= {"prompt_tokens": lengths, "max_new_tokens": arguments.max_new_tokens}
        report |= {"dtype": arguments.dtype, "seed": arguments.seed} | dataclasses.asdict(rules)
        rule = call["recompress"]
        report["recompress"] = dataclasses.asdict(rule) if rule else None
        print(json.dumps(report | resolved(config, lengths)))
    elif len(rows) == 1:
        _show_as_drawn(steps)
    else:
        _show_answers(steps, len(rows))


def _rows(
    model: Model, tokenizer: Any, prompts: Any, images: Any, arguments: argparse.Namespace
) -> list[list[int]]:
    """Token ids of the prompts, as the user's turns of chats where that is asked for."""
    template, system = template_args(arguments), arguments.system
    if not arguments.chat:
        given = "--system" if system else "--template-arg" if template else None
        if given is not None:
            raise ValueError(f"{given} needs --chat, which it goes with")
        return read(model, prompts, images, tokenizer=tokenizer).rows
    turns = dict(tokenizer=tokenizer, template_args=template)
    if system is None:
        return read(model, prompts, images, chat=True, **turns).rows
    token = placeholder(model, tokenizer) if images else ""
    told = {"role": "system", "content": system}
    users = user_turns(prompts, tokenizer, images, token, **template)
    return read(model, None, images, messages=[[told, *each] for each in users], **turns).rows


def _pictures(files: list[str] | None, prompts: Sequence[Any]) -> list[list[Any]] | None:
    """The one prompt's images, read from their files."""
    if files is None:
        return None
    if len(prompts) > 1:
        raise ValueError(f"--image goes with one prompt, got {len(prompts)}")
    return [[load_image(file) for file in files]]


def _given(arguments: argparse.Namespace) -> tuple[list[str], dict[str, list[int]]]:
    """Prompts as texts, or as token ids by their place in the file."""
    if arguments.tokens is not None:
        if arguments.chat:
            raise ValueError("--chat needs a text (--prompt or --prompt-file), got --tokens")
        return [], read_prompts(arguments.tokens)
    if arguments.prompt_file is not None:
        return [read_text(arguments.prompt_file)], {}
    for text in arguments.prompt:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--prompt is not valid Unicode ({error.reason})") from None
    return arguments.prompt, {}


def _show_as_drawn(steps: Iterable[kvjax.Step]) -> None:
    """The only answer; its text as it is, without a line end that is not part of it."""
    written = False
    for step in steps:
        if step.text is not None:
            piece = step.text[0]
        else:
            piece = "".join(f" {token}" for token in step.tokens[0])
            piece = piece if written else piece.lstrip()
        sys.stdout.write(piece)
        sys.stdout.flush()
        written = written or bool(piece)
    if step.text is None or sys.stdout.isatty():
        sys.stdout.write("\n")


def _show_answers(steps: Iterable[kvjax.Step], rows: int) -> None:
    """Answers one after another: token ids a line each, texts with --- between them."""
    texts = [""] * rows
    tokens: list[list[int]] = [[] for _ in range(rows)]
    for step in steps:
        for row in range(rows):
            tokens[row] += step.tokens[row]
            texts[row] += step.text[row] if step.text is not None else ""
    if step.text is None:
        print("\n".join(" ".join(map(str, row)) for row in tokens))
    else:
        print("\n---\n".join(texts))


def _measured(
    model: Model,
    rows: Sequence[Sequence[int]],
    config: CompressionConfig,
    stop: Sequence[str],
    call: dict[str, Any],
) -> dict[str, Any]:
    """Answers, bytes, and seconds of each phase (None with stop strings)."""
    if stop:
        compiled = kvjax.compilations()
        out, timings = kvjax.generate(model, rows, config, stop=stop, **call), None
        compiled = kvjax.compilations() - compiled
    else:
        out, timings = kvjax.timed_generate(model, rows, config, **call)
        compiled = timings.compilations
    itemsize, tokens = model.embed.table_VD[...].dtype.itemsize, bucket(max(map(len, rows)))
    entry = slot_bytes(config, tokens, model.config.head_dim, itemsize)
    drawn = sum(map(len, out.tokens))
    return {
        "text": out.text,
        "tokens": out.tokens,
        "log_probs": out.log_probs,
        "cache_bytes": out.cache_bytes,
        "full_cache_bytes": out.full_cache_bytes,
        "entry_bytes": int(out.kept.sum()) * entry,
        "kept": out.kept.tolist(),
        "prefill_seconds": timings and timings.prefill,
        "compress_seconds": timings and timings.compress,
        "decode_seconds": timings and timings.decode,
        "compile_seconds": timings and timings.compile,
        # The first token of each row comes with the prefill.
        "tokens_per_second": timings and (drawn - len(rows)) / timings.decode,
        "compilations": compiled,
    }


# ---------------------------------------------------------------------------- score
def score(arguments: argparse.Namespace) -> None:
    """`kvjax score`."""
    from tqdm import tqdm

    from kvjax.models.load import load_model

    if arguments.positions and not arguments.json:
        raise ValueError("--positions needs --json, which alone prints them")
    config = compression(arguments)
    places = read_documents(arguments.tokens)
    images = read_images(arguments.tokens)
    model = load_model(arguments.model, **loading(arguments))
    if isinstance(model, VisionModel) and images is not None:
        places = _with_features(places, images, model)
    _check_documents(places, model, config)
    documents = list(places.values())
    announce(config, [prefix for _, prefix in documents])
    scored: dict[int, kvjax.Scored] = {}
    with tqdm(total=len(documents), desc="score", unit="text") as bar:
        for batch, pad_to in batches(documents, arguments.batch):
            tokens, prefixes = zip(*(documents[index] for index in batch), strict=True)
            shown = None if images is None else [images[index] for index in batch]
            results = kvjax.score(
                model,
                tokens,
                prefixes,
                config,
                seed=arguments.seed,
                positions=arguments.positions,
                pad_to=pad_to,
                images=shown,
            )
            scored |= zip(batch, results, strict=True)
            bar.update(len(set(batch)))
    in_order = [scored[index] for index in range(len(documents))]
    if arguments.json:
        for one in in_order:
            line = {"nll": one.nll, "kept": one.kept, "top1": one.top1}
            print(json.dumps(line | ({"positions": one.positions} if arguments.positions else {})))
    else:
        print(_summary(in_order))


def _with_features(
    places: dict[str, Document], images: Sequence[Sequence[str]], model: Model
) -> dict[str, Document]:
    """Documents with a token for each feature of their images, all in the prefix."""
    found = {}
    for (place, (tokens, prefix)), files in zip(places.items(), images, strict=True):
        try:
            pictures = [[load_image(file) for file in files]]
            head = prepare_inputs(model, [tokens[:prefix]], pictures).rows[0]
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        found[place] = head + tokens[prefix:], len(head)
    return found


def _check_documents(places: dict[str, Document], model: Model, config: CompressionConfig) -> None:
    """Raise ValueError where a document, or the config for it, does not fit the model."""
    context = model.config.context
    for place, (tokens, _) in places.items():
        check_vocabulary(tokens, place, model.config.vocab_size)
        check_length(tokens, place, context)
    # What is left to check depends on a prefix's length alone.
    prefixes = {prefix: tokens[:prefix] for tokens, prefix in places.values()}
    check_rows(model, list(prefixes.values()), config)


def _summary(scored: Sequence[kvjax.Scored]) -> str:
    losses = [loss for one in scored for loss in one.nll]
    mean = math.fsum(losses) / len(losses)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    kept = sum(one.kept for one in scored) / len(scored)
    return (
        f"documents {len(scored)}, tokens {len(losses)}, mean NLL {mean:.6f},"
        f" perplexity {perplexity:.4f}, mean kept {kept:.1f}"
    )
