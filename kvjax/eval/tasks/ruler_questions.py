"""RULER's questions about documents, from a file of SQuAD or HotpotQA.

Source: Hsieh et al. 2024 (arXiv 2404.06654); prompts and parameters from NVIDIA/RULER @c3f5e3b4,
data/synthetic/{constants,qa}.py. Files are those of the data sets' authors: SQuAD 2.0's
dev-v2.0.json (1.1 is read too) and HotpotQA's hotpot_dev_distractor_v1.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.eval.tasks.files import list_of, read_json, shortened, text_of, texts_of
from kvjax.eval.tasks.lengths import Draft, Sample

_TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output"
    " any other words."
)
_BEFORE = f"{_TASK}\n\nThe following are given documents.\n\n"
_QUESTION = f"\n\n{_TASK}\n\nQuestion: "
_LEAD = " Answer:"


@dataclass(frozen=True)
class Asked:
    """A question of the data set.

    Attributes:
      query, answers: the question and its accepted answers.
      told: places in the list of paragraphs of those it is about.
      near: places of others of the same article, which are put beside it first.
    """

    query: str
    answers: tuple[str, ...]
    told: tuple[int, ...]
    near: tuple[int, ...] = ()


def read_squad(path: Path) -> tuple[list[Asked], list[str]]:
    """(answerable questions, paragraphs in alphabetical order) of a SQuAD file.

    Raises:
      ValueError: not of that form.
      OSError: it cannot be read.
    """
    value = read_json(path)
    texts: list[list[str]] = []
    found: list[tuple[int, str, dict[str, Any]]] = []
    for number, article in enumerate(list_of(value, "data", str(path))):
        place = f"{path} article {number}"
        texts.append([])
        for one in list_of(article, "paragraphs", place):
            text = text_of(_object(one, place), "context", place)
            texts[-1].append(text)
            for row in list_of(one, "qas", place):
                if not _object(row, place).get("is_impossible", False):
                    found.append((number, text, row))
    paragraphs = sorted({text for article in texts for text in article})
    at = {text: index for index, text in enumerate(paragraphs)}
    asked = []
    for number, text, row in found:
        place = f"{path} article {number}"
        answers = [_object(one, place) for one in list_of(row, "answers", place)]
        told = texts_of({"answers": [one.get("text") for one in answers]}, "answers", place)
        near = tuple(at[other] for other in texts[number] if other != text)
        asked.append(Asked(text_of(row, "question", place), told, (at[text],), near))
    return asked, paragraphs


def read_hotpot(path: Path) -> tuple[list[Asked], list[str]]:
    """(questions, paragraphs in alphabetical order) of a HotpotQA file; a title is a line.

    Raises:
      ValueError: not of that form.
      OSError: it cannot be read.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} is {shortened(rows)}, expected a list of questions")
    texts = []
    for number, row in enumerate(rows):
        place = f"{path} question {number}"
        texts.append([_paragraph(pair, place) for pair in list_of(row, "context", place)])
    paragraphs = sorted({text for told in texts for text in told})
    at = {text: index for index, text in enumerate(paragraphs)}
    asked = []
    for number, (row, told) in enumerate(zip(rows, texts, strict=True)):
        place = f"{path} question {number}"
        answer = text_of(row, "answer", place)
        places = tuple(dict.fromkeys(at[text] for text in told))
        asked.append(Asked(text_of(row, "question", place), (answer,), places))
    return asked, paragraphs


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} has {shortened(value)}, expected a JSON object")
    return value


def _paragraph(pair: Any, place: str) -> str:
    match pair:
        case [str(title), [*sentences]] if all(isinstance(one, str) for one in sentences):
            return f"{title}\n{''.join(sentences)}"
    raise ValueError(f'{place}: "context" has {shortened(pair)}, expected [title, [sentences]]')


def questions(rng: np.random.Generator, asked: Asked, paragraphs: list[str]) -> Sample:
    """A question with its paragraphs among others; a unit is a paragraph.

    Those of the same article come before those of others; a file that has too few is repeated.
    """
    near = [asked.near[place] for place in rng.permutation(len(asked.near))]
    known = {*asked.told, *near}
    far = [place for place in rng.permutation(len(paragraphs)).tolist() if place not in known]
    every, order = [*asked.told, *near, *far], int(rng.integers(2**32))

    def build(units: int) -> Draft:
        chosen = (every * -(-units // len(every)))[:units]
        shuffled = np.random.default_rng(order).permutation(chosen)
        told = [f"Document {i}:\n{paragraphs[place]}" for i, place in enumerate(shuffled, start=1)]
        return Draft(
            context=_BEFORE + "\n\n".join(told),
            question=_QUESTION + asked.query,
            lead=_LEAD,
            answers=asked.answers,
        )

    return Sample(build=build, least=len(asked.told))
