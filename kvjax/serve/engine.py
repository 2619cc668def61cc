"""Engine: many requests at once, answered from one pool of compressed caches.

One thread has the device. In every round it does what clients asked for, admits at most one prompt,
empties tails that are full, queues the next tokens of all rows, and only then reads those that were
queued a round before: the device never waits for the host.
"""

import asyncio
import itertools
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kvjax.config import CompressionConfig, Recompress, check_config
from kvjax.generation.request import check_rows, instructed
from kvjax.generation.sampling import Sampling
from kvjax.generation.suggestion import chosen
from kvjax.inputs.chat import Messages
from kvjax.inputs.prompts import Prompts
from kvjax.inputs.read import read
from kvjax.model_interface import Model
from kvjax.serve import programs
from kvjax.serve.device import Device, page_of
from kvjax.serve.job import Answer, Job, Step, running_text, together
from kvjax.serve.menu import FULL, Menu
from kvjax.serve.pages import Lease
from kvjax.serve.rows import Drawn
from kvjax.serve.scheduler import Scheduler
from kvjax.serve.stats import Context, Holder, Stats
from kvjax.spelling import parse_method

Method = CompressionConfig | str
# Lengths that prompts are padded to, as far as the model's context allows.
BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)
# Tokens of an answer that are not in pages yet, where nothing compresses it.
TAIL = 32


class _Kept(NamedTuple):
    """A context: what the device has of it, and what is said of it."""

    lease: Lease
    method: str
    tokens: list[int]
    pages: int
    rope_length: int


class _Dispatch(NamedTuple):
    """Tokens on their way from the device, and whose they are, row by row."""

    drawn: Drawn
    jobs: tuple[tuple[int, Job], ...]


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
      max_new_tokens: of an answer at most, and where a request does not say.
      decode_steps: tokens of every row between two looks of the host.
      tail_slots: tokens of an answer that are kept apart before they move into pages, a multiple of
        `decode_steps`; 32 by default, or as many as `recompress.every`.
      recompress: compress answers while they are drawn, all of them; None keeps them whole.
      seed: of requests that bring none.
      warm_up: compile everything now; else each program with the first request that needs it.

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
        seed: int = 0,
        warm_up: bool = True,
    ):
        for name, value in (
            ("cache_bytes", cache_bytes), ("rows", rows), ("max_new_tokens", max_new_tokens),
            ("decode_steps", decode_steps),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}, expected an integer of at least 1")
        self.model, self.tokenizer = model, tokenizer
        self._max_new_tokens, self._seed = max_new_tokens, seed
        if buckets is None:
            buckets = [size for size in BUCKETS if size < model.config.context] or [
                model.config.context
            ]
        self._menu = Menu(
            shape=model.config,
            methods=_methods(methods, budget, model, tokenizer),
            buckets=tuple(buckets),
            question_buckets=tuple(question_buckets),
            max_new_tokens=max_new_tokens,
            tail_slots=_tail_slots(tail_slots, decode_steps, recompress),
            recompress=recompress,
            page=page_of(model),
        )
        self._device = Device(
            model, self._menu, cache_bytes=cache_bytes, rows=rows, decode_steps=decode_steps
        )
        self._scheduler = Scheduler(rows, self._device.shape.pages)
        self._contexts: dict[str, _Kept] = {}
        self._numbers = itertools.count()
        self._counts = dict.fromkeys(("evictions", "in", "out", "finished", "aborted"), 0)
        self._pending: deque[_Dispatch] = deque()
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = self._draining = False
        self._failure: BaseException | None = None
        self.programs = self._device.warm_up() if warm_up else 0
        self._thread = threading.Thread(target=self._serve, name="kvjax-serve", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # ------------------------------------------------------------------ requests
    def submit(self, prompt: Prompts | None = None, **options: Any) -> AsyncIterator[Step]:
        """Ask for an answer, as an asynchronous iterator over its steps.

        It is checked now and queued with the first step that is asked for. To close the iterator,
        or to cancel the task that reads it, gives the request up.

        Args:
          prompt: a text or token ids; of a context's question what follows it.
          options: messages: a conversation in place of a prompt; template_args: of its template;
            method: a name, the first by default; budget: entries a head or a fraction of the
            prompt, at most the method's; max_new_tokens; sampling: a `kvjax.Sampling`, "model" or
            None for greedy; seed; stop: strings that end the answer; ignore_eos: go on after
            end-of-sequence tokens; context: id of what the prompt is asked about.

        Raises:
          ValueError: a wrong argument, or a request that can never be answered here.
        """
        return self._steps(self._job(prompt, **options))

    async def _steps(self, job: Job) -> AsyncIterator[Step]:
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[Step | BaseException]()

        def push(step: Step | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(steps.put_nowait, step)

        job.push = push
        self._enqueue(job)
        try:
            while True:
                step = await steps.get()
                if isinstance(step, BaseException):
                    raise step
                yield step
                if step.finish_reason is not None:
                    return
        finally:
            if not job.done:
                self._command(lambda: self._abort(job))

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        messages: Messages | None = None,
        seed: int | Sequence[int] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer prompts, or conversations, and wait for all of them; options as of `submit`.

        Raises:
          ValueError: as `submit`, before any of them is read.
        """
        tokens = self._read(prompts, messages, options.pop("template_args", None), options)
        seeds = [seed] * len(tokens) if seed is None or isinstance(seed, int) else list(seed)
        if len(seeds) != len(tokens):
            raise ValueError(
                f"seed has {len(seeds)} entries, expected one number or one a prompt ({len(tokens)})"
            )
        jobs = [self._job(row, seed=one, **options) for row, one in zip(tokens, seeds, strict=True)]
        boxes = [queue.SimpleQueue[Step | BaseException]() for _ in jobs]
        for job, box in zip(jobs, boxes, strict=True):
            job.push = box.put
        self._enqueue(*jobs)
        return [together(_all_steps(box)) for box in boxes]

    def _read(self, prompts, messages, template_args, options) -> list[list[int]]:
        special = options.get("context") is None
        inputs = read(
            self.model, prompts, tokenizer=self.tokenizer, messages=messages,
            template_args=template_args, special=special,
        )  # fmt: skip
        return inputs.rows

    def _job(
        self,
        prompt: Any = None,
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
        context: str | None = None,
    ) -> Job:
        """A request that was checked."""
        limit = self._max_new_tokens if max_new_tokens is None else max_new_tokens
        whole = isinstance(limit, int) and not isinstance(limit, bool)
        if not whole or not 1 <= limit <= self._max_new_tokens:
            raise ValueError(
                f"max_new_tokens={limit!r}, expected an integer from 1 to {self._max_new_tokens}"
            )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and (self.tokenizer is None or not all(stops)):
            raise ValueError(f"stop={list(stops)!r}, expected texts, and a tokenizer beside them")
        rules = chosen(sampling, self.model.config.stated_sampling)
        if rules.repetition_penalty != 1:
            raise ValueError(
                f"repetition_penalty={rules.repetition_penalty}, expected 1 (others are not served)"
            )
        rows = self._read(prompt, messages, template_args, {"context": context})
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} prompts, expected one (generate takes several)")
        choice, before, config, name = None, 0, FULL, next(iter(self._menu.methods))
        if context is None:
            choice = self._menu.choose(method, len(rows[0]), budget)
            config, name = choice.config, method or name
            more = self._menu.growth(limit)
            pages = self._menu.pages(choice.entries, more)
        else:
            if method is not None or budget is not None:
                raise ValueError("method or budget beside a context, expected neither")
            kept = self._context(context)
            self._menu.question_bucket(len(rows[0]))
            before, name = len(kept.tokens), kept.method
            pages = self._menu.forked_pages(len(rows[0]) + self._menu.growth(limit))
        check_rows(self.model, rows, config, [before], limit)
        self._scheduler.check(pages)
        told = rows[0] if context is None else [*self._context(context).tokens, *rows[0]]
        return Job(
            pages=pages, number=next(self._numbers), method=name, tokens=rows[0], before=before,
            choice=choice, limit=limit, sampling=rules, seed=self._seed if seed is None else seed,
            ends=not ignore_eos, context=context, push=lambda step: None,
            text=running_text(self.tokenizer, stops, told),
        )  # fmt: skip

    def _enqueue(self, *jobs: Job) -> None:
        with self._changed:
            self._refuse_late()
            self._commands.extend([lambda job=job: self._scheduler.submit(job) for job in jobs])
            self._changed.notify()

    def _refuse_late(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the engine has failed") from self._failure
        if self._closed or self._draining:
            raise RuntimeError("the engine is closed, or about to be")

    def _command(self, command: Callable[[], None]) -> None:
        """Let the thread that has the device do something."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _ask_thread(self, question: Callable[[], Any]) -> Any:
        """What the thread that has the device says; its errors are raised here."""
        box: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def answer() -> None:
            try:
                box.put((question(), None))
            except Exception as error:  # it is the caller's
                box.put((None, error))

        with self._changed:
            if self._closed or self._failure is not None:
                raise RuntimeError("the engine is closed") from self._failure
            self._commands.append(answer)
            self._changed.notify()
        found, error = box.get()
        if error is not None:
            raise error
        return found

    # ------------------------------------------------------------------ contexts
    def add_context(
        self,
        text: Any = None,
        *,
        messages: Messages | None = None,
        method: str | None = None,
        budget: int | float | None = None,
        seed: int | None = None,
    ) -> str:
        """Read and compress a text once, for many requests (`submit(context=)`); its id.

        Its pages are shared by all that ask about it. Where pages run short, the newest rows go to
        the host's memory until there are some again.

        Raises:
          ValueError: as `submit`; a server without question_buckets, or one that compresses answers
            again; more pages than there are beside other contexts.
        """
        if not self._menu.question_buckets:
            raise ValueError("question_buckets=(), expected lengths of questions about contexts")
        inputs = read(self.model, text, tokenizer=self.tokenizer, messages=messages, answered=False)
        if len(inputs.rows) != 1:
            raise ValueError(f"{len(inputs.rows)} texts, expected one")
        tokens = inputs.rows[0]
        choice = self._menu.choose(method, len(tokens), budget)
        check_rows(self.model, inputs.rows, choice.config)
        pages, name = self._menu.pages(choice.entries, 0), method or next(iter(self._menu.methods))
        following = min(
            self._menu.question_buckets[-1] + self._max_new_tokens,
            self.model.config.context - len(tokens),
        )

        def keep() -> str:
            for ticket in self._scheduler.hold(pages):
                assert isinstance(ticket, Job)  # nothing else has a row
                self._swap_out(ticket)
            lease = self._device.keep(
                tokens,
                choice.config,
                choice.budget,
                following,
                self._seed if seed is None else seed,
            )
            self._counts["in"] += len(tokens)
            found = f"context-{next(self._numbers)}"
            kept = _Kept(lease, name, tokens, pages, len(tokens) + following)
            self._contexts[found] = kept
            return found

        return self._ask_thread(keep)

    def contexts(self) -> tuple[Context, ...]:
        """What is kept for many requests."""
        return tuple(
            Context(name, kept.method, len(kept.tokens), kept.pages, self._users(name))
            for name, kept in list(self._contexts.items())
        )

    def drop_context(self, name: str) -> None:
        """Give a context up.

        Raises:
          ValueError: no such context, or one that requests still ask.
        """

        def drop() -> None:
            kept = self._context(name)
            if users := self._users(name):
                raise ValueError(f"context {name!r} has {users} requests, expected none")
            del self._contexts[name]
            self._device.drop(kept.lease)
            self._scheduler.let_go(kept.pages)

        self._ask_thread(drop)

    def _context(self, name: str) -> _Kept:
        if name not in self._contexts:
            raise ValueError(f"context={name!r}, expected one of {sorted(self._contexts)}")
        return self._contexts[name]

    def _users(self, name: str) -> int:
        tickets = [*self._scheduler.queue, *list(self._scheduler.running.values())]
        return sum(isinstance(one, Job) and one.context == name for one in tickets)

    # ------------------------------------------------------------------ the server itself
    def stats(self, *, pages: bool = False) -> Stats:
        """The server now; `pages` says which ones each row has, read from the device."""
        return self._ask_thread(lambda: self._stats(pages))

    def _stats(self, pages: bool) -> Stats:
        scheduler, counts = self._scheduler, self._counts
        table, sizes = self._device.holdings() if pages else (None, None)
        holders = []
        for row, job in sorted(scheduler.running.items()):
            assert isinstance(job, Job)
            mine = None
            if table is not None and sizes is not None:
                layers = zip(table[row], sizes[row], strict=True)
                mine = tuple(tuple(layer[:size].tolist()) for layer, size in layers)
            holders.append(Holder(row, job.number, job.method, job.prompt_tokens, job.told, mine))
        return Stats(
            queued=len(scheduler.queue), running=len(scheduler.running), rows=scheduler.rows,
            pages=scheduler.pages, free_pages=scheduler.free, shared_pages=scheduler.held,
            held_pages=scheduler.pages - scheduler.free - scheduler.held,
            page_slots=self._menu.page, evictions=counts["evictions"], swaps=scheduler.swaps,
            tokens_in=counts["in"], tokens_out=counts["out"], finished=counts["finished"],
            aborted=counts["aborted"], holders=tuple(holders),
        )  # fmt: skip

    async def drain(self) -> None:
        """Take no more requests, and wait until all that there are have been answered."""
        with self._changed:
            self._draining = True
        while not self._closed and self._failure is None:
            with self._changed:
                if not self._commands and not self._busy():
                    return
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """End the server; requests that are not answered yet get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # ------------------------------------------------------------------ the thread
    def _busy(self) -> bool:
        return bool(self._scheduler.queue or self._scheduler.running or self._pending)

    def _serve(self) -> None:
        error: BaseException = RuntimeError("the engine was closed")
        try:
            while self._obey():
                self._admit()
                queued = self._decode()
                self._hand_out(1 if queued else 0)
        except BaseException as failure:  # whoever waits is to learn of it
            error = self._failure = failure
        with self._changed:
            self._closed = True
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()
        for ticket in [*self._scheduler.queue, *self._scheduler.running.values()]:
            assert isinstance(ticket, Job)
            if not ticket.done:
                ticket.done = True
                ticket.push(error)

    def _obey(self) -> bool:
        """Do what was asked for, once there is something to do; False when all is over."""
        with self._changed:
            while not (self._closed or self._commands or self._busy()):
                self._changed.wait()
            if self._closed:
                return False
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()
        return True

    def _abort(self, job: Job) -> None:
        if job.done:
            return
        job.done = True
        self._counts["aborted"] += 1
        self._end(job)

    def _end(self, job: Job) -> None:
        row = self._scheduler.finish(job)
        if row is not None:
            self._device.release([row])

    def _admit(self) -> None:
        """One prompt, or one row that comes back, if there is a row and pages for it."""
        job = self._scheduler.admit()
        if job is None:
            return
        assert isinstance(job, Job) and job.row is not None
        if job.swapped:
            self._device.swap_in(job.saved, job.row)
            job.swapped, job.saved = False, None
            return
        if job.context is not None:
            kept = self._context(job.context)
            drawn = self._device.ask(job, kept.lease, kept.rope_length)
        else:
            prompt = self._device.prefill(job, self._menu.growth(job.limit), job.limit)
            drawn = self._device.admit(job, prompt)
        self._counts["in"] += len(job.tokens)
        job.drawn = 1
        self._pending.append(_Dispatch(drawn, ((0, job),)))

    def _decode(self) -> bool:
        """Queue the next tokens of all rows; False where no row has any to draw."""
        jobs = [
            (row, job)
            for row, job in self._scheduler.running.items()
            if isinstance(job, Job) and job.drawn < job.limit
        ]
        if not jobs:
            return False
        steps = self._device.steps
        full = [
            (row, job)
            for row, job in jobs
            if job.tail + min(steps, job.limit - job.drawn) > self._menu.tail_slots
        ]
        if full:
            self._device.make_room([row for row, _ in full])
            self._counts["evictions"] += len(full) * (self._menu.recompress is not None)
            for _, job in full:
                job.tail = 0
        self._pending.append(_Dispatch(self._device.decode(), tuple(jobs)))
        for _, job in jobs:
            fed = min(steps, job.limit - job.drawn)
            job.drawn, job.tail = job.drawn + fed, job.tail + fed
        return True

    def _hand_out(self, ahead: int) -> None:
        """Give clients what was drawn, but for the last `ahead` dispatches; end what is over."""
        while len(self._pending) > ahead:
            drawn, jobs = self._pending.popleft()
            tokens_RO, log_probs_RO = np.asarray(drawn.tokens), np.asarray(drawn.log_probs)
            for row, job in jobs:
                if job.done:
                    continue
                mine_O = tokens_RO[row] >= 0
                told = job.told
                job.take(tokens_RO[row][mine_O].tolist(), log_probs_RO[row][mine_O].tolist(),
                         self._device.eos)  # fmt: skip
                self._counts["out"] += job.told - told
                if job.done:
                    self._counts["finished"] += 1
                    self._end(job)

    def _swap_out(self, job: Job) -> None:
        assert job.row is not None
        job.saved = self._device.swap_out(job.row)
        self._device.release([self._scheduler.swap_out(job)])

    def compilations(self) -> int:
        """Programs that were compiled since the server was ready; 0 unless something is amiss."""
        return programs.compilations()


def _all_steps(box: "queue.SimpleQueue[Step | BaseException]") -> list[Step]:
    steps = []
    while not steps or steps[-1].finish_reason is None:
        step = box.get()
        if isinstance(step, BaseException):
            raise step
        steps.append(step)
    return steps


def _tail_slots(slots: int | None, steps: int, recompress: Recompress | None) -> int:
    """Slots of a row's tail; whole dispatches fill it."""
    if recompress is not None:
        if recompress.budget is None:
            raise ValueError("recompress.budget=None, expected a number of entries a head")
        if recompress.every % steps or slots not in (None, recompress.every):
            raise ValueError(
                f"recompress.every={recompress.every}, expected a multiple of decode_steps={steps}"
                " and no other tail_slots"
            )
        return recompress.every
    found = -(-TAIL // steps) * steps if slots is None else slots
    if found < steps or found % steps:
        raise ValueError(f"tail_slots={found!r}, expected a multiple of decode_steps={steps}")
    return found


def _methods(
    methods: Method | Mapping[str, Method],
    budget: int | float | None,
    model: Model,
    tokenizer: Any,
) -> dict[str, CompressionConfig]:
    """Configs by name, as the engine runs them: packed, and without a ratio that answers keep."""
    import dataclasses

    if isinstance(methods, Mapping):
        given = dict(methods)
    else:
        given = {methods if isinstance(methods, str) else methods.method: methods}
    if not given:
        raise ValueError("methods={}, expected at least one")
    found = {}
    for name, method in given.items():
        config = parse_method(method, budget) if isinstance(method, str) else method
        check_config(config)
        config = instructed(config, tokenizer, model.config.vocab_size)
        layout = "packed" if config.compresses else None
        found[name] = dataclasses.replace(config, layout=layout, keep_ratio=False)
    return found
