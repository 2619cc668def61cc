"""Evaluation prompts: fresh documents of a given length, one question each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvjax.tiny.tasks import compose, draw_facts

# Documents of evaluation share no seed with those of training.
_SEED = 7_000_000
# Facts lie in this first part, so that no method keeps them by keeping the end of the prompt.
UNTIL = 0.85
# Facts for every so many tokens of a document.
_TOKENS_PER_FACT = {
    "single": 10**9,
    "multikey": 32,
    "multivalue": 64,
    "multiquery": 64,
    "tracking": 64,
    "frequent": 48,
}
QUESTIONS = tuple(_TOKENS_PER_FACT)


@dataclass(frozen=True)
class Item:
    """One question about one document, as token ids."""

    document: Sequence[int]
    question: Sequence[int]
    answer: Sequence[int]


def questions(task: str, length: int, count: int, *, seed: int = 0) -> list[Item]:
    """`count` documents with a question each, `length` tokens together.

    Raises:
      ValueError: a task without questions.
    """
    if task not in QUESTIONS:
        raise ValueError(f"task={task!r}, expected one of {', '.join(QUESTIONS)}")
    needles = max(1, length // _TOKENS_PER_FACT[task])
    return [_item(task, length, needles, [_SEED, seed, index]) for index in range(count)]


def _item(task: str, length: int, needles: int, seed: list[int]) -> Item:
    rng = np.random.default_rng(seed)
    facts = draw_facts(rng, task, length // 2, needles=needles)
    turn = facts.turns[rng.integers(len(facts.turns))]
    document = compose(rng, task, facts, length - len(turn.question), UNTIL)
    return Item(document.tokens, turn.question, turn.answer)
