"""Fit prompts to a given number of tokens, for any tokenizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np

from kvjax.config import ConfigError
from kvjax.eval.tasks.example import Ask, Document, TaskSettings
from kvjax.inputs.prompts import encoded


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A document of one size with its question; fields as in `Document` and `Ask`."""

    context: str
    question: str
    answers: tuple[str, ...]
    lead: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A drawn document before its size is known.

    Attributes:
      build: the document with n units of haystack (lines, words, paragraphs); its tokens grow
        with n, and everything else is already drawn.
      least: the smallest n.
    """

    build: Callable[[int], Draft]
    least: int


def tokens_of(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text, with the tokenizer's special tokens (BOS) or without."""
    return encoded(text, tokenizer, special=special, verbose=False)


def prompt_tokens(tokenizer: Any, context: str, rest: str) -> int:
    """Tokens of a prompt: read as one text or as two, whichever are more."""
    alone = len(tokens_of(tokenizer, context, special=True))
    if not rest:
        return alone
    after = len(tokens_of(tokenizer, rest))
    return max(alone + after, len(tokens_of(tokenizer, context + rest, special=True)))


def room(settings: TaskSettings, new_tokens: int, length: int | None = None) -> int:
    """Tokens that context, question and lead may have: `length`, or else the settings'.

    Raises:
      ConfigError: no length or no tokenizer to measure it with, or nothing is left.
    """
    length = length or settings.length
    if length is None:
        raise ConfigError("length=None, expected a number of tokens")
    if settings.tokenizer is None:
        raise ConfigError(f"tokenizer=None, expected one to measure length={length} with")
    left = length - new_tokens - settings.reserve
    if left < 1:
        raise ConfigError(
            f"length={length}, expected more than the answer's {new_tokens} and the"
            f" reserve={settings.reserve} tokens"
        )
    return left


def largest(
    size: Callable[[int], int], limit: int, least: int, most: int, guess: int | None = None
) -> int | None:
    """The largest n of least .. most for which size(n) <= limit, None where there is none.

    Args:
      size: grows with n.
      limit: of the size.
      least, most: bounds of n.
      guess: where to look first; None for a guess from a few sizes.
    """
    if guess is None:
        first, guess = size(least), least + 16
        for _ in range(3):
            units = (guess - least) / max(size(guess) - first, 1)  # of one token
            guess = min(max(least + int((limit - first) * units), least + 1), most + 1)
    at, step = min(max(guess, least), most), 1
    if size(at) <= limit:
        low, high = at, at + 1
        while high <= most and size(high) <= limit:
            low, step = high, 2 * step
            high = low + step
        high = min(high, most + 1)
    else:
        low, high = at - 1, at
        while low >= least and size(low) > limit:
            high, step = low, 2 * step
            low = max(low - step, least) if low > least else least - 1
        if low < least:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low


def generator(task: str, seed: int, *places: int) -> np.random.Generator:
    """All randomness of one document of a task: its own, whatever is drawn for others."""
    return np.random.default_rng([crc32(task.encode()), seed, *places])


def fit(
    sample: Sample, tokenizer: Any, limit: int, guess: int | None = None
) -> tuple[int, Draft] | None:
    """(units, document) of the largest document with at most `limit` tokens, None if none has."""

    @cache
    def size(units: int) -> int:
        draft = sample.build(units)
        return prompt_tokens(tokenizer, draft.context, draft.question + draft.lead)

    # A unit has at least one token, or a word that several share: twice the limit are too many.
    units = largest(size, limit, sample.least, sample.least + 2 * limit, guess)
    return None if units is None else (units, sample.build(units))


def drawn(
    task: str,
    settings: TaskSettings,
    count: int,
    new_tokens: int,
    metric: str,
    draw: Callable[[np.random.Generator, int], Sample],
) -> Iterator[Document]:
    """Documents as long as `settings.length` allows, one question each.

    Args:
      task: its name.
      settings: with tokenizer and length.
      count: documents, where the settings have no number.
      new_tokens, metric: of every question.
      draw: a document from its randomness and the most tokens of its prompt.

    Raises:
      ConfigError: the length is too small for the smallest document.
    """
    limit, guess = room(settings, new_tokens), None
    for index in range(settings.count or count):
        sample = draw(generator(task, settings.seed, index), limit)
        found = fit(sample, settings.tokenizer, limit, guess)
        if found is None:
            raise too_short(task, sample, settings, new_tokens)
        guess, draft = found
        yield document(f"{task}/{index}", task, draft, new_tokens, metric)


def too_short(
    task: str, sample: Sample, settings: TaskSettings, new_tokens: int, length: int | None = None
) -> ConfigError:
    """What to say where the smallest document is longer than the length."""
    draft = sample.build(sample.least)
    tokens = prompt_tokens(settings.tokenizer, draft.context, draft.question + draft.lead)
    return ConfigError(
        f"length={length or settings.length}, expected at least"
        f" {tokens + new_tokens + settings.reserve} tokens for task {task} with this tokenizer"
    )


def document(name: str, task: str, draft: Draft, new_tokens: int, metric: str) -> Document:
    """A draft as a document of one question."""
    ask = Ask(
        id=f"{name}/0",
        question=draft.question,
        answers=draft.answers,
        new_tokens=new_tokens,
        metric=metric,
        lead=draft.lead,
        facts=draft.facts,
    )
    return Document(id=name, task=task, context=draft.context, asks=(ask,))


def check_fits(settings: TaskSettings, place: str, draft: Draft, new_tokens: int) -> None:
    """Raise ValueError where a prompt from a file is longer than `settings.length`, if any."""
    if settings.length is None:
        return
    limit = room(settings, new_tokens)
    tokens = prompt_tokens(settings.tokenizer, draft.context, draft.question + draft.lead)
    if tokens > limit:
        raise ValueError(
            f"{place} has {tokens} tokens beside its answer's {new_tokens}, expected at most"
            f" {limit} for length={settings.length}"
        )


def cut_middle(tokenizer: Any, context: str, question: str, limit: int) -> tuple[str, str]:
    """Context and question without the middle of the prompt, so that it has `limit` tokens.

    The first and the last limit / 2 tokens stay, as in LongBench. What is left is text again, and
    may be read as a few tokens more; then a little more is cut.
    """
    special = len(tokens_of(tokenizer, "", special=True))
    pieces = [tokens_of(tokenizer, text) for text in (context, question)]
    total, keep = sum(map(len, pieces)), limit - special
    while keep > 0:
        half = keep // 2
        last = total - (keep - half)
        cut = [_without(tokenizer, ids, start, half, last) for ids, start in _started(pieces)]
        texts = [
            text if new is None else new for text, new in zip((context, question), cut, strict=True)
        ]
        over = prompt_tokens(tokenizer, *texts) - limit
        if over <= 0:
            return texts[0], texts[1]
        keep -= over
    raise ConfigError(f"length={limit}, expected room for a prompt beside the answer")


def _started(pieces: Sequence[list[int]]) -> Iterator[tuple[list[int], int]]:
    start = 0
    for ids in pieces:
        yield ids, start
        start += len(ids)


def _without(tokenizer: Any, ids: list[int], start: int, half: int, last: int) -> str | None:
    """A piece's text without the prompt's tokens half .. last - 1; None where it stays whole."""
    low, high = max(half - start, 0), max(last - start, 0)
    if low >= high or low >= len(ids):
        return None
    kept = (ids[:low], ids[high:])
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in kept if part)
