"""The thread that has the device: what happens in every round of a server.

A round does what clients asked for, admits at most one prompt (`reads` of them), empties tails that
are full, queues the next tokens of all rows, and only then reads those that were queued a round
before: from step to step the device never waits for the host. Before a prompt is read, which takes
long, all that was drawn goes to its clients.
"""

import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from kvjax.cache.slots import Slots
from kvjax.serve.clock import Clock
from kvjax.serve.contexts import Kept, leaving
from kvjax.serve.device import Device
from kvjax.serve.job import Job
from kvjax.serve.menu import Choice
from kvjax.serve.pages import Lease
from kvjax.serve.pressure import Pressure
from kvjax.serve.rows import Drawn
from kvjax.serve.scheduler import Scheduler
from kvjax.serve.stats import Context, Counts, Holder, Stats


class _Dispatch(NamedTuple):
    """Tokens on their way from the device, and whose they are, row by row.

    `reads` says whether they are the first one of an answer; `queued` when they were asked for.
    """

    drawn: Drawn
    jobs: tuple[tuple[int, Job], ...]
    reads: bool
    queued: float


class _Command(NamedTuple):
    """What the loop's thread is to do, and where its result or its error goes."""

    function: Callable[[], Any]
    box: "queue.SimpleQueue[tuple[Any, BaseException | None]] | None" = None


class Loop:
    """Jobs in, steps out, until it is closed.

    Args:
      device: nothing else may use it from now on.
      reads: prompts between two dispatches at most.
      context_bytes: of contexts together; None for what the pool leaves.

    Attributes:
      contexts: by id, least recently used first.
      failure: what ended the loop, if it was not closed.
    """

    def __init__(self, device: Device, reads: int = 1, context_bytes: int | None = None):
        self._device, self._menu, self._reads = device, device.menu, reads
        self._scheduler: Scheduler[Job] = Scheduler(device.rows, device.shape.pages)
        self._pressure: Pressure[Job] | None = None
        if device.sizes is not None:
            rest = device.sizes, self._evict, self.swap_out
            self._pressure = Pressure(self._scheduler, *rest)
        self.contexts: OrderedDict[str, Kept] = OrderedDict()
        self._context_bytes = context_bytes
        self.failure: BaseException | None = None
        self._counts, self._clock = Counts(), Clock()
        self._open: set[Job] = set()
        self._pending: deque[_Dispatch] = deque()
        self._commands: deque[_Command] = deque()
        self._changed = threading.Condition()
        self._closed = self._draining = False
        self._thread = threading.Thread(target=self._run, name="kvjax-serve", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ from any thread
    def needed(self, entries: int, limit: int) -> tuple[int, int]:
        """Pages by which a request is admitted, and those without which it can never be.

        Args:
          entries: kept of its prompt.
          limit: tokens of its answer.
        """
        sizes, menu = self._device.sizes, self._menu
        if sizes is None:
            pages = menu.pages(entries, menu.growth(limit))
            return pages, pages
        rest = entries, limit - 1 if limit - 1 > menu.tail_slots else 0
        return sizes.first(*rest), sizes.least(*rest)

    def check(self, pages: int) -> None:
        """Raise ValueError where a request can come to hold more pages than there are."""
        self._scheduler.check(pages)

    def enqueue(self, jobs: list[Job]) -> None:
        """Put jobs at the end of the queue.

        Raises:
          RuntimeError: the loop takes no more.
        """
        with self._changed:
            if self._closed or self._draining:
                raise RuntimeError("the engine is closed, or about to be") from self.failure
            self._open.update(jobs)
            self._commands.extend([_Command(partial(self._submit, job)) for job in jobs])
            self._changed.notify()

    def give_up(self, job: Job) -> None:
        """End a job whose client has gone; its pages are free in the next round."""
        with self._changed:
            self._commands.append(_Command(partial(self._abort, job)))
            self._changed.notify()

    def call(self, question: Callable[[], Any]) -> Any:
        """What a function gives in the loop's thread, between two rounds; its errors are raised."""
        box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed") from self.failure
            self._commands.append(_Command(question, box))
            self._changed.notify()
        found, error = box.get()
        if error is not None:
            raise error
        return found

    def drain(self) -> None:
        """Take no more jobs."""
        with self._changed:
            self._draining = True

    @property
    def idle(self) -> bool:
        """Whether every job has its answer, or never will."""
        with self._changed:
            return self._closed or not self._open

    def close(self) -> None:
        """End the thread; jobs that are not answered yet get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # ------------------------------------------------------------------ in the thread
    def add_context(
        self, name: str, tokens: list[int], choice: Choice, seed: int, following: int, kept: Kept
    ) -> None:
        """Read and compress a text; `kept` has all of it but the lease."""
        self._take_in(name, kept, lambda: self._device.keep(tokens, choice, following, seed))
        self._counts.tokens_in += len(tokens)

    def _take_in(self, name: str, kept: Kept, make: Callable[[], Lease]) -> None:
        """Let `make` fill a context's pages, once there are enough."""
        self._hand_out(0)  # as before a prompt: to read a text takes long
        gone = leaving(
            self.contexts, kept.pages, self._device.page_bytes, self._context_bytes, self.users
        )
        self._scheduler.check_hold(kept.pages, sum(self.contexts[one].pages for one in gone))
        for one in gone:
            self.drop_context(one)
            self._counts.contexts_dropped += 1
        swapped = self._scheduler.hold(kept.pages)
        try:
            for job in swapped:
                self.swap_out(job)
            lease = make()
        except BaseException:
            self._scheduler.let_go(kept.pages)
            raise
        self.contexts[name] = kept._replace(lease=lease, used=time.time())

    def copy_context(self, name: str) -> Slots:
        """A context's entries in the host's memory."""
        kept = self.contexts.get(name)
        if kept is None:
            raise ValueError(f"context={name!r}, expected one of {sorted(self.contexts)}")
        assert kept.lease is not None  # it is listed once it is read
        return self._device.copy_out(kept.lease)

    def restore_context(self, name: str, slots: Slots, kept: Kept) -> None:
        """Bring back what was copied; `kept` has all of it but the lease."""
        self._take_in(name, kept, lambda: self._device.restore(slots))

    @property
    def room(self) -> tuple[int, int, int]:
        """Pages of what `restore_context` takes, those that a layer may have, and devices."""
        device, shape = self._device, self._device.shape
        pages = min(device.swap_pages, shape.layers * shape.width)  # as of `copy_out`
        return pages, shape.width, device.state.pages.slots.parts

    def swap_out(self, job: Job) -> None:
        """Take a running job to the host's memory; it waits before all others."""
        if self._pressure is not None:
            self._pressure.before_swap(job)
        assert job.row is not None  # it is running
        job.saved = self._device.swap_out(job.row)
        self._device.release([self._scheduler.swap_out(job)])
        self._counts.swaps += 1

    def _evict(self, job: Job, entries: int, pages: int, forced: bool) -> None:
        assert job.row is not None  # it is running
        self._device.evict(job.row, entries, pages)
        self._counts.evictions += 1
        self._counts.forced_evictions += forced

    def drop_context(self, name: str) -> None:
        """Give a context's pages back."""
        kept = self.contexts.get(name)
        if kept is None:
            raise ValueError(f"context={name!r}, expected one of {sorted(self.contexts)}")
        if users := self.users(name):
            raise ValueError(f"context={name!r} has {users} requests, expected none")
        assert kept.lease is not None  # it is listed once it is read
        del self.contexts[name]
        self._device.drop(kept.lease)
        self._scheduler.let_go(kept.pages)

    def users(self, name: str) -> int:
        """Requests about a context that are not answered yet."""
        with self._changed:
            return sum(job.context == name for job in self._open)

    def told_contexts(self) -> tuple[Context, ...]:
        """What is kept for many requests."""
        return tuple(
            Context(
                name,
                kept.method,
                kept.tokens,
                kept.pages,
                kept.pages * self._device.page_bytes,
                self.users(name),
                kept.used,
            )
            for name, kept in self.contexts.items()
        )

    def stats(self, pages: bool) -> Stats:
        """The server now; with `pages` those of each row, read from the device."""
        scheduler = self._scheduler
        table, counts = self._device.holdings() if pages else (None, None)
        holders = []
        for row, job in sorted(scheduler.running.items()):
            mine = None
            if table is not None and counts is not None:
                layers = zip(table[row], counts[row], strict=True)
                mine = tuple(tuple(layer[:count].tolist()) for layer, count in layers)
            holders.append(Holder(row, job.number, job.method, job.prompt_tokens, job.told, mine))
        return Stats(
            queued=len(scheduler.queue),
            running=len(scheduler.running),
            rows=scheduler.rows,
            pages=scheduler.pages,
            free_pages=scheduler.free,
            held_pages=scheduler.pages - scheduler.free - scheduler.held,
            shared_pages=scheduler.held,
            page_slots=self._menu.page,
            holders=tuple(holders),
            spent=self._clock.spent(),
            **vars(self._counts),
        )

    def _run(self) -> None:
        error: BaseException = RuntimeError("the engine was closed")
        try:
            while self._obey():
                for _ in range(self._reads):
                    if not self._admit():
                        break
                queued = self._decode()
                self._hand_out(1 if queued else 0)
        except BaseException as failure:  # whoever waits is to learn of it
            error = self.failure = failure
        with self._changed:
            self._closed = True
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            if command.box is not None:
                command.box.put((None, error))
        for job in list(self._open):
            job.fail(error)

    def _obey(self) -> bool:
        """Do what was asked for, once there is something to do; False when all is over."""
        with self._changed:
            while not (self._closed or self._commands or self._busy()):
                self._changed.wait()
            count = len(self._commands)
        for _ in range(count):
            if (command := self._next_command()) is None:
                break
            function, box = command
            if box is None:
                function()
                continue
            try:
                box.put((function(), None))
            except Exception as error:  # the caller's
                box.put((None, error))
        return not self._closed

    def _next_command(self) -> _Command | None:
        """What is to be done next. The others stay where `_run` finds them if this one fails."""
        with self._changed:
            return None if self._closed or not self._commands else self._commands.popleft()

    def _busy(self) -> bool:
        return bool(self._scheduler.queue or self._scheduler.running or self._pending)

    def _submit(self, job: Job) -> None:
        if job.context is not None and (kept := self.contexts.get(job.context)) is not None:
            self.contexts[job.context] = kept._replace(used=time.time())
            self.contexts.move_to_end(job.context)
        try:
            self._scheduler.submit(job)
        except ValueError as error:  # a context has come since it was checked
            job.fail(error)
            self._end(job)

    def _abort(self, job: Job) -> None:
        if not job.done:
            job.done = True
            self._counts.aborted += 1
            self._end(job)

    def _end(self, job: Job) -> None:
        row = self._scheduler.finish(job)
        job.saved = None
        if row is not None:
            self._device.release([row])
        with self._changed:
            self._open.discard(job)

    def _admit(self) -> bool:
        """One prompt, or one row that comes back; False where there is no row or pages for it."""
        if self._pressure is not None:
            self._pressure.make_way()
        job = self._scheduler.admit()
        if job is None:
            return False
        assert job.row is not None  # it was admitted
        if job.saved is not None:
            self._device.swap_in(job.saved, job)
            job.saved = None
            return True
        self._hand_out(0)  # what clients have to get is not to wait for another's prompt
        now = time.perf_counter()
        if job.context is None:
            drawn = self._device.admit(job, self._device.prefill(job))
        elif (kept := self.contexts.get(job.context)) is None:  # given up before it was asked
            job.fail(ValueError(f"context={job.context!r}, expected one of {list(self.contexts)}"))
            self._end(job)
            return True
        else:
            assert kept.lease is not None  # it is listed once it is read
            drawn = self._device.ask(job, kept.lease, kept.rope_length)
        self._counts.tokens_in += len(job.tokens)
        job.drawn = 1
        self._pending.append(_Dispatch(drawn, ((0, job),), True, now))
        return True

    def _decode(self) -> bool:
        """Queue the next tokens of all rows; False where no row has any to draw."""
        steps, most, now = self._device.steps, self._menu.tail_slots, time.perf_counter()
        self._make_room([job for job in self._drawing() if job.tail + min(steps, job.left) > most])
        jobs = self._drawing()
        if not jobs:
            return False
        places = tuple((job.row, job) for job in jobs if job.row is not None)
        self._pending.append(_Dispatch(self._device.decode(), places, False, now))
        for job in jobs:
            fed = min(steps, job.left)
            job.drawn, job.tail, job.fresh = job.drawn + fed, job.tail + fed, False
        return True

    def _drawing(self) -> list[Job]:
        return [job for job in self._scheduler.running.values() if job.left]

    def _make_room(self, full: list[Job]) -> None:
        """Empty the tails of these jobs; under pressure a job may lose its row instead."""
        if self._pressure is not None:
            for job in full:
                self._pressure.grow(job)
        elif full:
            self._device.make_room([job.row for job in full if job.row is not None])
            self._counts.evictions += len(full) if self._menu.recompress is not None else 0
            for job in full:
                job.tail = 0

    def _hand_out(self, ahead: int) -> None:
        """Give clients what was drawn, but for the last `ahead` dispatches; end what is over."""
        while len(self._pending) > ahead:
            drawn, jobs, reads, queued = self._pending.popleft()
            drawn, handed = jax.device_get(drawn), self._counts.tokens_out
            done = time.perf_counter()
            for row, job in jobs:
                if job.done:
                    continue
                before = job.told
                job.take(drawn, row, self._device.eos)
                self._counts.tokens_out += job.told - before
                if job.done:
                    self._counts.finished += 1
                    self._end(job)
            if reads:
                self._clock.note_prompt(queued, done)
            else:
                handed = self._counts.tokens_out - handed
                self._clock.note_tokens(queued, done, len(jobs), handed)
