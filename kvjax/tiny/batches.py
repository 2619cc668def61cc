"""Make training sequences: a document, as many of its questions as fit, a weight for each token.

B sequences, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from kvjax.tiny.tasks import TASKS, compose, draw_facts
from kvjax.tiny.vocabulary import ID, KEYS, SYMBOLS, VALUES

_TOKENS_PER_TURN = 5
_LEAST = 12  # tokens of a document that is repeated
_SYMBOLS = np.array([ID[word] for word in (*KEYS, *VALUES)])


class Batch(NamedTuple):
    """Sequences for one training step.

    Attributes:
      tokens: ids.
      turns: 0 outside answers, else 1, 2, ...: which answer of its sequence a token belongs to.
    """

    tokens: Int[np.ndarray, "B T"]
    turns: Int[np.ndarray, "B T"]


def training_sequence(
    rng: np.random.Generator, task: str, length: int, needles: int, alphabet: int
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Tokens and turns of one sequence; `needles` is the most facts it may have.

    The number of facts is log-uniform, so that few and many are equally common. Questions take
    what they need, at most half of the sequence. A document that is repeated takes a fifth to a
    half of it, so that nobody learns to copy from a fixed distance; questions follow its copy.
    """
    half = length // 2
    count = round(float(np.exp(rng.uniform(0, np.log(needles)))))
    count = max(1, min(count, half // _TOKENS_PER_TURN))
    if task == "repeat":
        half = int(rng.integers(max(length // 5, _LEAST), half + 1))
    facts = draw_facts(rng, task, half - 2, needles=count, alphabet=alphabet)
    asked = sum(len(question) + len(answer) for question, answer in facts.turns)
    document = half if task == "repeat" else max(half, length - asked)
    tokens, turns = compose(rng, task, facts, document)
    if task == "repeat":
        turns = [*turns, *rng.permutation(len(facts.turns)).tolist()]
        turns = [facts.turns[turn] if isinstance(turn, int) else turn for turn in turns]
    numbers = [0] * len(tokens)
    for index, (question, answer) in enumerate(turns):
        tokens = tokens + question + answer
        numbers += [0] * len(question) + [index + 1] * len(answer)
    return np.array(tokens[:length]), np.array(numbers[:length])


def training_batch(
    seed: Sequence[int],
    tasks: Sequence[str],
    length: int,
    *,
    needles: int,
    alphabet: int = SYMBOLS,
) -> Batch:
    """One sequence for each entry of `tasks`; the same arguments give the same batch."""
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task={task!r}, expected one of {', '.join(TASKS)}")
    tokens = np.zeros((len(tasks), length), np.int32)
    turns = np.zeros_like(tokens)
    for row, task in enumerate(tasks):
        rng = np.random.default_rng([*seed, row])
        sequence, numbers = training_sequence(rng, task, length, needles, alphabet)
        tokens[row, : len(sequence)], turns[row, : len(sequence)] = sequence, numbers
    return Batch(tokens, turns)


def loss_weights(batch: Batch, filler: float) -> Float[np.ndarray, "B T"]:
    """1 for tokens of answers, `filler` for words that local structure can predict, else 0."""
    local = ~np.isin(batch.tokens, _SYMBOLS) & (batch.tokens > 2)
    return np.where(batch.turns > 0, 1.0, np.where(local, filler, 0.0)).astype(np.float32)
