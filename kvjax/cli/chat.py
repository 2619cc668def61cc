"""Run `kvjax chat`: a document is compressed once, and talked about in a terminal."""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import kvjax
from kvjax.cache.state import Cache
from kvjax.cli.files import check_vocabulary, read_text
from kvjax.cli.settings import (
    announce,
    compression,
    drawn_by,
    loading,
    recompression,
    sampling,
    template_args,
)
from kvjax.config import CompressionConfig
from kvjax.inputs.chat import Turn, opening, turn_tokens
from kvjax.model_interface import Model

_COMMANDS = "/kept, /reset or /quit"
_BAR = 20  # characters of a full layer's bar


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `kvjax chat` beside those of the model, the method and the answer."""
    parser.add_argument("--document", metavar="F", help="what to talk about: a text in UTF-8")


@dataclass(frozen=True)
class Talk:
    """A conversation so far: its turns, and the cache that has read them."""

    turns: tuple[Turn, ...]
    cache: Cache | None


@dataclass(frozen=True)
class Setting:
    """What stays the same through a chat: the model, how to compress, how to answer.

    `told` are warnings that have been shown.
    """

    model: Model
    tokenizer: Any
    config: CompressionConfig
    template: dict[str, Any]
    call: dict[str, Any]
    told: set[str] = dataclasses.field(default_factory=set)


def run(arguments: argparse.Namespace) -> None:
    """`kvjax chat`: one question a line; slow imports come late."""
    config, asked = compression(arguments), sampling(arguments)
    document = None if arguments.document is None else read_text(arguments.document)
    if document is not None and not document.strip():
        raise ValueError(f"--document {arguments.document} is empty, expected a text")
    model, tokenizer = kvjax.load(arguments.model, **loading(arguments))
    if tokenizer is None:
        raise ValueError(f"--model {arguments.model} has no tokenizer, expected one for a chat")
    call = {
        "max_new_tokens": arguments.max_new_tokens,
        "sampling": drawn_by(asked, model),
        "seed": arguments.seed,
        "eos_ids": () if arguments.ignore_eos else arguments.eos,
        "stop": arguments.stop,
        "recompress": recompression(arguments),
    }
    _check(call, model)  # before the document is read
    if call["recompress"] is not None and call["recompress"].sums:
        config = dataclasses.replace(config, sums=True)
    setting = Setting(model, tokenizer, config, template_args(arguments), call)
    begun = _begun(setting, arguments.system, document)
    talk = begun
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            talk = begun
        elif line == "/kept":
            print("\n".join(kept(talk.cache, call["recompress"] is None)), flush=True)
        elif line.startswith("/"):
            print(f"kvjax: {line}, expected a question, {_COMMANDS}", file=sys.stderr, flush=True)
        else:
            talk = _answered(setting, talk, line)


def _check(call: dict[str, Any], model: Model) -> None:
    """Raise ValueError for flags that no question could be answered with."""
    check_vocabulary(call["eos_ids"] or [], "--eos", model.config.vocab_size)
    rule = call["recompress"]
    if rule is not None and rule.budget is None:
        raise ValueError(
            "--recompress-every without --recompress-budget, expected both in a chat, as the"
            " ratio of a document's cache is fixed"
        )
    if call["max_new_tokens"] >= model.config.context:
        raise ValueError(
            f"--max-new-tokens {call['max_new_tokens']}, expected less than the context of"
            f" {model.config.context} tokens"
        )


def _lines() -> Iterator[str]:
    """Lines from stdin that are not empty; a terminal is asked for them, until it ends."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _begun(setting: Setting, system: str | None, document: str | None) -> Talk:
    """The conversation before the first question; the document is read and compressed."""
    from tqdm import tqdm

    turns = opening(system, document, setting.tokenizer, **setting.template)
    if not turns:
        return Talk((), None)
    tokens = len(turn_tokens(turns, setting.tokenizer, **setting.template))
    announce(setting.config, [tokens])
    with tqdm(total=tokens, desc="reading", unit="token", disable=None, leave=False) as bar:
        cache = kvjax.compress_prompt(
            setting.model,
            config=setting.config,
            messages=turns,
            template_args=setting.template,
            tokenizer=setting.tokenizer,
            seed=setting.call["seed"],
            # A talk may go on to the end of the context.
            max_new_tokens=max(0, setting.model.config.context - tokens),
        )
        cache.next_positions.block_until_ready()
        bar.update(tokens)
    return Talk(tuple(turns), cache)


def _answered(setting: Setting, talk: Talk, question: str) -> Talk:
    """The conversation with one more question and its answer, which is shown as it is drawn.

    What cannot be answered is said in one sentence, and an interrupted answer is forgotten: the
    conversation stays as it was.
    """
    turns = (*talk.turns, {"role": "user", "content": question})
    text, cache = "", None
    try:
        before = talk.cache or _for_whole_context(setting, turns)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # a template may rewrite an earlier turn
            steps = kvjax.stream(  # without a document everything is kept
                setting.model,
                messages=turns,
                template_args=setting.template,
                tokenizer=setting.tokenizer,
                cache=before,
                return_cache=True,
                **setting.call,
            )
        for told in {str(one.message) for one in caught} - setting.told:
            print(f"kvjax: {told}", file=sys.stderr, flush=True)
            setting.told.add(told)
        for step in steps:
            piece = "" if step.text is None else step.text[0]
            sys.stdout.write(piece)
            sys.stdout.flush()
            text, cache = text + piece, step.cache
    except ValueError as error:
        print(f"kvjax: {error}", file=sys.stderr, flush=True)
        return talk
    except KeyboardInterrupt:
        print(flush=True)
        return talk
    print(flush=True)
    return dataclasses.replace(
        talk, turns=(*turns, {"role": "assistant", "content": text}), cache=cache
    )


def _for_whole_context(setting: Setting, turns: Sequence[Turn]) -> Cache | None:
    """A cache for a talk without a document, where rotary frequencies depend on the length.

    They stay for the cache, and a talk may go on to the end of the context: so it begins with one
    token, read for as much. None for other models, which need none.
    """
    model = setting.model
    if not model.config.rope_by_length:
        return None
    first = turn_tokens(turns, setting.tokenizer, **setting.template)[:1]
    return kvjax.compress_prompt(
        model, [first], tokenizer=setting.tokenizer, max_new_tokens=model.config.context - 1
    )


def kept(cache: Cache | None, whole_answers: bool = True) -> list[str]:
    """Lines that say what a cache holds: in all, and a bar for each layer.

    `whole_answers` says whether what followed the prompt is held whole: not if compressed again.
    """
    if cache is None:
        return ["nothing is held yet"]
    counts_LK = cache.counts[0]
    layers, heads = counts_LK.shape
    tokens, since = int(cache.prompt_lengths[0]), int(cache.next_positions[0])
    read = tokens if whole_answers else since
    entries, full = int(counts_LK.sum()), read * layers * heads
    keys = cache.tail.keys[0]
    # A full cache has a key and a value of each entry, in the tail's dtype.
    whole = full * 2 * keys.shape[-1] * keys.dtype.itemsize
    lines = [
        f"{tokens} tokens compressed, {since - tokens} since"
        + (", which are held whole" if whole_answers else ", compressed too"),
        f"entries {entries:,} of {full:,} ({entries / full:.1%})",
        f"bytes {cache.nbytes:,} of {whole:,} ({cache.nbytes / whole:.1%})",
    ]
    for layer, held in enumerate(counts_LK.sum(-1).tolist()):
        share = held / (read * heads)
        bar = "#" * round(_BAR * share)
        lines.append(f"layer {layer:2} {bar:.<{_BAR}} {share:.1%}")
    return lines
