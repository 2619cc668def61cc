"""Compute means with bootstrap intervals, for many methods at once.

A values, one for each question asked; C cells, one for each method and budget; N documents of a
stratum (a task). Documents are drawn anew, not questions: questions about one text stand or fall
together. All cells of a stratum see the same draws, so that a difference of two is paired.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int, UInt

DRAWS = 2000
_SEED = 20240704
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean over strata of their means.

    Attributes:
      mean, low, high: and its 95 % interval.
      questions, documents, strata: how many it is made of.
    """

    mean: float
    low: float
    high: float
    questions: int
    documents: int
    strata: int


@lru_cache(maxsize=64)
def draws(stratum: str, documents: int) -> UInt[np.ndarray, "R N"]:
    """How often each document was drawn, in `DRAWS` draws of as many documents as there are."""
    rng = np.random.default_rng([_SEED, zlib.crc32(stratum.encode())])
    even = np.full(documents, 1 / documents)
    kind = np.uint16 if documents < 2**16 else np.uint32
    return rng.multinomial(documents, even, DRAWS).astype(kind)


def estimates(
    values: Float[np.ndarray, "C A"],
    strata: Sequence[str] | np.ndarray,
    documents: Int[np.ndarray, " A"],
) -> list[Estimate | None]:
    """Each cell's estimate, None where it has no value.

    Args:
      values: NaN where a cell has no answer to a question.
      strata: each question's; equal ones lie side by side.
      documents: each question's; equal ones lie side by side.
    """
    found: list[Estimate | None] = [None] * len(values)
    present_CA = ~np.isnan(values)
    alike: dict[bytes, list[int]] = {}
    for cell, mask in enumerate(present_CA):
        if mask.any():
            alike.setdefault(mask.tobytes(), []).append(cell)
    names = np.asarray(strata)
    for cells in alike.values():
        columns = np.flatnonzero(present_CA[cells[0]])
        mine = _of_complete(values[np.ix_(cells, columns)], names[columns], documents[columns])
        for cell, estimate in zip(cells, mine, strict=True):
            found[cell] = estimate
    return found


def _of_complete(
    values: Float[np.ndarray, "C A"], strata: np.ndarray, documents: Int[np.ndarray, " A"]
) -> list[Estimate]:
    starts = _starts(strata)
    means = np.zeros(len(values))
    drawn = np.zeros((DRAWS, len(values)))
    count = 0
    for start, end in zip(starts, [*starts[1:], len(strata)], strict=True):
        firsts = np.asarray(_starts(documents[start:end]))
        sums_NC = np.add.reduceat(values[:, start:end].T, firsts, axis=0)
        asked_N = np.diff([*firsts, end - start])
        weights_RN = draws(str(strata[start]), len(firsts)).astype(np.float64)
        drawn += (weights_RN @ sums_NC) / (weights_RN @ asked_N)[:, None] / len(starts)
        means += sums_NC.sum(axis=0) / (end - start) / len(starts)
        count += len(firsts)
    low, high = np.quantile(drawn, _QUANTILES, axis=0)
    return [
        Estimate(float(mean), float(a), float(b), len(strata), count, len(starts))
        for mean, a, b in zip(means, low, high, strict=True)
    ]


def _starts(runs: np.ndarray) -> list[int]:
    """Where each run of equal values begins."""
    return [0, *(np.flatnonzero(runs[1:] != runs[:-1]) + 1).tolist()]
