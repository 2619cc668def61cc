"""Synthetic long-context tasks, after RULER's families (Hsieh et al. 2024, arXiv 2404.06654).

A document is sentences of filler with facts between them; a turn is a question and its answer.

    note KEY V V .            ask KEY          ->  V V .                     single, multikey
    note KEY V V .  (again)   list KEY         ->  V V KEY V V .             multivalue
    note KEY V V .            ask KEY KEY :    ->  KEY V V KEY V V .         multiquery
    let KEY KEY .  let KEY V  trace KEY        ->  KEY V .                   tracking
    saw V .                   most             ->  V V .                     frequent
    anything                  again            ->  the document once more    repeat
    sentences alone                                                          stream

A question ends with what has to be looked up, so that its last token attends to the fact: an
observation window that holds the question sees what the answer needs.

Everything is drawn from the generator that is passed in, so a seed is a document.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvjax.tiny.filler import sentences
from kvjax.tiny.vocabulary import BOS, ID, KEYS, SYMBOLS, VALUES

Tokens = list[int]

_KEYS = np.array([ID[word] for word in KEYS])
_VALUES = np.array([ID[word] for word in VALUES])
_STOP, _COLON = ID["."], ID[":"]


class Turn(NamedTuple):
    """A question and its answer, which ends with a full stop."""

    question: Tokens
    answer: Tokens


class Document(NamedTuple):
    """A context, and questions about it in random order."""

    tokens: Tokens
    turns: list[Turn]


class Facts(NamedTuple):
    """What a task adds to the filler: short token lists in order, and the questions."""

    inserts: list[Tokens]
    turns: list[Turn]


def _draw(rng: np.random.Generator, symbols: np.ndarray, count: int, alphabet: int) -> Tokens:
    return rng.choice(symbols[:alphabet], count, replace=False).tolist()


def _note(key: int, value: Tokens) -> Tokens:
    return [ID["note"], key, *value, _STOP]


def _ask(word: str, key: int, answer: Tokens) -> Turn:
    return Turn([ID[word], key], [*answer, _STOP])


def _notes(rng, count: int, alphabet: int) -> tuple[list[tuple[int, Tokens]], list[Tokens]]:
    keys = _draw(rng, _KEYS, min(count, alphabet), alphabet)
    pairs = [(key, rng.choice(_VALUES[:alphabet], 2).tolist()) for key in keys]
    return pairs, [_note(key, value) for key, value in pairs]


def multikey(rng: np.random.Generator, needles: int, alphabet: int) -> Facts:
    """`needles` notes of different keys, each asked for."""
    pairs, inserts = _notes(rng, needles, alphabet)
    return Facts(inserts, [_ask("ask", key, value) for key, value in pairs])


def single(rng: np.random.Generator, needles: int, alphabet: int) -> Facts:
    """One note."""
    return multikey(rng, 1, alphabet)


def multiquery(rng: np.random.Generator, needles: int, alphabet: int) -> Facts:
    """Notes asked for two to four at a time."""
    pairs, inserts = _notes(rng, max(needles, 4), alphabet)
    turns = []
    for _ in range(max(1, needles // 3)):
        chosen = [pairs[i] for i in rng.choice(len(pairs), rng.integers(2, 5), replace=False)]
        told = [token for key, value in chosen for token in (key, *value)]
        turns.append(Turn([ID["ask"], *(key for key, _ in chosen), _COLON], [*told, _STOP]))
    return Facts(inserts, turns)


def multivalue(rng: np.random.Generator, needles: int, alphabet: int) -> Facts:
    """Keys noted two to four times, listed in the document's order."""
    inserts, turns, keys = [], [], _draw(rng, _KEYS, max(1, min(needles // 3, alphabet)), alphabet)
    values = {key: rng.choice(_VALUES[:alphabet], (rng.integers(2, 5), 2)).tolist() for key in keys}
    inserts = [_note(key, value) for key, listed in values.items() for value in listed]
    rng.shuffle(inserts)
    for key in keys:
        told = [token for insert in inserts if insert[1] == key for token in insert[1:-1]]
        turns.append(_ask("list", key, told[1:]))
    return Facts(inserts, turns)


def tracking(rng: np.random.Generator, needles: int, alphabet: int) -> Facts:
    """Chains of two to four variables, each asked for from its end."""
    chains, keys = [], iter(_draw(rng, _KEYS, min(max(needles, 4), alphabet), alphabet))
    turns = []
    for _ in range(max(1, needles // 4)):
        names = [key for key, _ in zip(keys, range(rng.integers(2, 5)), strict=False)]
        if len(names) < 2:
            break
        chain = [*names, int(rng.choice(_VALUES[:alphabet]))]
        chains.append([[ID["let"], a, b, _STOP] for a, b in pairwise(chain)])
        turns.append(_ask("trace", chain[0], chain[1:]))
    # A variable is set before it is used: the last link of a chain comes first.
    order = rng.permutation([i for i, chain in enumerate(chains) for _ in chain]).tolist()
    return Facts([chains[i].pop() for i in order], turns)


def frequent(rng: np.random.Generator, needles: int, alphabet: int) -> Facts:
    """Two words seen more often than the others, the most frequent first."""
    words = _draw(rng, _VALUES, min(max(needles // 2, 4), alphabet), alphabet)
    counts = [needles, needles // 2 + 1] + [max(1, needles // 6)] * (len(words) - 2)
    inserts = [
        [ID["saw"], word, _STOP] for word, n in zip(words, counts, strict=True) for _ in range(n)
    ]
    rng.shuffle(inserts)
    return Facts(inserts, [Turn([ID["most"]], [*words[:2], _STOP])])


def stream(rng: np.random.Generator, needles: int, alphabet: int) -> Facts:
    """No facts and no questions."""
    return Facts([], [])


TASKS: dict[str, Callable[[np.random.Generator, int, int], Facts]] = {
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "tracking": tracking,
    "frequent": frequent,
    "repeat": multikey,
    "stream": stream,
}


def draw_facts(
    rng: np.random.Generator, task: str, room: int, *, needles: int = 8, alphabet: int = SYMBOLS
) -> Facts:
    """Facts that take at most `room` tokens: about `needles` of them, fewer where that is too many.

    Args:
      rng: all randomness.
      task: a key of TASKS.
      room: tokens.
      needles: >= 1.
      alphabet: how many of the keys and of the values may occur, 4..SYMBOLS.

    Raises:
      ValueError: an unknown task, or no room for the smallest number of facts.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}, expected one of {', '.join(TASKS)}")
    while True:
        facts = TASKS[task](rng, needles, alphabet)
        taken = sum(map(len, facts.inserts))
        if taken <= room:
            return facts
        if needles == 1:
            raise ValueError(f"room={room} tokens, expected at least {taken} for task {task}")
        needles = max(1, needles * 3 // 4)


def compose(
    rng: np.random.Generator, task: str, facts: Facts, length: int, until: float = 1.0
) -> Document:
    """A document of exactly `length` tokens, `<s>` included, around facts.

    Args:
      rng: all randomness.
      task: where the facts are from.
      facts: of less than `length` tokens.
      length: tokens.
      until: facts lie in this first part of the document, 0..1.
    """
    taken = sum(map(len, facts.inserts))
    tokens = [BOS, *_spread(rng, facts.inserts, sentences(rng, length - 1 - taken), until)]
    turns = [Turn([ID["again"]], tokens[1:])] if task == "repeat" else list(facts.turns)
    rng.shuffle(turns)
    return Document(tokens, turns)


def make_document(
    rng: np.random.Generator,
    task: str,
    length: int,
    *,
    needles: int = 8,
    alphabet: int = SYMBOLS,
    until: float = 1.0,
) -> Document:
    """`draw_facts` and `compose`: a document of exactly `length` tokens and its questions."""
    facts = draw_facts(rng, task, length - 1, needles=needles, alphabet=alphabet)
    return compose(rng, task, facts, length, until)


def _spread(rng, inserts: list[Tokens], filler: list[Tokens], until: float) -> Tokens:
    """Facts in their order at random ends of sentences."""
    places = np.sort(rng.integers(0, int(len(filler) * until) + 1, len(inserts)))
    merged: Tokens = []
    at = 0
    for place, insert in zip(places, inserts, strict=True):
        for sentence in filler[at:place]:
            merged += sentence
        merged += insert
        at = place
    for sentence in filler[at:]:
        merged += sentence
    return merged
