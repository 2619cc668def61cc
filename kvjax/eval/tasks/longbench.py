"""LongBench's 21 tasks, from its own files: one JSON object a line.

Rows about the same context become one document. A prompt that is longer than `length` loses its
middle, as in LongBench (which gives 32k models prompts of 31,500 tokens, the answer not counted); a
document with several questions is cut once, for the longest of them. The six few-shot and code
tasks get no chat template (`Task.chat`), as in LongBench.

Source: Bai et al. 2023 (arXiv 2308.14508), THUDM/LongBench @2e00731f. Two things are not done: the
templates of certain chat models are not LongBench's but the tokenizer's own, and "samsum" does not
end at the first line break while it is generated (only that line counts).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvjax.config import ConfigError
from kvjax.eval.tasks.example import Ask, Document, Task, TaskSettings
from kvjax.eval.tasks.files import read_rows, text_of, texts_of
from kvjax.eval.tasks.lengths import cut_middle, prompt_tokens, room, tokens_of
from kvjax.eval.tasks.longbench_prompts import PLAIN, PROMPTS

SOURCE = "LongBench, Bai et al. 2023 (arXiv 2308.14508), THUDM/LongBench @2e00731f"
_NUMBERED = {"retrieval": "Paragraph ", "retrieval-zh": "段落"}


def _read(name: str, path: Path, settings: TaskSettings) -> Iterator[Document]:
    groups: dict[str, list[tuple[str, Ask]]] = defaultdict(list)
    for index, (place, row) in enumerate(read_rows(path)):
        ask = _ask(name, row, place, index)
        groups[text_of(row, "context", place)].append((place, ask))
    for context, placed in list(groups.items())[: settings.count]:
        asks = [ask for _, ask in placed]
        before = PROMPTS[name].template.split("{context}")[0]
        text, told = _shortened(before + context, asks, settings)
        yield Document(id=asks[0].id, task=f"longbench/{name}", context=text, asks=tuple(told))


def _ask(name: str, row: dict[str, Any], place: str, index: int) -> Ask:
    prompt = PROMPTS[name]
    dataset = row.get("dataset", name)
    if dataset not in (name, f"{name}_e"):
        raise ValueError(f'{place}: "dataset" is {dataset!r}, expected {name!r}')
    answers = texts_of(row, "answers", place)
    begin = _NUMBERED.get(prompt.metric, "")
    for answer in answers:
        if begin and not answer.partition(begin)[2][:1].isdigit():
            raise ValueError(f'{place}: "answers" has {answer!r}, expected one like "{begin}1"')
    labelled = prompt.metric == "line-classification"
    after = prompt.template.split("{context}")[1]
    return Ask(
        id=f"longbench/{name}/{row.get('_id', index)}",
        question=after.replace("{input}", text_of(row, "input", place)),
        answers=answers,
        new_tokens=prompt.new_tokens,
        metric=prompt.metric,
        classes=texts_of(row, "all_classes", place) if labelled else (),
        facts={key: row[key] for key in ("length", "language") if key in row},
    )


def _shortened(
    context: str, asks: Sequence[Ask], settings: TaskSettings
) -> tuple[str, Sequence[Ask]]:
    """The context and its questions within `settings.length`, if there is one."""
    if settings.length is None:
        return context, asks
    tokenizer, limit = settings.tokenizer, room(settings, asks[0].new_tokens)
    longest = max(asks, key=lambda ask: len(tokens_of(tokenizer, ask.question)))
    if prompt_tokens(tokenizer, context, longest.question) <= limit:
        return context, asks
    cut, question = cut_middle(tokenizer, context, longest.question, limit)
    if question == longest.question:
        return cut, asks
    # A question as long as half of the prompt loses a part too.
    if len(asks) > 1:
        raise ConfigError(
            f"length={settings.length}, expected more than twice the question of {longest.id}"
        )
    return cut, [dataclasses.replace(longest, question=question)]


def _task(name: str) -> Task:
    return Task(
        name=f"longbench/{name}",
        metric=PROMPTS[name].metric,
        source=SOURCE,
        needs=("data",),
        read=partial(_read, name),
        files=(f"{name}.jsonl",),
        chat=name not in PLAIN,
    )


TASKS = tuple(_task(name) for name in PROMPTS)
