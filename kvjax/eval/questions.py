"""Questions about documents as tokens, in batches that run as one."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from kvjax.eval.pod import Workers
from kvjax.eval.settings import EvalSettings
from kvjax.eval.tasks import TASKS, Ask, Document, TaskSettings
from kvjax.eval.tasks.example import IMAGE
from kvjax.inputs.chat import chat_text
from kvjax.inputs.multimodal import by_prompt, mark, placeholder, prepare_inputs
from kvjax.inputs.prompts import bucket, encoded
from kvjax.model_interface import Model

# Characters without a meaning, which are no white space: one marks where a context ends.
_PRIVATE = range(0xE000, 0xF900)
# Tokens left for a chat template around the prompt.
CHAT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Question:
    """One ask of one document, as tokens.

    Attributes:
      task, length: which task, and how long its prompts may be.
      document, ask: from `kvjax.eval.tasks`.
      context: tokens that are compressed alone under "unseen", one for a picture.
      rest: tokens of the question and what leads to the answer.
      size: tokens of the context, with one for each feature of a picture.
    """

    task: str
    length: int
    document: Document
    ask: Ask
    context: tuple[int, ...]
    rest: tuple[int, ...]
    size: int


def questions_of(
    settings: EvalSettings, model: Model | None, tokenizer: Any, workers: Workers
) -> Iterator[Question]:
    """This worker's share of all questions, document by document.

    Args:
      settings: which tasks, and how long their prompts may be.
      model: needed for tasks with pictures alone.
      tokenizer: from `kvjax.load`.
      workers: which process this is.

    Raises:
      ValueError: a task that lacks a file.
    """
    for name in settings.tasks:
        for length in settings.lengths:
            chat = settings.chat and TASKS[name].chat
            given = TaskSettings(
                tokenizer=tokenizer,
                length=length,
                count=settings.count,
                seed=settings.seed,
                data=settings.data or None,
                haystack=settings.haystack or None,
                reserve=CHAT_TOKENS if chat else 0,
                depths=settings.depths,
                questions=settings.questions,
                continuation=settings.continuation,
            )
            for index, document in enumerate(TASKS[name].documents(given)):
                if index % workers.count != workers.index:
                    continue
                for ask in document.asks:
                    context, rest = as_tokens(document, ask, tokenizer, chat, model)
                    size = len(context)
                    if document.images:
                        assert model is not None  # `as_tokens` has looked
                        pictures = by_prompt(list(document.images), list(context), model)
                        size = len(prepare_inputs(model, [context], pictures).rows[0])
                    yield Question(name, length, document, ask, context, rest, size)


def as_tokens(
    document: Document, ask: Ask, tokenizer: Any, chat: bool, model: Model | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of the context, and of question and lead; both protocols see the same ones.

    With `chat` the context and the question are the user's turn, the lead begins the answer; of
    what is scored the context alone where it has pictures, and nothing elsewhere.
    """
    before, after, special = document.context, ask.question + ask.lead, True
    scored, pictures = ask.metric == "perplexity", len(document.images)
    assert model is not None or not pictures  # a task with pictures is read for a model
    if chat and (pictures or not scored):
        token = placeholder(model, tokenizer) if model is not None and pictures else ""
        before, after = _in_turn(before, ask.question, tokenizer, pictures, token)
        if scored:
            before, after = before + after, ""
        after, special = after + ask.lead, False
    elif model is not None and pictures:
        before = before.replace(IMAGE, mark(model, tokenizer))
    if scored:
        after += ask.answers[0]
    first = encoded(before, tokenizer, special=special)
    rest = encoded(after, tokenizer, special=False)
    if scored and not pictures:  # one text, however it falls into words
        whole = encoded(before + after, tokenizer, special=special)
        if whole[: len(first)] == first:
            rest = whole[len(first) :]
    return tuple(first), tuple(rest)


def _in_turn(
    context: str, question: str, tokenizer: Any, pictures: int, token: str
) -> tuple[str, str]:
    """Both as the user's turn, divided where the context ends; `token` stands for a picture."""

    def turn(between: str) -> str:
        text = context + between + question
        if pictures:
            text = re.sub(rf"\n?{IMAGE}\n?", lambda _: token, text)
        return chat_text(text, tokenizer, pictures, token)

    whole = turn("")
    end = next(mark for mark in map(chr, _PRIVATE) if mark not in whole + context + question)
    before, _, after = turn(end).partition(end)
    # A template that trims leaves the context's last spaces alone where the mark follows them.
    return (whole.removesuffix(after), after) if whole.endswith(after) else (before, after)


def batches(questions: Sequence[Question], size: int) -> Iterator[list[list[Question]]]:
    """At most `size` documents of one task and bucket at once, each with all its questions."""
    documents: dict[tuple, list[Question]] = defaultdict(list)
    for question in questions:
        documents[question.task, question.length, question.document.id].append(question)
    groups: dict[tuple, list[list[Question]]] = defaultdict(list)
    for (task, length, _), asked in documents.items():
        groups[task, length, bucket(asked[0].size)].append(asked)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def waves(batch: Sequence[Sequence[Question]]) -> Iterator[list[Question | None]]:
    """A question of each document at a time, None where it has no more."""
    for place in range(max(map(len, batch))):
        yield [mine[place] if place < len(mine) else None for mine in batch]
