"""Write haystacks: sentences of a small grammar whose words prefer certain neighbours.

    article adjective* subject verb article adjective* object (preposition the place)? adverb? .

Each word's successors are drawn from its own Zipf-like order over the next class, so that a model
gains by looking at the words just before: local structure, unlike uniform noise.
"""

import numpy as np

from kvjax.tiny.vocabulary import FILLER, ID

Tokens = list[int]

# (class in the vocabulary, where the sentence goes on with what weight). Roles that share a class
# are told apart by their index.
_GRAMMAR = [
    ("article", {1: 0.5, 2: 0.5}),
    ("adjective", {1: 0.1, 2: 0.9}),
    ("subject", {3: 1.0}),
    ("verb", {4: 0.85, 10: 0.15}),
    ("article", {5: 0.5, 6: 0.5}),
    ("adjective", {5: 0.1, 6: 0.9}),
    ("object", {7: 0.45, 9: 0.15, 10: 0.4}),
    ("preposition", {8: 1.0}),
    ("place", {9: 0.15, 10: 0.85}),
    ("adverb", {10: 1.0}),
    ("stop", {}),
]
_CHOICES = 256  # entries of a state's table: probabilities are multiples of 1 / 256
_LONGEST = 24


def _build() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token of each state, table of successors [states, choices], first states)."""
    rng = np.random.default_rng(20)  # the language itself: one for ever
    states: list[int] = []
    members: list[range] = []
    for name, _ in _GRAMMAR:
        words = FILLER.get(name, ["."])
        members.append(range(len(states), len(states) + len(words)))
        states += [ID[word] for word in words]
    table = np.zeros((len(states), _CHOICES), np.int32)
    for (_, following), own in zip(_GRAMMAR, members, strict=True):
        for state in own:
            table[state] = state if not following else _successors(rng, following, members)
    first = np.array(members[0])
    return np.array(states), table, first


def _successors(rng, following: dict[int, float], members: list[range]) -> np.ndarray:
    options, weights = [], []
    for role, weight in following.items():
        zipf = 1 / np.arange(1, len(members[role]) + 1)
        options += rng.permutation(members[role]).tolist()
        weights += (weight * zipf / zipf.sum()).tolist()
    edges = np.cumsum(weights) / np.sum(weights)
    return np.array(options)[np.searchsorted(edges, (np.arange(_CHOICES) + 0.5) / _CHOICES)]


_TOKENS, _TABLE, _FIRST = _build()


def sentences(rng: np.random.Generator, total: int) -> list[Tokens]:
    """Sentences that have `total` tokens together; the last one may be cut short."""
    found: list[Tokens] = []
    while total > 0:
        count = total // 8 + 1
        state = rng.choice(_FIRST, count)
        drawn = [state]
        for choice in rng.integers(_CHOICES, size=(_LONGEST - 1, count)):
            state = _TABLE[state, choice]
            drawn.append(state)
        tokens = _TOKENS[np.stack(drawn, 1)]
        for row in tokens.tolist():
            end = row.index(ID["."]) + 1 if ID["."] in row else _LONGEST
            found.append(row[: min(end, total)])
            total -= len(found[-1])
            if total <= 0:
                break
    return found
