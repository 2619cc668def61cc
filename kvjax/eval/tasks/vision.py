"""Pictures and what is said of them: the evaluation of PrefixKV (Wang et al. 2025).

"vision/perplexity": the answer that a file has is scored after the compressed prompt.
"vision/rouge": the model's answer is compared with its own from the full cache. Files are in their
authors' forms, their pictures named from their folder or from `images/` in it:

- `detail_1k.json` (LLaVA-Description): rows of "image", "conversations" (two "value"s);
- `mm-vet.json` (MM-Vet): rows of "image" or "imagename", "question", "answer";
- `questions.jsonl` (LLaVA-Bench): "question_id", "image", "text"; answers, by "question_id", in
  a file of their own, `answers_gpt4.jsonl`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from kvjax.eval.tasks.example import IMAGE, Ask, Document, Task, TaskSettings
from kvjax.eval.tasks.files import list_of, read_json, read_rows, shortened, text_of

FILES = ("detail_1k.json", "mm-vet.json", "questions.jsonl")
ANSWERS = "answers_gpt4.jsonl"


def _read(name: str, path: Path, settings: TaskSettings) -> Iterator[Document]:
    for made, (place, row, answer) in enumerate(islice(_rows(path), settings.count)):
        prompt, answer = _asked(row, answer, place)
        if name == "vision/perplexity" and not answer.strip():
            raise ValueError(f"{place} has no answer, expected one that can be scored")
        ask = Ask(
            id=f"{name}/{made}/0",
            question="",
            answers=(answer,),
            new_tokens=settings.continuation,
            metric="perplexity" if name == "vision/perplexity" else "rouge-l",
        )
        picture = str(_picture(row, path.parent, place))
        yield Document(
            id=f"{name}/{made}", task=name, context=prompt, asks=(ask,), images=(picture,)
        )


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Each row's place, the row, and what another file answers to it."""
    if path.suffix == ".jsonl":
        answers: dict[Any, str] = {}
        if (given := path.parent / ANSWERS).is_file():
            answers = {r.get("question_id"): text_of(r, "text", p) for p, r in read_rows(given)}
        for place, row in read_rows(path):
            yield place, row, answers.get(row.get("question_id"), "")
        return
    value = read_json(path)
    rows = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} is {shortened(value)}, expected a list of at least one row")
    for number, row in enumerate(rows, start=1):
        place = f"{path} row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{place} is {shortened(row)}, expected an object")
        yield place, row, ""


def _asked(row: Mapping[str, Any], answer: str, place: str) -> tuple[str, str]:
    """The prompt, in which `<image>` stands for the picture, and the answer."""
    if "conversations" in row:
        turns = list_of(row, "conversations", place)
        if len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
            raise ValueError(f"{place}: conversations has no question and answer, expected both")
        prompt, answer = (text_of(turn, "value", place) for turn in turns[:2])
    elif "question" in row:
        # PrefixKV's own script puts the picture behind MM-Vet's questions.
        prompt = text_of(row, "question", place) + f"\n{IMAGE}"
        answer = text_of(row, "answer", place)
    else:
        prompt = f"{IMAGE}\n" + text_of(row, "text", place)
    if prompt.count(IMAGE) != 1:
        raise ValueError(f"{place} has {prompt.count(IMAGE)} times {IMAGE}, expected it once")
    return prompt, answer


def _picture(row: Mapping[str, Any], folder: Path, place: str) -> Path:
    name = text_of(row, "imagename" if "imagename" in row else "image", place)
    found = next((p for p in (folder / name, folder / "images" / name) if p.is_file()), None)
    if found is None:
        raise ValueError(f"{place}: picture {name} is neither in {folder} nor in its images/")
    return found


def _task(name: str, metric: str) -> Task:
    return Task(
        name=name,
        metric=metric,
        source="PrefixKV (Wang et al. 2025), its eval_ppl.py and eval_rouge.py",
        needs=("data",),
        read=partial(_read, name),
        files=FILES,
    )


TASKS = (_task("vision/perplexity", "perplexity"), _task("vision/rouge", "rouge-l"))
