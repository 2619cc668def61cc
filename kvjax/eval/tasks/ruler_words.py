"""RULER's aggregation: the most common words of a list, the most frequent coded words.

Source: Hsieh et al. 2024 (arXiv 2404.06654); prompts and parameters from NVIDIA/RULER @c3f5e3b4,
data/synthetic/{constants,common_words_extraction,freq_words_extraction}.py and synthetic.yaml.
"""

import math
import string
from itertools import islice

import numpy as np

from kvjax.eval.tasks import words
from kvjax.eval.tasks.lengths import Draft, Sample

# ---------------------------------------------------------------------------- common words
COMMON = 10
_LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n"
)
_LIST_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_LIST_LEAD = " Answer: The top 10 words that appear most often in the list are:"
# (words of the solved example, how often its common and its other words occur), (of the list).
_LONG = ((40, 10, 3), (30, 3))
_SHORT = ((20, 3, 1), (6, 1))  # below 4,096 tokens


def common_words(rng: np.random.Generator, length: int) -> Sample:
    """A numbered list in which ten words occur most often, after a solved example of one.

    A unit is a different word. `length` tokens decide between RULER's two sets of numbers.
    """
    (shown, *repeats), (often, seldom) = _LONG if length >= 4096 else _SHORT
    drawn = list(islice(words.singles(rng), shown))
    example = _numbered(_repeated(rng, drawn, *repeats))
    before = f"{_LIST}{example}{_LIST_QUESTION}{_LIST_LEAD} {_numbered(drawn[:COMMON])}\n{_LIST}"
    endless, order = words.singles(rng), int(rng.integers(2**32))
    found: list[str] = []

    def build(units: int) -> Draft:
        found.extend(islice(endless, max(units - len(found), 0)))
        shuffled = _repeated(np.random.default_rng(order), found[:units], often, seldom)
        return Draft(
            context=before + _numbered(shuffled),
            question=_LIST_QUESTION,
            lead=_LIST_LEAD,
            answers=tuple(found[:COMMON]),
        )

    return Sample(build=build, least=COMMON + 1)


def _repeated(rng: np.random.Generator, found: list[str], often: int, seldom: int) -> list[str]:
    """The first ten words `often`, the others `seldom`, in random order."""
    every = found[:COMMON] * often + found[COMMON:] * seldom
    return [every[place] for place in rng.permutation(len(every))]


def _numbered(found: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(found, start=1))


# ---------------------------------------------------------------------------- coded words
_ALPHA = 2.0
_ZETA = math.pi**2 / 6  # of _ALPHA
_LETTERS = 6
_NOISE = "..."
_CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most"
    " frequently appeared coded words. "
)
_CODED_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three"
    " most frequently appeared words in the above coded text?"
)
_CODED_LEAD = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
_FEWEST = 79  # from here on the fourth word is always rarer than the third


def frequent_words(rng: np.random.Generator, limit: int) -> Sample:
    """Words of six random letters whose frequencies follow Zipf's law; the first of all is noise.

    A unit is a word before frequencies are rounded down. There are `limit` / 50 different words.
    """
    letters = np.array(list(string.ascii_lowercase))
    different: dict[str, None] = {_NOISE: None}
    while len(different) < max(limit // 50, 8):
        different["".join(rng.choice(letters, _LETTERS))] = None
    coded, order = list(different), int(rng.integers(2**32))
    shares = np.arange(1, len(coded) + 1) ** -_ALPHA / _ZETA

    def build(units: int) -> Draft:
        counts = (units * shares).astype(int)
        text = np.repeat(coded, counts)
        shuffled = np.random.default_rng(order).permutation(text)
        return Draft(
            context=_CODED + " ".join(shuffled),
            question=_CODED_QUESTION,
            lead=_CODED_LEAD,
            answers=tuple(coded[1:4]),
        )

    return Sample(build=build, least=_FEWEST)
