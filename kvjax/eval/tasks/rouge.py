"""ROUGE-L and edit similarity, from longest common subsequences (LCS).

Sources: ROUGE-L, Lin 2004, in the form of the `rouge` package 1.0.1 (pltrdy/rouge), which LongBench
scores with: of a whole summary, over distinct words. Edit similarity is `fuzz.ratio` of fuzzywuzzy
0.18 as it is with python-Levenshtein.
"""

from collections.abc import Sequence

import numpy as np


def lcs_table(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """`[len(first) + 1, len(second) + 1]` int32: LCS lengths of all pairs of beginnings."""
    number: dict[str, int] = {}
    ids = [np.array([number.setdefault(x, len(number)) for x in xs]) for xs in (first, second)]
    table = np.zeros((len(first) + 1, len(second) + 1), np.int32)
    for row, item in enumerate(ids[0]):
        longer = table[row, :-1] + (ids[1] == item)
        np.maximum.accumulate(np.maximum(table[row, 1:], longer), out=table[row + 1, 1:])
    return table


def lcs(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One longest common subsequence.

    Of several it is the one that reading from the ends finds, which leaves an item of `first` out
    only where that alone keeps the length.
    """
    table = lcs_table(first, second)
    found = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def rouge_l(prediction: str, reference: str) -> float:
    """The F-measure of ROUGE-L between two texts, 0..1; 0 where either is empty.

    Texts are split into sentences at full stops. Each sentence of the reference is compared with
    each of the prediction; the distinct words of all these subsequences are what matches.
    """
    ours, theirs = _sentences(prediction), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    matched: set[str] = set()
    for sentence in theirs:
        for other in ours:
            matched.update(lcs(sentence, other))
    precision = len(matched) / len({word for sentence in ours for word in sentence})
    recall = len(matched) / len({word for sentence in theirs for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    # The package keeps a sentence of spaces alone as one empty word, and counts it.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def ratio(first: str, second: str) -> float:
    """Edit similarity 0..1 in whole hundredths: 2 LCS / (both lengths); 1 for equal texts."""
    if first == second:
        return 1.0
    if not first or not second:
        return 0.0
    common = int(lcs_table(first, second)[-1, -1])
    return round(100 * 2 * common / (len(first) + len(second))) / 100
