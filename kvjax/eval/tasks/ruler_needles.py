"""RULER's needles in a haystack and its variable tracking.

Source: Hsieh et al. 2024 (arXiv 2404.06654); prompts and parameters from NVIDIA/RULER @c3f5e3b4,
data/synthetic/{constants,niah,variable_tracking}.py and synthetic.yaml. Random choices are NumPy's,
so a seed does not give the same documents as there.
"""

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np

from kvjax.eval.tasks import words
from kvjax.eval.tasks.haystack import DEPTHS, NOISE, essay_of
from kvjax.eval.tasks.lengths import Draft, Sample, largest, tokens_of

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_BEFORE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n"
)
_QUESTION = (
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
# Where one value is asked for.
_BEFORE_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n"
)
_QUESTION_ONE = (
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
_DRAWN = {"words": words.pairs, "numbers": words.numbers, "uuids": words.uuids}


@dataclass(frozen=True, kw_only=True)
class Needles:
    """One of RULER's needle tasks.

    Attributes:
      haystack: "noise" (a sentence a line), "essay" or "needle" (needles of other keys).
      key_kind, value_kind: what keys and values are.
      keys, values, queries: different keys, values of each, and keys that are asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    key_kind: Literal["words", "uuids"] = "words"
    value_kind: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLES = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(haystack="essay"),
    "niah_single_3": Needles(haystack="essay", value_kind="uuids"),
    "niah_multikey_1": Needles(haystack="essay", keys=4),
    "niah_multikey_2": Needles(haystack="needle"),
    "niah_multikey_3": Needles(haystack="needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles(haystack="essay", values=4),
    "niah_multiquery": Needles(haystack="essay", keys=4, queries=4),
}


def needle(kind: str, key: str, value: str) -> str:
    """The sentence that says a key's value."""
    return _NEEDLE.format(kind=kind, key=key, value=value)


def needle_prompt(kind: str, queries: Sequence[str], values: int) -> tuple[str, str, str]:
    """(what precedes the haystack, question, lead) for `values` values of each query."""
    one = len(queries) * values == 1
    before, (question, lead) = (_BEFORE_ONE, _QUESTION_ONE) if one else (_BEFORE, _QUESTION)
    kind = kind[:-1] if one else kind
    query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    return (
        before.format(kind=kind),
        question.format(kind=kind, query=query),
        lead.format(kind=kind, query=query),
    )


def niah(rng: np.random.Generator, task: Needles, essay: Sequence[str] | None) -> Sample:
    """A document of a needle task; an essay task without an essay has noise for it.

    A unit is a line, or a word of the essay. Facts say what the haystack is.
    """
    haystack = "noise" if task.haystack == "essay" and essay is None else task.haystack
    keys, values = _DRAWN[task.key_kind](rng), _DRAWN[task.value_kind](rng)
    pairs = [(key, list(islice(values, task.values))) for key in islice(keys, task.keys)]
    needles = [needle(task.value_kind, key, value) for key, told in pairs for value in told]
    rng.shuffle(needles)
    asked = [pairs[place] for place in rng.permutation(task.keys)[: task.queries]]
    before, question, lead = needle_prompt(task.value_kind, [key for key, _ in asked], task.values)
    depths = np.sort(rng.choice(DEPTHS, len(needles), replace=False)) / 100
    spread = np.sort(rng.random(len(needles)))
    others: list[str] = []

    def text(units: int) -> str:
        if haystack == "essay" and essay is not None:
            return " ".join(put_in(essay_of(essay, units), needles, depths))
        if haystack == "noise":
            return "\n".join(put_in([NOISE] * units, needles, spread))
        missing = range(units - len(others))  # those of a smaller size are the same
        others.extend(needle(task.value_kind, next(keys), next(values)) for _ in missing)
        return "\n".join(put_in(others[:units], needles, spread))

    def build(units: int) -> Draft:
        return Draft(
            context=before + text(units),
            question=question,
            lead=lead,
            answers=tuple(value for _, told in asked for value in told),
            facts={"haystack": haystack},
        )

    return Sample(build=build, least=len(needles))


def put_in(
    sentences: Sequence[str], needles: Sequence[str], depths: Sequence[float] | np.ndarray
) -> Iterator[str]:
    """Sentences with the needles between them, each after the share `depths` of the sentences."""
    at = 0
    for depth, inserted in zip(depths, needles, strict=True):
        place = int(len(sentences) * depth)
        yield from sentences[at:place]
        yield inserted
        at = place
    yield from sentences[at:]


# ---------------------------------------------------------------------------- variable tracking
HOPS = 4
_TRACK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_TRACK_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
_TRACK_LEAD = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables"
    " are assigned the value {value}, they are: "
)
_EXAMPLE_TOKENS = 500  # of the solved example, at lengths of 2,000 and more


def tracking(rng: np.random.Generator, tokenizer: Any, limit: int) -> Sample:
    """A chain of variables in noise, after a solved example of RULER's 500 tokens.

    At lengths below 2,000 the example takes a quarter of the prompt, or as much as its chain needs.
    A unit is a line of noise.
    """
    shown, example = _chain(rng, 3)
    names, asked = _chain(rng, 5)

    def solved(lines: int) -> str:
        return "".join(example(lines)) + " " + " ".join(shown) + "\n\n"

    most, fewest = min(_EXAMPLE_TOKENS, limit // 4), HOPS + 1
    lines = largest(lambda n: len(tokens_of(tokenizer, solved(n))), most, fewest, most + fewest)
    before = solved(lines or fewest)

    def build(units: int) -> Draft:
        context, question, lead = asked(units)
        return Draft(context=before + context, question=question, lead=lead, answers=names)

    return Sample(build=build, least=fewest)


def _chain(
    rng: np.random.Generator, letters: int
) -> tuple[tuple[str, ...], Callable[[int], tuple[str, str, str]]]:
    """(variables of one value, their prompt among so many lines: context, question, lead)."""
    found: dict[str, None] = {}
    while len(found) <= HOPS:
        found["".join(rng.choice(list(string.ascii_uppercase), letters))] = None
    names, value = tuple(found), str(rng.integers(10_000, 99_999))
    links = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    spread = np.sort(rng.random(len(links)))

    def prompt(lines: int) -> tuple[str, str, str]:
        return (
            _TRACK + "\n".join(put_in([NOISE] * lines, links, spread)),
            _TRACK_QUESTION.format(value=value),
            _TRACK_LEAD.format(count=len(names), value=value),
        )

    return names, prompt
