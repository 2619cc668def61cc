"""The device's side of a server: its state, and every program called with it.

What is handed to programs has the same shapes and types at every call, so that none is compiled
once `warm_up` has run them all.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.cache.slots import page_size
from kvjax.config import CompressionConfig
from kvjax.exact import MOST, always_32_bits
from kvjax.generation.programs import flat
from kvjax.generation.sampling import Sampling, Values, row_keys
from kvjax.model_interface import Model
from kvjax.serve import programs
from kvjax.serve.job import Job
from kvjax.serve.menu import Menu
from kvjax.serve.pages import Lease, Shape
from kvjax.serve.programs import Prompt, State, Swapped
from kvjax.serve.rows import Drawn, Rows
from kvjax.sharding import MODEL, mesh_of


class Device:
    """Pages, rows and tails of a server, and the programs that change them.

    Args:
      model: the decoder, on the devices where it is to run.
      menu: what the server offers.
      cache_bytes: of pages and tails together.
      rows: answered at once.
      decode_steps: tokens of every row between two looks of the host.

    Raises:
      ValueError: fewer bytes than the tails and a page take.
    """

    @always_32_bits
    def __init__(self, model: Model, menu: Menu, *, cache_bytes: int, rows: int, decode_steps: int):
        config = model.config
        self.menu, self.steps, self.rows = menu, decode_steps, rows
        self._model, self._windows = flat(model), config.sliding_windows
        self._by_length = config.rope_by_length
        self.eos = tuple(config.eos_token_ids)
        self._eos = np.array([*self.eos, -1], np.int32)
        pages = _pages_within(cache_bytes, model, menu, rows)
        shape = Shape(
            rows=rows,
            layers=config.num_layers,
            kv_heads=config.num_kv_heads,
            width=min(menu.widest, pages),
            pages=pages,
            page=menu.page,
        )
        self.shape = shape
        self.swap_pages = min(menu.largest_row, pages)
        self.state: State = programs.open_program(
            self._model, shape=shape, tail_slots=menu.tail_slots, quantize=menu.quantize,
            recompress=menu.recompress,
        )  # fmt: skip

    # ------------------------------------------------------------------ requests
    @always_32_bits
    def prefill(self, job: Job, more: int, following: int) -> Prompt:
        """Read and compress a job's prompt.

        Args:
          job: with a choice.
          more: tokens of every head that come to lie in pages behind it.
          following: tokens after it, for frequencies that depend on a text's length.
        """
        assert job.choice is not None
        choice, config = job.choice, job.choice.config
        return self._prefill(
            job.tokens, choice.bucket, config, choice.budget, more, following, job.seed
        )

    def _prefill(self, ids, bucket, config, budget, more, following, seed) -> Prompt:
        tokens = np.zeros((1, bucket), np.int32)
        tokens[0, : len(ids)] = ids
        length = np.array([len(ids)], np.int32)
        rope_length = length + np.int32(following) if self._by_length else None
        return programs.prefill_program(
            self._model, tokens, length, row_keys(seed, 1), np.array([budget], np.int32),
            np.int32(more), rope_length, config=config, recompress=self.menu.recompress,
        )  # fmt: skip

    @always_32_bits
    def admit(self, job: Job, prompt: Prompt) -> Drawn:
        """Give a prompt the job's row; its first token."""
        one = self._one(job, len(job.tokens), len(job.tokens), len(job.tokens) + job.limit)
        found = programs.admit_program(*self.state, prompt, np.int32(job.row), one, self._eos)
        self.state, drawn = found
        return _sent(drawn)

    @always_32_bits
    def ask(self, job: Job, context: Lease, rope_length: int) -> Drawn:
        """Give a question about a context the job's row; its first token."""
        bucket = self.menu.question_bucket(len(job.tokens))
        tokens = np.zeros((1, bucket), np.int32)
        tokens[0, : len(job.tokens)] = job.tokens
        more = np.int32(len(job.tokens) + self.menu.growth(job.limit))
        one = self._one(job, job.before, job.prompt_tokens, rope_length)
        found = programs.ask_program(
            *self.state, self._model, context, tokens, more, np.int32(job.row), one, self._eos
        )
        self.state, drawn = found
        return _sent(drawn)

    def _one(self, job: Job, position: int, prompt: int, rope_length: int) -> Rows:
        rules: Sampling = job.sampling
        number, real = (lambda x: np.array([x], np.int32)), (lambda x: np.array([x], np.float32))
        values = Values(
            temperature=real(rules.temperature), top_k=number(rules.top_k), top_p=real(rules.top_p),
            min_p=real(rules.min_p), penalty=real(rules.repetition_penalty),
        )  # fmt: skip
        return Rows(
            token=number(0), position=number(position), prompt=number(prompt), drawn=number(0),
            limit=number(job.limit), running=np.ones((1,), bool), ends=np.array([job.ends]),
            keys=jax.vmap(jax.random.fold_in, (0, None))(row_keys(job.seed, 1), 0), values=values,
            rope_length=number(rope_length) if self._by_length else None,
        )  # fmt: skip

    # ------------------------------------------------------------------ all rows
    @always_32_bits
    def decode(self) -> Drawn:
        """Queue the next tokens of all rows."""
        pages, rows, tail = self.state
        rows, tail, drawn = programs.decode_program(
            self._model, pages, rows, tail, self._eos, steps=self.steps
        )
        self.state = State(pages, rows, tail)
        return _sent(drawn)

    @always_32_bits
    def make_room(self, rows: Sequence[int]) -> None:
        """Empty the tails of these rows: into pages, or evicting as the server's rule says."""
        rule = self.menu.recompress
        pages, of_rows, tail = self.state
        if rule is None:
            pages, tail = programs.flush_program(pages, tail, self._mask(rows))
        else:
            for row in rows:
                pages, tail = programs.evict_program(
                    pages, tail, of_rows, np.int32(row), recompress=rule, windows=self._windows
                )
        self.state = State(pages, of_rows, tail)

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
    def keep(self, ids: Sequence[int], config: CompressionConfig, budget: int, following: int,
             seed: int) -> Lease:  # fmt: skip
        """Read and compress a text that many requests are going to ask."""
        bucket = self.menu.bucket_of(len(ids))
        prompt = self._prefill(ids, bucket, config, budget, 0, following, seed)
        return self._keep(prompt)

    def _keep(self, prompt: Prompt) -> Lease:
        pages, rows, tail = self.state
        pages, lease = programs.keep_program(pages, prompt)
        self.state = State(pages, rows, tail)
        return lease

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
    def swap_in(self, saved: Swapped, row: int) -> None:
        """Bring a row back, to this place."""
        self.state = programs.swap_in_program(*self.state, saved, np.int32(row))

    def holdings(self) -> tuple[Int[np.ndarray, "R L W"], Int[np.ndarray, "R L"]]:
        """Table of each row, and pages that each layer has of it."""
        slots = self.state.pages.slots
        return np.asarray(slots.table), -(-np.asarray(slots.sizes) // slots.page)

    def held(self) -> int:
        """Pages that somebody holds, as the device counts them."""
        return int((np.asarray(self.state.pages.holders) > 0).sum())

    # ------------------------------------------------------------------ before the first request
    @always_32_bits
    def warm_up(self) -> int:
        """Run every program once, on prompts of nothing; programs that were compiled."""
        before = programs.compilations()
        menu, row = self.menu, 0
        job = _nobody(row)
        for bucket, config in menu.variants():
            prompt = self._prefill([0], bucket, config, MOST, 0, 1, 0)
            self.admit(job, prompt)
            self.release([row])
            if menu.question_buckets:
                self.drop(self._keep(prompt))
        if menu.question_buckets:
            lease = self._keep(prompt)
            for bucket in menu.question_buckets:
                job.tokens = [0] * bucket
                self.ask(job, lease, bucket)
                self.release([row])
            self.drop(lease)
            self.swap_in(self.swap_out(row), row)
        self.decode()
        self.make_room([row])
        self.release([row])
        jax.block_until_ready(self.state)
        return programs.compilations() - before


def _sent(drawn: Drawn) -> Drawn:
    """What was drawn, on its way to the host."""
    for x in drawn:
        cast(Array, x).copy_to_host_async()
    return drawn


def _nobody(row: int) -> Any:
    from kvjax.serve.job import running_text

    return Job(
        pages=0, row=row, number=-1, method="", tokens=[0], before=0, choice=None, limit=1,
        sampling=Sampling(), seed=0, ends=False, context=None, push=lambda step: None,
        text=running_text(None, (), []),
    )  # fmt: skip


def _pages_within(cache_bytes: int, model: Model, menu: Menu, rows: int) -> int:
    """Pages that fit beside the tails."""
    config, itemsize = model.config, jnp.dtype(model.embed.table_VD.dtype).itemsize
    heads = config.num_layers * config.num_kv_heads
    tails = rows * menu.tail_slots * heads * 2 * config.head_dim * itemsize
    # Beside an entry: its owner, its position, and in int8 two scales.
    slot = 2 * config.head_dim * (1 if menu.quantize else itemsize) + 5 + 8 * menu.quantize
    pages = (cache_bytes - tails) // (menu.page * slot)
    if pages < config.num_layers:
        least = tails + config.num_layers * menu.page * slot
        raise ValueError(
            f"cache_bytes={cache_bytes}, expected at least {least} for {rows} rows' tails and a page"
            " of each layer"
        )
    return int(pages)


def page_of(model: Model) -> int:
    """Slots of a page on the devices that a model lies on."""
    mesh = mesh_of(model)
    parts = 1
    for axis in MODEL:
        parts *= 1 if mesh is None else mesh.shape[axis]
    return page_size(parts)
