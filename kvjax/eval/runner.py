"""Run `kvjax eval`: every method at every budget on every task, resumable at any example.

    tasks -> documents -> batches of one bucket -> answers under each config -> rows on disk

A batch holds documents whose padded lengths are the same, a short last one is filled up, and
answers of nearly the same length are drawn as one, so that each method compiles once a bucket.
A batch is prefilled once and compressed with every method and budget. Where the question is
unseen, all questions of its documents are asked of each of these caches.

Every team of processes (`kvjax.eval.pod`) takes its share of the documents, writes a file of its
own (`kvjax.eval.journal`) and needs no other team.
"""

import dataclasses
import time
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
from kvjax.eval.questions import Question, batches, questions_of, waves
from kvjax.eval.reader import Reader
from kvjax.eval.settings import EvalSettings
from kvjax.eval.tasks import METRICS
from kvjax.generation.request import instructed
from kvjax.inputs.prompts import bucket
from kvjax.model_interface import Model

FULL = CompressionConfig.named("full")
# Tasks whose answers are compared with the model's own from the full cache.
OWN = ("rouge", "vision/rouge")


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
    vocabulary = model.config.vocab_size
    configs = {
        name: instructed(config, tokenizer, vocabulary)
        for name, config in settings.configs().items()
    }
    with Journal(out, text, workers.index, writes=workers.member == 0) as journal:
        questions = list(questions_of(settings, model, tokenizer, workers))
        keys = [
            (q.task, q.length, protocol, method, budget, q.document.id, q.ask.id)
            for q in questions
            for protocol in settings.protocols
            for method, budget in configs
        ]
        found = workers.agreed(np.array([key in journal.done for key in keys], bool))
        journal.done |= {key for key, done in zip(keys, found, strict=True) if done}
        reader = Reader(model, list(configs.values()) if settings.prefill_once else [])
        bar = tqdm(
            total=len(keys), desc="eval", unit="answer", disable=not (progress and workers.speaks)
        )
        for protocol in settings.protocols:
            for batch in batches(questions, settings.batch):
                runs = [
                    (_Run(model, tokenizer, config, method, protocol, settings, reader), budget)
                    for (method, budget), config in configs.items()
                ]
                read = [
                    question.size + (len(question.rest) if protocol == "seen" else 0)
                    for mine in batch
                    for question in mine
                ]
                tokens = bucket(max(read))
                runs.sort(key=lambda run: reader.turn(run[0].config, tokens))
                for wave, run, budget in _in_turn_of(batch, runs, protocol):
                    rows = run.missing(batch, wave, budget, journal.done)
                    journal.write(rows)
                    asked = sum(question is not None for question in wave)
                    counts["run"] += len(rows)
                    counts["found"] += asked - len(rows)
                    counts["failed"] += sum(row["error"] is not None for row in rows)
                    bar.update(asked)
        bar.close()
    return counts


def _in_turn_of(
    batch: Sequence[Sequence[Question]], runs: Sequence[tuple["_Run", str]], protocol: str
) -> Iterator[tuple[list[Question | None], "_Run", str]]:
    """Every wave with every run, in the order in which the fewest keys and values are held.

    A run's cache answers all waves of questions that it did not see; prompts that end with their
    question are another wave's no more.
    """
    shared = protocol == "unseen" and batch[0][0].ask.metric != "perplexity"
    if shared:
        for run, budget in runs:
            for wave in waves(batch):
                yield wave, run, budget
            run.cache = None
    else:
        for wave in waves(batch):
            for run, budget in runs:
                yield wave, run, budget


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
    reader: Reader
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
        self.cache, found = None, []
        self.reader.forget()  # room for one row after the other
        reader = Reader(self.model, [])
        for mine, question in zip(batch, wave, strict=True):
            alone = dataclasses.replace(self, cache=None, reader=reader)
            found += alone.answer([mine], [question]) if question else [{}]
        return found

    def _together(self, batch, wave) -> list[dict[str, Any]]:
        asked = [question for question in wave if question]
        if asked[0].ask.metric == "perplexity":
            return self._scored(wave)
        # Who is not asked now, and places of a batch that is short, repeat another's question.
        whole = [question or asked[0] for question in wave]
        missing = self.settings.batch - len(whole)
        padded = [*batch, *[batch[-1]] * missing], [*whole, *whole[-1:] * missing]
        self._read(*padded)  # for all methods, and so in nobody's seconds
        begin = time.perf_counter()
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
        whole = [*asked, *asked[-1:] * (self.settings.batch - len(asked))]
        contexts = [list(question.context) for question in whole]
        more = [len(question.rest) for question in whole]
        prefilled = self.reader.read(contexts, _images(whole), self.config, more)
        begin = time.perf_counter()
        found = kvjax.score(
            self.model,
            [[*question.context, *question.rest] for question in whole],
            [len(question.context) for question in whole],
            self.config,
            seed=self.settings.seed,
            images=_images(whole),
            prefilled=prefilled,
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
        prompts = self._read(batch, questions)
        if self._at_once(questions):
            return kvjax.generate(self.model, **prompts, config=self.config, **call)
        if self.cache is None:
            more = _following(batch)
            self.cache = kvjax.compress_prompt(
                self.model, **prompts, config=self.config, seed=seed, max_new_tokens=more
            )
        rest = [list(question.rest) for question in questions]
        return kvjax.generate(self.model, rest, cache=self.cache, **call)

    def _at_once(self, questions: Sequence[Question]) -> bool:
        """Whether context and question are one prompt, or the context simply goes on."""
        return self.protocol == "seen" or not questions[0].rest

    def _read(self, batch, questions: Sequence[Question]) -> dict[str, Any]:
        """What is compressed, as `prompts` and `images`; read already where others share it."""
        if self.cache is not None:
            return {}
        if self._at_once(questions):
            prompts = [[*question.context, *question.rest] for question in questions]
            images, more = _images(questions), [self._steps(questions)] * len(questions)
        else:
            more = _following(batch)
            prompts = [list(mine[0].context) for mine in batch]
            images = _images([mine[0] for mine in batch])
        prefilled = self.reader.read(prompts, images, self.config, more)
        return {"prompts": prefilled} if prefilled else {"prompts": prompts, "images": images}

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


def _following(batch: Sequence[Sequence[Question]]) -> list[int]:
    """Tokens of the longest question of each document, with its answer."""
    return [max(len(q.rest) + q.ask.new_tokens for q in mine) for mine in batch]


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
