"""Texts for `make real`, as token ids that kvjax and its peers read alike.

    python -m kvjax.studies.real_texts --model FOLDER --novel war_and_peace.txt \\
        -o build/real/texts.jsonl

A text is a prompt whose cache is compressed, and what follows it:

    novel    a prefix of a novel, and its next 64 tokens
    unseen   1,000 tokens of the novel that hide eight facts, and eight questions with their answers
    seen     the same with a question at its end, and the answer

There is no chat template, so that the ids are all that two implementations have to share.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.eval.tasks.ruler_needles import put_in
from kvjax.inputs.prompts import encoded
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.settings import replacing

# Tokens of prefixes, and how many texts of each.
PREFIXES = {1024: 16, 2048: 8, 4096: 4}
CONTINUATION = 64
CONTEXTS, FACTS, CONTEXT_TOKENS = 25, 8, 1000
SEEN = 2  # questions of each context that are asked at its end
SUBJECTS = (
    "The number of the train to Lisbon is",
    "The code of the blue door is",
    "The price of the old piano is",
    "The telephone number of the hotel is",
    "The weight of the iron bell is",
    "The password of the library is",
    "The length of the northern bridge is",
    "The population of the island is",
    "The serial number of the camera is",
    "The height of the volcano is",
    "The license plate of the yellow taxi is",
    "The combination of the bank safe is",
    "The area of the vineyard is",
    "The frequency of the radio station is",
    "The ticket that won the lottery is",
    "The catalogue entry of the comet is",
)
_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Text:
    """A prompt, and what follows its compressed cache.

    Attributes:
      part: "novel", "unseen" or "seen".
      name: tells it from the others of its part.
      prompt: ids that are compressed.
      follows: rows of ids, each right after the prompt.
      judged: how many tokens at the end of each row count.
    """

    part: str
    name: str
    prompt: list[int]
    follows: list[list[int]]
    judged: list[int]


def read_texts(path: str | Path) -> list[Text]:
    """The texts of a file that this module wrote.

    Raises:
      OSError: it cannot be read.
    """
    return [Text(**json.loads(line)) for line in Path(path).read_text().splitlines()]


def write_texts(texts: Iterable[Text], path: str | Path) -> None:
    """Write texts, one JSON line each."""
    lines = [json.dumps(dataclasses.asdict(text)) + "\n" for text in texts]
    with replacing(path) as part:
        part.write_text("".join(lines))


def sentences_from(novel: str, place: float) -> list[str]:
    """Sentences of the novel after the share `place` of it; a line's end is a space."""
    start = int(len(novel) * place)
    return _END.split(" ".join(novel[start : start + 40_000].split()))[1:]


def novel_texts(novel: str, tokenizer: Any) -> Iterator[Text]:
    """Prefixes from places that lie evenly over the novel, and what follows them."""
    total, done = sum(PREFIXES.values()), 0
    for tokens, count in PREFIXES.items():
        for number in range(count):
            text = " ".join(sentences_from(novel, (done + 0.5) / total))
            ids = encoded(text, tokenizer, special=False)[: tokens + CONTINUATION]
            rest = ids[tokens:]
            yield Text("novel", f"{tokens}-{number:02}", ids[:tokens], [rest], [len(rest)])
            done += 1


def fact_texts(novel: str, tokenizer: Any, seed: int = 0) -> Iterator[Text]:
    """Contexts with facts and all questions after each; then copies that end with a question.

    A fact gives a subject a number of four digits, and its question is the subject again.
    """
    contexts = []
    for number in range(CONTEXTS):
        rng = np.random.default_rng([seed, number])
        subjects = [SUBJECTS[place] for place in rng.permutation(len(SUBJECTS))[:FACTS]]
        values = [str(value) for value in rng.integers(1000, 10_000, FACTS)]
        facts = [f"{subject} {value}." for subject, value in zip(subjects, values, strict=True)]
        depths = (np.arange(FACTS) + rng.random(FACTS)) / FACTS
        sentences = sentences_from(novel, (number + 0.25) / CONTEXTS)
        context = _filled(sentences, facts, depths, tokenizer)
        asked = [encoded(f"\n\n{subject}", tokenizer, special=False) for subject in subjects]
        answers = [encoded(f" {value}", tokenizer, special=False) for value in values]
        contexts.append((context, asked, answers))
        rows = [[*q, *a] for q, a in zip(asked, answers, strict=True)]
        yield Text("unseen", f"{number:02}", context, rows, list(map(len, answers)))
    for copy in range(SEEN):
        for number, (context, asked, answers) in enumerate(contexts):
            place = (number + copy * FACTS // SEEN) % FACTS
            prompt, answer = [*context, *asked[place]], answers[place]
            yield Text("seen", f"{number:02}-{place}", prompt, [answer], [len(answer)])


def _filled(sentences, facts, depths, tokenizer) -> list[int]:
    """CONTEXT_TOKENS tokens of sentences with the facts between them; the last one may be cut."""

    def ids(count: int) -> list[int]:
        text = " ".join([*put_in(sentences[:count], facts, depths), *sentences[count : count + 9]])
        return encoded(text, tokenizer, special=False)

    low, high = 1, len(sentences)
    while low < high:
        middle = (low + high + 1) // 2
        text = " ".join(put_in(sentences[:middle], facts, depths))
        fits = len(encoded(text, tokenizer, special=False)) <= CONTEXT_TOKENS
        low, high = (middle, high) if fits else (low, middle - 1)
    return ids(low)[:CONTEXT_TOKENS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="whose tokenizer makes the ids")
    parser.add_argument("--novel", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    novel, tokenizer = options.novel.read_text(encoding="utf-8-sig"), load_tokenizer(options.model)
    texts = [*novel_texts(novel, tokenizer), *fact_texts(novel, tokenizer)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_texts(texts, options.output)


if __name__ == "__main__":
    main()
