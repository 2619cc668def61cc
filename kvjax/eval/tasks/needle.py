"""A needle at every depth of contexts of every length: the heat map.

After Kamradt 2023 (gkamradt/LLMTest_NeedleInAHaystack), with RULER's needle in place of a sentence
about San Francisco: a number of seven digits, which no model knows and a substring decides.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from kvjax.eval.tasks import words
from kvjax.eval.tasks.example import Document, Task, TaskSettings
from kvjax.eval.tasks.haystack import NOISE, essay_of, read_essay
from kvjax.eval.tasks.lengths import Draft, Sample, document, fit, generator, room, too_short
from kvjax.eval.tasks.ruler_needles import needle, needle_prompt, put_in

_NAME = "needle"
_NEW_TOKENS = 32
_METRIC = "substring"
_DEPTHS = tuple(place / 10 for place in range(11))


def _sample(
    rng: np.random.Generator, essay: Sequence[str] | None, depth: float, length: int
) -> Sample:
    """A unit is a line of RULER's noise, or a word of the essay."""
    key, value = next(words.pairs(rng)), next(words.numbers(rng))
    before, question, lead = needle_prompt("numbers", [key], 1)
    inserted = [needle("numbers", key, value)]

    def build(units: int) -> Draft:
        if essay is None:
            text = "\n".join(put_in([NOISE] * units, inserted, [depth]))
        else:
            text = " ".join(put_in(essay_of(essay, units), inserted, [depth]))
        return Draft(
            context=before + text,
            question=question,
            lead=lead,
            answers=(value,),
            facts={"depth": depth, "length": length},
        )

    return Sample(build=build, least=1)


def _draw(settings: TaskSettings) -> Iterator[Document]:
    essay = None if settings.haystack is None else read_essay(settings.haystack)
    depths = settings.depths or _DEPTHS
    for length in settings.lengths or (settings.length,):
        assert length is not None
        limit, guess = room(settings, _NEW_TOKENS, length), None
        for index in range(settings.count or len(depths)):
            rng = generator(_NAME, settings.seed, length, index)
            sample = _sample(rng, essay, depths[index % len(depths)], length)
            found = fit(sample, settings.tokenizer, limit, guess)
            if found is None:
                raise too_short(_NAME, sample, settings, _NEW_TOKENS, length)
            guess, draft = found
            yield document(f"{_NAME}/{length}/{index}", _NAME, draft, _NEW_TOKENS, _METRIC)


TASK = Task(
    name=_NAME,
    metric=_METRIC,
    source="Needle in a haystack, Kamradt 2023, with the needle of RULER (arXiv 2404.06654)",
    needs=("tokenizer", "length"),
    draw=_draw,
    count=len(_DEPTHS),
)
