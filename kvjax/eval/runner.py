"""Run `kvjax eval`: every method at every budget on every task, resumable at any example.

    tasks -> documents -> batches of one bucket -> answers under each config -> rows on disk

A batch holds documents whose padded lengths are the same, a short last one is filled up, and
answers of nearly the same length are drawn as one, so that each method compiles once a bucket.
Where the question is unseen, a batch is compressed once and all its questions are asked of that
cache. Every team of processes (`kvjax.eval.pod`) takes its share of the documents, writes a file
of its own (`kvjax.eval.journal`) and needs no other team.
"""

import dataclasses
import re
import time
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import kvjax
from kvjax.compression.capacity import slot_bytes
from kvjax.config import CompressionConfig
from kvjax.eval.journal import Journal, key_of
from kvjax.eval.pod import ALONE, Workers
from kvjax.eval.settings import EvalSettings
from kvjax.eval.tasks import METRICS, TASKS, Ask, Document, TaskSettings
from kvjax.eval.tasks.example import IMAGE
from kvjax.generation.request import instructed
from kvjax.inputs.multimodal import by_prompt, mark, placeholder, prepare_inputs
from kvjax.inputs.prompts import bucket, chat_text, encoded
from kvjax.model_interface import Model

FULL = CompressionConfig.named("full")
# Characters without a meaning, which are no white space: one marks where a context ends.
_PRIVATE = range(0xE000, 0xF900)
# Tokens left for a chat template around the prompt.
CHAT_TOKENS = 64
# Tasks whose answers are compared with the model's own from the full cache.
OWN = ("rouge", "vision/rouge")


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


def evaluate(
    settings: EvalSettings,
    out: str | Path,
    text: str,
    *,
    model: Model,
    tokenizer: Any,
    workers: Workers = ALONE,
    progress: bool = True,
) -> dict[str, int]:
    """Run what is not there yet; rows go to `out`.

    Args:
      settings: what to run.
      out: the folder of results.
      text: the settings file, a copy of which says what the results are of.
      model, tokenizer: from `kvjax.load`.
      workers: which process this is; the model lies on its mesh.
      progress: whether to show a bar on stderr.

    Returns:
      Examples that were run, that were there already, and that failed.

    Raises:
      ValueError: a folder of other settings, or that cannot be written; a task that lacks a file.
    """
    counts = {"run": 0, "found": 0, "failed": 0}
    configs = settings.configs()
    with Journal(out, text, workers.index, writes=workers.member == 0) as journal:
        questions = list(_questions(settings, model, tokenizer, workers))
        keys = [
            (q.task, q.length, protocol, method, budget, q.document.id, q.ask.id)
            for q in questions
            for protocol in settings.protocols
            for method, budget in configs
        ]
        found = workers.agreed(np.array([key in journal.done for key in keys], bool))
        journal.done |= {key for key, done in zip(keys, found, strict=True) if done}
        bar = tqdm(
            total=len(keys), desc="eval", unit="answer", disable=not (progress and workers.speaks)
        )
        for protocol in settings.protocols:
            for batch in batches(questions, settings.batch):
                for (method, budget), config in configs.items():
                    config = instructed(config, tokenizer, model.config.vocab_size)
                    run = _Run(model, tokenizer, config, method, protocol, settings)
                    for wave in waves(batch):
                        rows = run.missing(batch, wave, budget, journal.done)
                        journal.write(rows)
                        asked = sum(question is not None for question in wave)
                        counts["run"] += len(rows)
                        counts["found"] += asked - len(rows)
                        counts["failed"] += sum(row["error"] is not None for row in rows)
                        bar.update(asked)
        bar.close()
    return counts


# ---------------------------------------------------------------------------- questions
def _questions(
    settings: EvalSettings, model: Model | None, tokenizer: Any, workers: Workers
) -> Iterator[Question]:
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


def _label(question: Question, run: "_Run", budget: str) -> dict[str, Any]:
    return {
        "task": question.task,
        "length": question.length,
        "protocol": run.protocol,
        "method": run.method,
        "budget": budget,
        "document": question.document.id,
        "ask": question.ask.id,
        "prompt_tokens": question.size + len(question.rest),
        "answers": list(question.ask.answers),
        "metric": question.ask.metric,
        "facts": dict(question.ask.facts),
    }


# ---------------------------------------------------------------------------- answers
@dataclasses.dataclass
class _Run:
    """One config over one batch of documents; the batch is compressed when it is first asked."""

    model: Model
    tokenizer: Any
    config: CompressionConfig
    method: str
    protocol: str
    settings: EvalSettings
    cache: Any = None

    def missing(
        self,
        batch: Sequence[Sequence[Question]],
        wave: Sequence[Question | None],
        budget: str,
        done: Container[tuple],
    ) -> list[dict[str, Any]]:
        """Rows of the questions that are not done; nothing runs where all are."""
        labels = [_label(question, self, budget) if question else None for question in wave]
        todo = [label is not None and key_of(label) not in done for label in labels]
        if not any(todo):
            return []
        answers = self.answer(batch, wave)
        both = zip(labels, answers, todo, strict=True)
        return [label | row for label, row, new in both if label is not None and new]

    def answer(
        self, batch: Sequence[Sequence[Question]], wave: Sequence[Question | None]
    ) -> list[dict[str, Any]]:
        """A row's results each; where all together fail, each alone, and who fails says why."""
        try:
            return self._together(batch, wave)
        except (ValueError, RuntimeError) as error:
            if len(wave) == 1:
                return [_nothing(error)]
        found = []
        for mine, question in zip(batch, wave, strict=True):
            alone = dataclasses.replace(self, cache=None)
            found += alone.answer([mine], [question]) if question else [{}]
        return found

    def _together(self, batch, wave) -> list[dict[str, Any]]:
        begin = time.perf_counter()
        asked = [question for question in wave if question]
        if asked[0].ask.metric == "perplexity":
            return self._scored(wave)
        # Who is not asked now, and places of a batch that is short, repeat another's question.
        whole = [question or asked[0] for question in wave]
        missing = self.settings.batch - len(whole)
        padded = [*batch, *[batch[-1]] * missing], [*whole, *whole[-1:] * missing]
        out = self._generate(*padded)
        seconds = (time.perf_counter() - begin) / len(asked)
        own = None
        if asked[0].task in OWN:
            own = dataclasses.replace(self, config=FULL, cache=None)._generate(*padded)
        return [
            self._judged(out, index, question, own) | {"seconds": seconds} if question else {}
            for index, question in enumerate(wave)
        ]

    def _scored(self, wave: Sequence[Question | None]) -> list[dict[str, Any]]:
        """The likelihood of what follows, in place of an answer."""
        asked = [question for question in wave if question]
        begin, size = time.perf_counter(), self.settings.batch
        whole = [*asked, *asked[-1:] * (size - len(asked))]
        found = kvjax.score(
            self.model,
            [[*question.context, *question.rest] for question in whole],
            [len(question.context) for question in whole],
            self.config,
            seed=self.settings.seed,
            images=_images(whole),
        )
        seconds = (time.perf_counter() - begin) / len(asked)
        shape = self.model.config
        heads = shape.num_layers * shape.num_kv_heads
        rows = []
        for question, scored in zip(asked, found, strict=False):
            itemsize = self.model.embed.table_VD[...].dtype.itemsize
            entry = slot_bytes(self.config, question.size, shape.head_dim, itemsize)
            whole_entry = 2 * shape.head_dim * itemsize
            rows.append(
                _EMPTY
                | {
                    "nll": float(np.mean(scored.nll)),
                    "kept": scored.kept / heads,
                    "bytes": scored.kept * entry,
                    "full_bytes": question.size * heads * whole_entry,
                    "seconds": seconds,
                }
            )
        following = iter(rows)
        return [next(following) if question else {} for question in wave]

    def _generate(self, batch, questions: Sequence[Question]) -> kvjax.Generation:
        """Greedy answers: the prompt at once, or the context alone and then the question."""
        seed = self.settings.seed
        call: dict[str, Any] = {"max_new_tokens": self._steps(questions), "seed": seed}
        if self.protocol == "seen" or not questions[0].rest:  # the context simply goes on
            prompts = [[*question.context, *question.rest] for question in questions]
            images = _images(questions)
            return kvjax.generate(self.model, prompts, self.config, images=images, **call)
        if self.cache is None:
            contexts = [list(mine[0].context) for mine in batch]
            images = _images([mine[0] for mine in batch])
            more = [max(len(q.rest) + q.ask.new_tokens for q in mine) for mine in batch]
            self.cache = kvjax.compress_prompt(
                self.model, contexts, self.config, seed=seed, images=images, max_new_tokens=more
            )
        rest = [list(question.rest) for question in questions]
        return kvjax.generate(self.model, rest, cache=self.cache, **call)

    def _steps(self, questions: Sequence[Question]) -> int:
        """Tokens to draw: the longest answer, rounded up so that tasks share a program.

        Every answer is cut to its own length afterwards.
        """
        longest = max(question.ask.new_tokens for question in questions)
        used = max(question.size + len(question.rest) for question in questions)
        fits = used + bucket(longest) <= self.model.config.context
        return bucket(longest) if fits else longest

    def _judged(self, out, index: int, question: Question, own) -> dict[str, Any]:
        new = question.ask.new_tokens

        def text_of(generation: kvjax.Generation) -> str:
            return self.tokenizer.decode(generation.tokens[index][:new], skip_special_tokens=True)

        kept_LK, ask, text = np.asarray(out.kept[index]), question.ask, text_of(out)
        answers = ask.answers if own is None else (text_of(own),)
        rows = len(out.tokens)
        return _EMPTY | {
            "prediction": text,
            "answers": list(answers),
            "score": METRICS[ask.metric](text, answers, ask.classes),
            "log_prob": float(np.sum(out.log_probs[index][:new])),
            "kept": float(kept_LK.mean()),
            "kept_LK": kept_LK.tolist(),
            "bytes": out.cache_bytes // rows,
            "full_bytes": out.full_cache_bytes // rows,
        }


def _images(questions: Sequence[Question]) -> list[list[str]] | None:
    """Each question's pictures, None where none has any."""
    found = [list(question.document.images) for question in questions]
    return found if any(found) else None


_EMPTY: dict[str, Any] = dict.fromkeys(
    (
        "prediction", "score", "log_prob", "nll", "kept", "kept_LK", "bytes", "full_bytes",
        "seconds", "error",
    )
)  # fmt: skip


def _nothing(error: Exception) -> dict[str, Any]:
    return _EMPTY | {"error": str(error).split("\n")[0]}
