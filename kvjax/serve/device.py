"""The device's side of a server: its state, and every program called with it.

What is handed to programs has the same shapes and types at every call, so that none is compiled
once `warm_up` has run them all.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.cache.slots import Slots, page_size
from kvjax.exact import MOST, always_32_bits
from kvjax.generation.programs import flat
from kvjax.generation.sampling import Sampling, Values, row_keys
from kvjax.model_interface import Model
from kvjax.serve import programs
from kvjax.serve.fit import page_bytes, pages_within
from kvjax.serve.job import Job, running_text
from kvjax.serve.menu import Choice, Menu
from kvjax.serve.pages import Lease, Shape
from kvjax.serve.programs import Prompt, State, Swapped
from kvjax.serve.rows import Drawn, Rows
from kvjax.sharding import DATA, MODEL, mesh_of


class Device:
    """Pages, rows and tails of a server, and the programs that change them.

    Args:
      model: the decoder, on the devices where it is to run.
      menu: what the server offers.
      cache_bytes: of pages and tails together.
      rows: answered at once.
      decode_steps: tokens of every row between two looks of the host.
      top_logprobs: likeliest tokens that come with each one.

    Raises:
      ValueError: fewer bytes than the tails and a page take.
    """

    @always_32_bits
    def __init__(
        self,
        model: Model,
        menu: Menu,
        *,
        cache_bytes: int,
        rows: int,
        decode_steps: int,
        top_logprobs: int = 0,
    ):
        config = model.config
        self.menu, self.steps, self.rows = menu, decode_steps, rows
        self._model, self._windows = flat(model), config.sliding_windows
        self._top = top_logprobs
        self._by_length, self._vocab = config.rope_by_length, config.vocab_size
        self.eos = tuple(config.eos_token_ids)
        self._eos = np.array([*self.eos, -1], np.int32)
        itemsize = jnp.dtype(model.embed.table_VD.dtype).itemsize
        self.page_bytes = page_bytes(menu, itemsize)
        pages = pages_within(cache_bytes, menu, rows, itemsize)
        shape = Shape(
            rows=rows,
            layers=config.num_layers,
            kv_heads=config.num_kv_heads,
            width=min(menu.widest, pages),
            pages=pages,
            page=menu.page,
        )
        self.shape = shape
        self.sizes = menu.sizes(shape.width)
        self.swap_pages = min(menu.largest_row, pages)
        self.state: State = programs.open_program(
            self._model, shape=shape, tail_slots=menu.tail_slots, quantize=menu.quantize,
            recompress=menu.recompress,
        )  # fmt: skip

    # ------------------------------------------------------------------ requests
    @always_32_bits
    def prefill(self, job: Job) -> Prompt:
        """Read and compress the prompt of a job without a context."""
        assert job.choice is not None  # it has no context
        return self._prefill(job.tokens, job.choice, job.more, job.limit, job.seed)

    def _prefill(
        self, ids: Sequence[int], choice: Choice, more: int, following: int, seed: int
    ) -> Prompt:
        """Read and compress a text; `following` tokens may come after it."""
        tokens, length = _padded(ids, choice.bucket)
        rope_length = length + np.int32(following) if self._by_length else None
        budget, config = np.array([choice.budget], np.int32), choice.config
        return programs.prefill_program(
            self._model, tokens, length, row_keys(seed, 1), budget, np.int32(more), rope_length,
            config=config, recompress=self.menu.recompress,
        )  # fmt: skip

    @always_32_bits
    def admit(self, job: Job, prompt: Prompt) -> Drawn:
        """Give a prompt the job's row; its first token."""
        length = len(job.tokens)
        one = self._one(job, length, length, length + job.limit)
        row = np.int32(_row(job))
        self.state, drawn = programs.admit_program(
            *self.state, prompt, row, one, self._eos, self._hold(job), top=self._top
        )
        return _sent(drawn)

    def _hold(self, job: Job) -> np.int32:
        """Pages that a job's row has at least: as many as it was promised, where that changes."""
        return np.int32(0 if self.sizes is None else job.pages)

    @always_32_bits
    def ask(self, job: Job, context: Lease, rope_length: int) -> Drawn:
        """Give a question about a context the job's row; its first token."""
        tokens, _ = _padded(job.tokens, self.menu.question_bucket(len(job.tokens)))
        one = self._one(job, job.before, job.prompt_tokens, rope_length)
        row, more = np.int32(_row(job)), np.int32(job.more)
        self.state, drawn = programs.ask_program(
            *self.state, self._model, context, tokens, more, row, one, self._eos, top=self._top
        )
        return _sent(drawn)

    def _one(self, job: Job, position: int, prompt: int, rope_length: int) -> Rows:
        """A row that has drawn nothing, as programs take it."""
        rules = job.sampling
        used: Any = np.zeros((1, self._vocab), bool)
        used[0, job.tokens] = True

        def array(x: Any, dtype: Any = np.int32) -> Any:
            return np.array([x], dtype)

        return Rows(
            token=array(0),
            position=array(position),
            prompt=array(prompt),
            drawn=array(0),
            limit=array(job.limit),
            running=array(True, bool),
            ends=array(job.ends, bool),
            # As `start_answer` folds a row's key.
            keys=jax.vmap(jax.random.fold_in, (0, None))(row_keys(job.seed, 1), 0),
            values=Values(
                temperature=array(rules.temperature, np.float32),
                top_k=array(rules.top_k),
                top_p=array(rules.top_p, np.float32),
                min_p=array(rules.min_p, np.float32),
                penalty=array(rules.repetition_penalty, np.float32),
            ),
            used=used,
            rope_length=array(rope_length) if self._by_length else None,
        )

    # ------------------------------------------------------------------ all rows
    @always_32_bits
    def decode(self) -> Drawn:
        """Queue the next tokens of all rows."""
        pages, rows, tail = self.state
        rows, tail, drawn = programs.decode_program(
            self._model, pages, rows, tail, self._eos, steps=self.steps, top=self._top
        )
        self.state = State(pages, rows, tail)
        return _sent(drawn)

    @always_32_bits
    def make_room(self, rows: Sequence[int]) -> None:
        """Empty the tails of these rows: into pages, or evicting as the server's rule says."""
        if self.menu.recompress is not None:
            for row in rows:
                self.evict(row, self.menu.most, 0)
            return
        pages, of_rows, tail = self.state
        pages, tail = programs.flush_program(pages, tail, self._mask(rows))
        self.state = State(pages, of_rows, tail)

    @always_32_bits
    def evict(self, row: int, entries: int, pages: int) -> None:
        """Compress a row by the server's rule, to so many entries in so many pages at least.

        Both are for rules of one threshold; by others a row keeps the pages that it has.
        """
        rule = self.menu.recompress
        assert rule is not None  # else nothing is evicted
        held, rows, tail = self.state
        held, tail = programs.evict_program(
            held, tail, rows, np.int32(row), np.int32(entries), np.int32(pages), recompress=rule,
            windows=self._windows, size=self.swap_pages,
        )  # fmt: skip
        self.state = State(held, rows, tail)

    @always_32_bits
    def release(self, rows: Sequence[int]) -> None:
        """End these rows and give their pages back."""
        pages, of_rows, tail = self.state
        pages, of_rows = programs.release_program(pages, of_rows, self._mask(rows))
        self.state = State(pages, of_rows, tail)

    def _mask(self, rows: Sequence[int]) -> Bool[np.ndarray, " R"]:
        mask = np.zeros((self.rows,), bool)
        mask[list(rows)] = True
        return mask

    # ------------------------------------------------------------------ contexts and swaps
    @always_32_bits
    def keep(self, ids: Sequence[int], choice: Choice, following: int, seed: int) -> Lease:
        """Read and compress a text that many requests are going to ask."""
        return self._keep(self._prefill(ids, choice, 0, following, seed))

    def _keep(self, prompt: Prompt) -> Lease:
        pages, rows, tail = self.state
        pages, lease = programs.keep_program(pages, prompt)
        self.state = State(pages, rows, tail)
        return lease

    @always_32_bits
    def copy_out(self, context: Lease) -> Slots:
        """A context's entries in the host's memory, in `swap_pages` pages."""
        pages = self.state.pages
        return jax.device_get(programs.copy_out_program(pages, context, size=self.swap_pages))

    @always_32_bits
    def restore(self, slots: Slots) -> Lease:
        """Give such entries pages again."""
        held_L = np.asarray(slots.counts)[0].sum(-1).astype(np.int32)
        nothing: Any = np.zeros((1, 1), np.float32)
        return self._keep(Prompt(logits=nothing, slots=slots, sizes=held_L))

    @always_32_bits
    def drop(self, context: Lease) -> None:
        """Give a context's pages back."""
        pages, rows, tail = self.state
        self.state = State(programs.drop_program(pages, context), rows, tail)

    @always_32_bits
    def swap_out(self, row: int) -> Swapped:
        """Copy a row to the host's memory; release it afterwards."""
        saved = programs.swap_out_program(*self.state, np.int32(row), size=self.swap_pages)
        return saved.replace(slots=jax.device_get(saved.slots), tail=jax.device_get(saved.tail))

    @always_32_bits
    def swap_in(self, saved: Swapped, job: Job) -> None:
        """Bring a row back, to the job's place."""
        row = np.int32(_row(job))
        self.state = programs.swap_in_program(*self.state, saved, row, self._hold(job))

    def holdings(self) -> tuple[Int[np.ndarray, "R L W"], Int[np.ndarray, "R L"]]:
        """Table of each row, and pages that each layer has of it."""
        pages = self.state.pages
        return np.asarray(pages.table), -(-np.asarray(pages.sizes) // pages.slots.page)

    def held(self) -> int:
        """Pages that somebody holds, as the device counts them."""
        return int((np.asarray(self.state.pages.holders) > 0).sum())

    # ------------------------------------------------------------------ before the first request
    @always_32_bits
    def warm_up(self) -> int:
        """Run every program once, on prompts of one token; how many were compiled."""
        before = programs.compilations()
        row, questions = 0, self.menu.question_buckets
        job = _nobody(row)
        for bucket, config in self.menu.variants():
            prompt = self._prefill([0], Choice(bucket, config, MOST, 0), 0, 1, 0)
            self.admit(job, prompt)
            self.release([row])
            if questions:
                lease = self._keep(prompt)
                self.drop(lease)
        for bucket in questions:
            lease = self._keep(prompt)
            copied = self.copy_out(lease)
            self.drop(lease)
            lease = self.restore(copied)
            self.ask(dataclasses.replace(job, tokens=[0] * bucket, more=bucket), lease, bucket)
            self.drop(lease)
            self.release([row])
        if questions or self.sizes is not None:  # the only ones that swap
            self.swap_in(self.swap_out(row), job)
            self.release([row])
        self.decode()
        self.make_room([row])
        jax.block_until_ready(self.state)
        return programs.compilations() - before


def _padded(
    ids: Sequence[int], bucket: int
) -> tuple[Int[np.ndarray, "1 T"], Int[np.ndarray, " 1"]]:
    tokens = np.zeros((1, bucket), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens, np.array([len(ids)], np.int32)


def _row(job: Job) -> int:
    assert job.row is not None  # the scheduler has given it one
    return job.row


def _sent(drawn: Drawn) -> Drawn:
    """What was drawn, on its way to the host."""
    for x in drawn:
        cast(Array, x).copy_to_host_async()
    return drawn


def _nobody(row: int) -> Job:
    """A job that nobody waits for."""
    return Job(
        pages=0, row=row, number=-1, method="", tokens=[0], before=0, choice=None, limit=1,
        sampling=Sampling(), seed=0, ends=False, context=None, more=0, logprobs=0,
        push=lambda step: None, text=running_text(None, (), []),
    )  # fmt: skip


def page_of(model: Model) -> int:
    """Slots of a page on the devices that a model lies on.

    Raises:
      ValueError: a mesh with several parts of `data`; all rows are to share one pool.
    """
    mesh = mesh_of(model)
    if mesh is None:
        return page_size()
    if mesh.shape[DATA] > 1:
        raise ValueError(f"the model's mesh has data={mesh.shape[DATA]}, expected 1")
    return page_size(math.prod(mesh.shape[axis] for axis in MODEL))
