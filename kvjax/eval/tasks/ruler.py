"""RULER's thirteen tasks, drawn for any tokenizer and length or read from RULER's own files.

A document is as long as fits: the haystack of each is measured anew, where RULER takes one size for
all of a task and steps down where a document exceeds it. At lengths below 4,096 tokens, for which
RULER has no settings, numbers follow its own short forms.

Source: Hsieh et al. 2024 (arXiv 2404.06654); parameters from NVIDIA/RULER @c3f5e3b4. The question
is apart from the context and the answer prefix is the lead, so that both protocols can be run.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from kvjax.eval.tasks.example import Document, Task, TaskSettings
from kvjax.eval.tasks.files import read_rows, text_of, texts_of
from kvjax.eval.tasks.haystack import read_essay
from kvjax.eval.tasks.lengths import (
    Draft,
    Sample,
    check_fits,
    document,
    drawn,
    fit,
    generator,
    room,
    too_short,
)
from kvjax.eval.tasks.ruler_needles import NEEDLES, niah, tracking
from kvjax.eval.tasks.ruler_questions import questions, read_hotpot, read_squad
from kvjax.eval.tasks.ruler_words import common_words, frequent_words

SOURCE = "RULER, Hsieh et al. 2024 (arXiv 2404.06654), NVIDIA/RULER @c3f5e3b4"
COUNT = 500
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
# How the question and the answer prefix of a finished prompt begin.
_BEGIN = {
    "niah": ("\nWhat ", " The special magic "),
    "vt": ("\nQuestion: Find all variables ", " Answer: According to "),
    "cwe": ("\nQuestion: What are the 10 ", " Answer: The top 10 "),
    "fwe": ("\nQuestion: Do not provide ", " Answer: According to "),
    "qa": ("\n\nAnswer the question based ", " Answer:"),
}
_READ = {"qa_1": read_squad, "qa_2": read_hotpot}
_FILES = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}  # as RULER names them


def _family(name: str) -> str:
    return name.split("_")[0]


def _draw(name: str, settings: TaskSettings) -> Iterator[Document]:
    essay = None
    if name in NEEDLES and NEEDLES[name].haystack == "essay" and settings.haystack is not None:
        essay = read_essay(settings.haystack)

    def sample(rng: np.random.Generator, limit: int) -> Sample:
        if name in NEEDLES:
            return niah(rng, NEEDLES[name], essay)
        if name == "vt":
            return tracking(rng, settings.tokenizer, limit)
        if name == "cwe":
            return common_words(rng, settings.length or 0)
        return frequent_words(rng, limit)

    new = NEW_TOKENS[_family(name)]
    return drawn(f"ruler/{name}", settings, COUNT, new, "match-all", sample)


def _ask(name: str, settings: TaskSettings) -> Iterator[Document]:
    """Questions in the file's order; those whose own paragraphs are too long are left out."""
    assert settings.data is not None
    path = Path(settings.data)
    asked, paragraphs = _READ[name](path / _FILES[name] if path.is_dir() else path)
    if not asked:
        raise ValueError(f"{path} has no question with an answer, expected at least one")
    task, new, made, guess = f"ruler/{name}", NEW_TOKENS["qa"], 0, None
    limit = room(settings, new)
    for index, question in enumerate(asked):
        sample = questions(generator(task, settings.seed, index), question, paragraphs)
        found = fit(sample, settings.tokenizer, limit, guess)
        if found is None:
            continue
        guess, draft = found
        yield document(f"{task}/{index}", task, draft, new, "match-part")
        made += 1
        if made == (settings.count or COUNT):
            return
    if not made:
        raise too_short(task, sample, settings, new)


def _read(name: str, path: Path, settings: TaskSettings) -> Iterator[Document]:
    """Finished prompts in RULER's form: "input", "outputs", and "answer_prefix" in newer files."""
    task, new = f"ruler/{name}", NEW_TOKENS[_family(name)]
    metric = "match-part" if _family(name) == "qa" else "match-all"
    question, lead = _BEGIN[_family(name)]
    for index, (place, row) in enumerate(read_rows(path)):
        if index == settings.count:
            return
        text = text_of(row, "input", place)
        at = text.rfind(question)
        if at < 0:
            raise ValueError(f'{place}: "input" has no {question!r}, expected a prompt of {task}')
        if "answer_prefix" in row:
            end, prefix = len(text), text_of(row, "answer_prefix", place)
        else:
            end = text.rfind(lead, at)
            end = len(text) if end < 0 else end
            prefix = text[end:]
        answers = texts_of(row, "outputs", place)
        draft = Draft(context=text[:at], question=text[at:end], answers=answers, lead=prefix)
        check_fits(settings, place, draft, new)
        yield document(f"{task}/{index}", task, draft, new, metric)


def _task(name: str) -> Task:
    of_file = _family(name) == "qa"
    return Task(
        name=f"ruler/{name}",
        metric="match-part" if of_file else "match-all",
        source=SOURCE,
        needs=("tokenizer", "length", "data") if of_file else ("tokenizer", "length"),
        draw=partial(_ask if of_file else _draw, name),
        read=partial(_read, name),
        files=(f"{name}/validation.jsonl", f"{name}.jsonl"),
        count=COUNT,
    )


TASKS = tuple(_task(name) for name in (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2"))
