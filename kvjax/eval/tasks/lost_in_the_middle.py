"""Lost in the middle: the value of one key of a large JSON object of UUIDs.

Source: Liu et al. 2023 (arXiv 2307.03172); prompt and score from nelson-liu/lost-in-the-middle
@29b8a6d0 (prompts/kv_retrieval.prompt, make_kv_retrieval_data.py, evaluate_kv_responses.py). Its
files can be read, zipped or not.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.eval.tasks import words
from kvjax.eval.tasks.example import Document, Task, TaskSettings
from kvjax.eval.tasks.files import list_of, read_rows, shortened, text_of
from kvjax.eval.tasks.lengths import (
    Draft,
    Sample,
    check_fits,
    document,
    fit,
    generator,
    room,
    too_short,
)

_NAME = "lost-in-the-middle/kv"
_NEW_TOKENS = 100
_METRIC = "substring"
_COUNT = 500
_BEFORE = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
)
_QUESTION = '\n\nKey: "{key}"\nCorresponding value:'

Pair = tuple[str, str]


def _draft(pairs: Sequence[Pair], place: int) -> Draft:
    """The prompt that asks for the pair at `place`."""
    told = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
    key, value = pairs[place]
    return Draft(
        context=f"{_BEFORE}{{{told}}}",
        question=_QUESTION.format(key=key),
        answers=(value,),
        facts={"keys": len(pairs), "position": place},
    )


def _sample(rng: np.random.Generator, depth: float | None) -> Sample:
    """A unit is a pair; without a depth, chance chooses the one that is asked for."""
    chosen, ids, pairs = rng.random(), words.uuids(rng), list[Pair]()

    def build(units: int) -> Draft:
        pairs.extend((next(ids), next(ids)) for _ in range(units - len(pairs)))
        place = int(chosen * units) if depth is None else int(depth * (units - 1))
        return _draft(pairs[:units], place)

    return Sample(build=build, least=2)


def _draw(settings: TaskSettings) -> Iterator[Document]:
    limit, guess = room(settings, _NEW_TOKENS), None
    depths = settings.depths or (None,)
    for index in range(settings.count or _COUNT):
        rng, depth = generator(_NAME, settings.seed, index), depths[index % len(depths)]
        sample = _sample(rng, depth)
        found = fit(sample, settings.tokenizer, limit, guess)
        if found is None:
            raise too_short(_NAME, sample, settings, _NEW_TOKENS)
        guess, draft = found
        yield document(f"{_NAME}/{index}", _NAME, draft, _NEW_TOKENS, _METRIC)


def _read(path: Path, settings: TaskSettings) -> Iterator[Document]:
    """Rows of a file; with depths, the pair that is asked for is moved there."""
    for index, (place, row) in enumerate(read_rows(path)):
        if index == settings.count:
            return
        pairs = [_pair(pair, place) for pair in list_of(row, "ordered_kv_records", place)]
        asked = (text_of(row, "key", place), text_of(row, "value", place))
        if asked not in pairs:
            raise ValueError(f'{place}: "key" {asked[0]} has not its "value", expected the pair')
        if settings.depths:
            pairs.remove(asked)
            depth = settings.depths[index % len(settings.depths)]
            pairs.insert(int(depth * len(pairs)), asked)
        draft = _draft(pairs, pairs.index(asked))
        check_fits(settings, place, draft, _NEW_TOKENS)
        yield document(f"{_NAME}/{index}", _NAME, draft, _NEW_TOKENS, _METRIC)


def _pair(value: Any, place: str) -> Pair:
    match value:
        case [str(key), str(held)]:
            return key, held
    raise ValueError(f'{place}: "ordered_kv_records" has {shortened(value)}, expected [key, value]')


TASK = Task(
    name=_NAME,
    metric=_METRIC,
    source="Lost in the middle, Liu et al. 2023 (arXiv 2307.03172),"
    " nelson-liu/lost-in-the-middle @29b8a6d0",
    needs=("tokenizer", "length"),
    draw=_draw,
    read=_read,
    files=("kv.jsonl", "kv.jsonl.gz"),
    count=_COUNT,
)
