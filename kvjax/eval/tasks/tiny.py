"""The bundled model's own tasks, in its own words; see `kvjax.tiny.tasks`.

The documents are those of `kvjax.tiny.questions`, so that the numbers of docs/tiny_study.md can be
had again: a `length` of 528 here is a prompt of 512 tokens there. A document may be asked several
of its questions.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from kvjax.config import ConfigError
from kvjax.eval.tasks.example import Ask, Document, Task, TaskSettings
from kvjax.eval.tasks.lengths import tokens_of
from kvjax.tiny.questions import _SEED, _TOKENS_PER_FACT, QUESTIONS, UNTIL
from kvjax.tiny.tasks import Turn, compose, draw_facts
from kvjax.tiny.vocabulary import text

ROOM = 16  # tokens for an answer; the longest has 13
_LEAST = 64
_COUNT = 200


def _draw(name: str, settings: TaskSettings) -> Iterator[Document]:
    assert settings.length is not None
    length = settings.length - ROOM - settings.reserve
    if length < _LEAST:
        raise ConfigError(
            f"length={settings.length}, expected at least {_LEAST + ROOM + settings.reserve} tokens"
            f" for task tiny/{name}"
        )
    needles = max(1, length // _TOKENS_PER_FACT[name])
    for index in range(settings.count or _COUNT):
        rng = np.random.default_rng([_SEED, settings.seed, index])
        facts = draw_facts(rng, name, length // 2, needles=needles)
        first = facts.turns[rng.integers(len(facts.turns))]
        made = compose(rng, name, facts, length - len(first.question), UNTIL)
        context = text(made.tokens[1:])  # a tokenizer puts the start before it
        _check(settings.tokenizer, context, made.tokens, name)
        others = [turn for turn in facts.turns if turn is not first]
        turns = [first, *others][: settings.questions]
        yield Document(
            id=f"tiny/{name}/{index}",
            task=f"tiny/{name}",
            context=context,
            asks=tuple(_ask(f"tiny/{name}/{index}/{i}", turn) for i, turn in enumerate(turns)),
        )


def _ask(name: str, turn: Turn) -> Ask:
    return Ask(
        id=name,
        question=" " + text(turn.question),
        answers=(text(turn.answer),),
        new_tokens=len(turn.answer),
        metric="exact",
    )


def _check(tokenizer, context: str, tokens: list[int], name: str) -> None:
    """Raise ConfigError for a tokenizer that is not the bundled model's."""
    if tokenizer is not None and tokens_of(tokenizer, context, special=True) != tokens:
        raise ConfigError(
            f"tokenizer of another vocabulary, expected the bundled model's for task tiny/{name}"
        )


def _task(name: str) -> Task:
    return Task(
        name=f"tiny/{name}",
        metric="exact",
        source="kvjax.tiny.tasks, after RULER's families (arXiv 2404.06654)",
        needs=("length",),
        draw=partial(_draw, name),
        count=_COUNT,
        chat=False,
    )


TASKS = tuple(_task(name) for name in QUESTIONS)
