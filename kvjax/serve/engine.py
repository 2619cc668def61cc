"""Engine: a model that answers many requests at once from one pool of compressed caches."""

import asyncio
import contextlib
import itertools
import queue
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from kvjax.cache.history import BEGUN, extended
from kvjax.config import Recompress
from kvjax.generation.request import FULL, UNKNOWN, check_rows, check_stops
from kvjax.generation.sampling import Sampling, check_seed
from kvjax.generation.suggestion import chosen
from kvjax.inputs.chat import Messages
from kvjax.inputs.prompts import ModelInputs, Prompts
from kvjax.inputs.read import read
from kvjax.model_interface import Model
from kvjax.serve.contexts import Kept, new_id
from kvjax.serve.device import Device, page_of
from kvjax.serve.job import Answer, Job, Step, running_text, together
from kvjax.serve.loop import Loop
from kvjax.serve.menu import Menu, Method, named_methods
from kvjax.serve.menu import tail_slots as _tail_slots
from kvjax.serve.pressure import floor_of
from kvjax.serve.shelf import Shelf
from kvjax.serve.stats import Context, Stats

# Lengths that prompts are padded to, as far as the model's context allows.
BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)


class Engine:
    """A model that answers many requests at once.

    Args:
      model: from `kvjax.load`, or a model of your own.
      tokenizer: its own; None where prompts are token ids.
      methods: what requests may choose from: a config, a method as it is typed (with `budget`), or
        several by name. The first is the default.
      cache_bytes: of all that is kept of prompts and answers, tails included.
      budget: of methods that are typed.
      rows: requests answered at once at most.
      buckets: lengths that prompts are padded to; the last is that of the longest prompt. Powers of
        two from 64 to 4096, as far as the context goes, by default.
      question_buckets: those of questions about contexts; () for no contexts.
      max_new_tokens: of an answer at most, and where a request does not say as far as the context
        goes.
      decode_steps: tokens of every row between two looks of the host.
      tail_slots: tokens of an answer that are kept apart before they move into pages, a multiple of
        `decode_steps`; 32 by default, and `recompress.every` where there is a rule.
      recompress: compress answers while they are drawn, all of them; None keeps them whole.
      pressure: "swap", a request is promised all pages that it can come to hold, or "evict", rows
        keep less than `recompress` says when pages run short (needs layers="global").
      pressure_floor: entries a head that are left of a row then at least; half its budget.
      top_logprobs: likeliest tokens that a request may ask for at each place.
      reads: prompts that are read between two dispatches at most. More of them fill the rows sooner
        and hold up those that are answered for longer.
      contexts_dir: a folder for contexts; those that lie there are read when they are first asked,
        under their ids. None to keep them in memory alone.
      context_bytes: of the pool that contexts may take together; the least recently used one that
        nobody asks leaves for another. None for as much as the pool has.
      seed: of requests that bring none.
      warm_up: compile all programs now; else each with the first request that needs it.

    Attributes:
      compiled: programs that were compiled while warming up.
      refused: a sentence for each file of `contexts_dir` that cannot be used.

    Raises:
      ValueError: settings that cannot be, in one sentence.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any = None,
        methods: Method | Mapping[str, Method] = FULL,
        *,
        cache_bytes: int,
        budget: int | float | None = None,
        rows: int = 8,
        buckets: Sequence[int] | None = None,
        question_buckets: Sequence[int] = (),
        max_new_tokens: int = 256,
        decode_steps: int = 8,
        tail_slots: int | None = None,
        recompress: Recompress | None = None,
        pressure: Literal["swap", "evict"] = "swap",
        pressure_floor: int | None = None,
        top_logprobs: int = 0,
        reads: int = 1,
        context_bytes: int | None = None,
        contexts_dir: str | Path | None = None,
        seed: int = 0,
        warm_up: bool = True,
    ):
        _check_whole(
            cache_bytes=cache_bytes,
            rows=rows,
            max_new_tokens=max_new_tokens,
            decode_steps=decode_steps,
            reads=reads,
        )
        _check_whole(0, top_logprobs=top_logprobs)
        if context_bytes is not None:
            _check_whole(context_bytes=context_bytes)
        if question_buckets and recompress is not None:
            raise ValueError(
                f"question_buckets={tuple(question_buckets)!r} beside recompress, expected ():"
                " pages of a context are never evicted from"
            )
        self.model, self.tokenizer = model, tokenizer
        self._max_new_tokens, self._seed, self._most_logprobs = max_new_tokens, seed, top_logprobs
        self._menu = Menu(
            shape=model.config,
            methods=named_methods(methods, budget, tokenizer, model.config.vocab_size, recompress),
            buckets=_buckets(model) if buckets is None else tuple(buckets),
            question_buckets=tuple(question_buckets),
            max_new_tokens=max_new_tokens,
            tail_slots=_tail_slots(tail_slots, decode_steps, recompress),
            recompress=recompress,
            page=page_of(model),
            floor=floor_of(pressure, pressure_floor, recompress),
        )
        device = Device(
            model,
            self._menu,
            cache_bytes=cache_bytes,
            rows=rows,
            decode_steps=decode_steps,
            top_logprobs=top_logprobs,
        )
        self.compiled = device.warm_up() if warm_up else 0
        self._numbers = itertools.count()
        self._loop = Loop(device, reads, context_bytes)
        try:
            self._shelf = Shelf(model, self._menu, self._loop, contexts_dir)
        except BaseException:
            self._loop.close()
            raise
        self.refused = tuple(self._shelf.refused)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that requests may choose, the default first."""
        return tuple(self._menu.methods)

    # ------------------------------------------------------------------ requests
    def submit(
        self,
        prompt: Prompts | None = None,
        *,
        messages: Messages | None = None,
        template_args: Mapping[str, Any] | None = None,
        method: str | None = None,
        budget: int | float | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | Literal["model"] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        logprobs: int = 0,
        context: str | None = None,
    ) -> AsyncGenerator[Step]:
        """Ask for an answer, as an asynchronous iterator over its steps.

        The request is checked now, and queued when the first step is asked for. To close the
        iterator (`aclose`), or to cancel the task that reads it, gives the request up.

        Args:
          prompt: a text or token ids; with a context what follows it.
          messages: a conversation in place of a prompt, with a context that of its own turns.
          template_args: passed on to the chat template.
          method: a name; the first one by default.
          budget: entries a head, or a fraction of the prompt, at most what the method keeps.
          max_new_tokens: at most the engine's.
          sampling: how tokens are drawn; "model" as the checkpoint suggests, None for greedy. A
            repetition penalty is of the prompt and the answer, not of a context.
          seed: of the draws.
          stop: strings that end the answer.
          ignore_eos: whether to go on after end-of-sequence tokens.
          logprobs: likeliest tokens to be told at each place, at most the engine's `top_logprobs`.
          context: id of what the prompt is asked about (`add_context`).

        Raises:
          ValueError: a wrong argument, or a request that can never be answered here.
        """
        inputs = self._read(prompt, messages, template_args, context)
        if len(inputs.rows) != 1:
            raise ValueError(f"{len(inputs.rows)} prompts, expected one (generate takes several)")
        job = self._job(
            inputs.rows[0], method=method, budget=budget, max_new_tokens=max_new_tokens,
            sampling=sampling, seed=seed, stop=stop, ignore_eos=ignore_eos, logprobs=logprobs,
            context=context,
        )  # fmt: skip
        return self._steps(job)

    async def _steps(self, job: Job) -> AsyncGenerator[Step]:
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Step | BaseException] = asyncio.Queue()

        def push(step: Step | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the client's loop is closed, and it is gone
                loop.call_soon_threadsafe(steps.put_nowait, step)

        job.push = push
        self._loop.enqueue([job])
        try:
            while True:
                step = await steps.get()
                if isinstance(step, BaseException):
                    raise step
                yield step
                if step.finish_reason is not None:
                    return
        finally:
            self._loop.give_up(job)

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        messages: Messages | None = None,
        template_args: Mapping[str, Any] | None = None,
        seed: int | Sequence[int] | None = None,
        context: str | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer prompts or conversations, and wait for all of them; arguments as of `submit`.

        `seed` is one number for all of them, or one each.

        Raises:
          ValueError: as `submit`, before any of them is read.
        """
        rows = self._read(prompts, messages, template_args, context).rows
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(rows)
        if len(seeds) != len(rows):
            raise ValueError(
                f"seed has {len(seeds)} entries, expected one number or one a prompt ({len(rows)})"
            )
        both = zip(rows, seeds, strict=True)
        jobs = [self._job(row, seed=one, context=context, **options) for row, one in both]
        boxes: list[queue.SimpleQueue[Step | BaseException]] = []
        for job in jobs:
            boxes.append(queue.SimpleQueue())
            job.push = boxes[-1].put
        self._loop.enqueue(jobs)
        try:
            return [together(_all_steps(box)) for box in boxes]
        finally:
            for job in jobs:
                self._loop.give_up(job)

    def _read(self, prompts, messages, template_args, context: str | None) -> ModelInputs:
        history = None if context is None else self._shelf.find(context).history
        return read(
            self.model, prompts, tokenizer=self.tokenizer, messages=messages,
            template_args=template_args, history=history, special=context is None,
        )  # fmt: skip

    def _job(
        self,
        tokens: list[int],
        *,
        method: str | None = None,
        budget: int | float | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | Literal["model"] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        logprobs: int = 0,
        context: str | None = None,
    ) -> Job:
        """A request that was checked."""
        kept = None if context is None else self._shelf.find(context)
        before = 0 if kept is None else kept.tokens
        limit = max_new_tokens
        if limit is None:  # as many as there is a place for
            rest = self.model.config.context - before - len(tokens)
            limit = max(1, min(self._max_new_tokens, rest))
        _check_whole(1, self._max_new_tokens, max_new_tokens=limit)
        _check_whole(0, self._most_logprobs, logprobs=logprobs)
        stops = check_stops(stop, self.tokenizer)
        seed = check_seed(self._seed if seed is None else seed)
        rules = chosen(sampling, self.model.config.stated_sampling)
        more, menu = self._menu.growth(limit), self._menu
        choice, told = None, tokens
        if kept is None:
            choice = menu.choose(method, len(tokens), budget)
            pages, least = self._loop.needed(choice.entries, limit)
            apart, name = least, method or self.methods[0]
        else:
            if method is not None or budget is not None:
                raise ValueError("method or budget beside a context, expected neither")
            menu.question_bucket(len(tokens))
            more += len(tokens)
            pages, name = menu.forked_pages(more), kept.method
            least, apart = pages, pages + kept.pages
            told = [*kept.history[0].tokens, *tokens]
        config = FULL if choice is None else choice.config
        check_rows(self.model, [tokens], config, [before], limit)
        self._loop.check(least)
        return Job(
            pages=pages, apart=apart, entries=0 if choice is None else choice.entries,
            number=next(self._numbers), method=name, tokens=tokens, before=before,
            choice=choice, limit=limit, sampling=rules, seed=seed,
            ends=not ignore_eos, context=context, more=more, logprobs=logprobs,
            push=lambda step: None, text=running_text(self.tokenizer, stops, told),
        )  # fmt: skip

    # ------------------------------------------------------------------ contexts
    def add_context(
        self,
        text: Prompts | None = None,
        *,
        messages: Messages | None = None,
        template_args: Mapping[str, Any] | None = None,
        method: str | None = None,
        budget: int | float | None = None,
        seed: int | None = None,
    ) -> str:
        """Read and compress a text once, for many requests (`submit(context=)`); its id.

        All that ask about it share its pages. Where pages run short, the newest rows wait in the
        host's memory until there are some again. Its question is not seen while it is compressed:
        choose a method that does not need to, such as `kvzip` or `key-diff`.

        Raises:
          ValueError: as `submit`; an engine without question_buckets; more than the pool or
            `context_bytes` has room for, beside contexts that are being asked.
        """
        if not self._menu.question_buckets:
            raise ValueError("question_buckets=(), expected lengths of questions about contexts")
        inputs = read(
            self.model, text, tokenizer=self.tokenizer, messages=messages,
            template_args=template_args, answered=False,
        )  # fmt: skip
        if len(inputs.rows) != 1:
            raise ValueError(f"{len(inputs.rows)} texts, expected one")
        tokens = inputs.rows[0]
        choice = self._menu.choose(method, len(tokens), budget)
        check_rows(self.model, inputs.rows, choice.config)
        most = self._menu.question_buckets[-1] + self._max_new_tokens
        following = min(most, self.model.config.context - len(tokens))
        kept = Kept(
            lease=None,
            method=method or self.methods[0],
            history=extended(BEGUN, inputs.given, inputs.turns) or UNKNOWN,
            tokens=len(tokens),
            pages=self._menu.pages(choice.entries, 0),
            rope_length=len(tokens) + following,
        )
        name = new_id()
        own = check_seed(self._seed if seed is None else seed)
        make = partial(self._loop.add_context, name, tokens, choice, own, following, kept)
        self._shelf.add(name, kept, make)
        return name

    def save_context(self, context: str, path: str | Path) -> Path:
        """Write a context to a file, as `kvjax.save_cache` does; `kvjax.load_cache` reads it too.

        Raises:
          ValueError: no such context, or a path that cannot be written.
        """
        return self._shelf.save(context, path)

    def load_context(self, path: str | Path) -> str:
        """Take in what `save_context` wrote, or `kvjax.save_cache` of `compress_prompt`; its id.

        Raises:
          ValueError: not such a file, damaged, of another model, or no room for it.
        """
        if not self._menu.question_buckets:
            raise ValueError("question_buckets=(), expected lengths of questions about contexts")
        name = new_id()
        self._shelf.load(path, name)
        return name

    def contexts(self) -> tuple[Context, ...]:
        """What is kept for many requests; in no pages what lies on disk alone."""
        return self._shelf.contexts()

    def drop_context(self, context: str) -> None:
        """Give a context's pages back, and its file in `contexts_dir`.

        Raises:
          ValueError: no such context, or one that requests are still asking.
        """
        self._shelf.drop(context)

    # ------------------------------------------------------------------ the engine itself
    def stats(self, *, pages: bool = False) -> Stats:
        """The engine now; `pages` says which ones each row has, read from the device."""
        return self._loop.call(lambda: self._loop.stats(pages))

    async def drain(self) -> None:
        """Take no more requests, and wait until all that there are have been answered."""
        self._loop.drain()
        while not self._loop.idle:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """End the engine; requests that are not answered yet get an error."""
        self._loop.close()


def _all_steps(box: "queue.SimpleQueue[Step | BaseException]") -> list[Step]:
    steps: list[Step] = []
    while not steps or steps[-1].finish_reason is None:
        step = box.get()
        if isinstance(step, BaseException):
            raise step
        steps.append(step)
    return steps


def _buckets(model: Model) -> tuple[int, ...]:
    context = model.config.context
    return tuple(size for size in BUCKETS if size < context) or (context,)


def _check_whole(least: int = 1, most: int | None = None, **values: Any) -> None:
    """Raise ValueError unless these are integers in a range."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    for name, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            raise ValueError(f"{name}={value!r}, expected an integer {bounds}")
