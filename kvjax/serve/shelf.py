"""Contexts on disk: saved caches of one row, which come back into the pool when they are asked.

A file is what `kvjax.save_cache` writes. It is whole or absent, whenever the process ends, and says
which model made it. Requests name ids, which are looked up and never become paths.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.disk import cache_facts, load_on_host, save_cache
from kvjax.cache.origin import fingerprint
from kvjax.cache.slot_layers import compacted
from kvjax.cache.slot_moves import repaged, reshard_slots
from kvjax.cache.slots import Slots
from kvjax.cache.state import Cache
from kvjax.cache.tail import empty_tail
from kvjax.compression.room import slots_of
from kvjax.generation.request import UNKNOWN
from kvjax.model_interface import Model
from kvjax.serve.contexts import InUse, Kept
from kvjax.serve.loop import Loop
from kvjax.serve.menu import Menu
from kvjax.serve.stats import Context

_FILE = re.compile(r"(context-[0-9a-f]{16})\.kvjax")


class Shelf:
    """The contexts of a server that lie in a folder.

    Args:
      model: that made them; files of another one are left alone.
      menu: what the server offers.
      loop: has those that are in the pool.
      folder: made if it is not there; None to keep nothing on disk.

    Attributes:
      refused: a sentence for each file that cannot be used.

    Raises:
      ValueError: a folder that cannot be had.
    """

    def __init__(self, model: Model, menu: Menu, loop: Loop, folder: str | Path | None):
        self._model, self._menu, self._loop = model, menu, loop
        self._folder = None if folder is None else Path(folder)
        self._saved: dict[str, Context] = {}
        self._one = threading.Lock()
        self.refused: list[str] = []
        if self._folder is None:
            return
        if not menu.question_buckets:
            raise ValueError(
                f"contexts_dir={str(folder)!r} beside question_buckets=(), expected lengths of"
                " questions about contexts"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in self._folder.iterdir())
            for name in names:
                if name.endswith(".part") and _FILE.fullmatch(name.removesuffix(".part")):
                    (self._folder / name).unlink()  # a write that was ended
        except OSError as error:
            raise ValueError(
                f"contexts_dir={str(folder)!r} cannot be used ({error}), expected a folder"
            ) from None
        fingerprint(model)  # now: on an accelerator it compiles
        for name in names:
            if found := _FILE.fullmatch(name):
                self._list(found[1])

    def _list(self, context: str) -> None:
        """Note a file, by what it says of itself."""
        path = self._path(context)
        try:
            facts = cache_facts(path)
            if facts["model"] != fingerprint(self._model):
                raise ValueError(f"cache {path} was made by another model")
            method, tokens = self._method(facts), int(facts.get("tokens", 0))
        except (ValueError, OSError) as error:
            self.refused.append(str(error))
            return
        except (KeyError, TypeError):
            self.refused.append(f"cache {path} is damaged: what it says of itself is not whole")
            return
        self._saved[context] = Context(
            context, method, tokens, 0, 0, 0, path.stat().st_mtime, saved=True
        )

    def _path(self, context: str) -> Path:
        assert self._folder is not None  # who asks has looked
        return self._folder / f"{context}.kvjax"

    def _method(self, facts: Mapping[str, Any]) -> str:
        """The server's name of what made a cache, or its own."""
        config = facts.get("config")
        for name, offered in self._menu.methods.items():
            if config == json.loads(json.dumps(asdict(offered), default=str)):
                return name
        return "unknown" if config is None else config["method"]

    # ------------------------------------------------------------------ by id
    def add(self, context: str, kept: Kept, make: Callable[[], None]) -> None:
        """Let the loop make a context, and write it to the folder, if there is one.

        Args:
          context: its id.
          kept: what is said of it.
          make: called in the loop's thread.

        Raises:
          ValueError: it cannot be made or written; nothing is left of it.
        """

        def made() -> Slots | None:
            make()
            # In the same round: others could take its place before it is written.
            return None if self._folder is None else self._loop.copy_context(context)

        slots = self._loop.call(made)
        if slots is None:
            return
        try:
            self._write(self._path(context), slots, kept)
        except BaseException:
            with contextlib.suppress(ValueError):  # others took its place meanwhile
                self._loop.call(lambda: self._loop.drop_context(context))
            raise
        self._saved[context] = Context(
            context, kept.method, kept.tokens, 0, 0, 0, time.time(), saved=True
        )

    def find(self, context: str) -> Kept:
        """A context, brought into the pool if it lies in the folder alone.

        Raises:
          ValueError: there is none of this id, or its file is damaged, or there is no room.
        """
        kept = self._loop.contexts.get(context)
        if kept is None and context in self._saved:
            with self._one:
                if context not in self._loop.contexts:
                    self._bring_back(context)
            kept = self._loop.contexts.get(context)
        if kept is None:
            ids = sorted({*self._loop.contexts, *self._saved})
            raise ValueError(f"context={context!r}, expected one of {ids}")
        return kept

    def _bring_back(self, context: str) -> None:
        path = self._path(context)
        try:
            slots, kept = self._read(path)
            self._loop.call(lambda: self._loop.restore_context(context, slots, kept))
        except InUse:
            raise
        except ValueError as error:
            # Clients are not told where files lie.
            reason = str(error).replace(str(path), "on disk")
            raise ValueError(f"context={context!r} cannot be had ({reason})") from None

    def drop(self, context: str) -> None:
        """Give a context up, in the pool and in the folder.

        Raises:
          ValueError: there is none of this id, or it is being asked.
        """
        with self._one:
            if context in self._loop.contexts or context not in self._saved:
                self._loop.call(lambda: self._loop.drop_context(context))
            if self._saved.pop(context, None) is not None:
                self._path(context).unlink(missing_ok=True)

    def contexts(self) -> tuple[Context, ...]:
        """All of them; those in the folder alone have no pages."""
        held = self._loop.call(self._loop.told_contexts)
        ids = {one.id for one in held}
        waiting = [one for name, one in list(self._saved.items()) if name not in ids]
        return (*(replace(one, saved=one.id in self._saved) for one in held), *waiting)

    # ------------------------------------------------------------------ by path
    def save(self, context: str, path: str | Path) -> Path:
        """Write a context as `kvjax.save_cache` does.

        Raises:
          ValueError: there is none of this id, or it cannot be written.
        """
        kept = self.find(context)
        slots = self._loop.call(lambda: self._loop.copy_context(context))
        return self._write(path, slots, kept)

    def _write(self, path: str | Path, slots: Slots, kept: Kept) -> Path:
        cache = as_cache(slots, kept, self._model)
        return save_cache(path, cache, self._model, self._menu.methods.get(kept.method))

    def load(self, path: str | Path, context: str) -> None:
        """Bring a file that `save` or `kvjax.save_cache` wrote into the pool.

        Raises:
          ValueError: not such a file, damaged, of another model, or not to be asked here.
        """
        slots, kept = self._read(Path(path))
        self.add(context, kept, lambda: self._loop.restore_context(context, slots, kept))

    def _read(self, path: Path) -> tuple[Slots, Kept]:
        """The entries in a file, and what is said of them."""
        try:
            cache = load_on_host(path, self._model)
            method = self._method(cache_facts(path))
        except OSError as error:
            raise ValueError(f"cache {path} cannot be read ({error.strerror})") from None
        except (KeyError, TypeError):
            raise ValueError(
                f"cache {path} is damaged: what it says of itself is not whole"
            ) from None
        try:
            slots = as_slots(cache, self._menu, *self._loop.room)
        except ValueError as error:
            raise ValueError(f"cache {path} {error}") from None
        tokens = int(np.asarray(cache.next_positions)[0])
        kept = Kept(
            lease=None,
            method=method,
            history=cache.history or UNKNOWN,
            tokens=tokens,
            pages=self._menu.pages(int(slots.counts.sum()), 0),
            rope_length=tokens if cache.rope_length is None else int(cache.rope_length[0]),
        )
        return slots, kept


# ---------------------------------------------------------------------------- slots and caches
def as_cache(slots: Slots, kept: Kept, model: Model) -> Cache:
    """What was copied out of the pool, as `compress_prompt` would have handed it back."""
    slots = reshard_slots(slots, 1)
    held_L = np.asarray(slots.counts)[0].sum(-1)
    size = int((-(-held_L // slots.page)).sum()) * slots.page
    slots = slots.replace(
        entries=slots.entries[:, :size],
        owners=slots.owners[:, :size],
        positions=slots.positions[:, :size],
        scales=None if slots.scales is None else slots.scales[:, :, :size],
        table=None,
        room=size,
        most=int(held_L.max()),
    )
    tokens: Any = np.array([kept.tokens], np.int32)
    rope_length: Any = np.array([kept.rope_length], np.int32)
    return Cache(
        layers=(),
        slots=slots,
        # In NumPy: a server that is warm compiles nothing.
        tail=jax.tree.map(
            lambda x: np.full(x.shape, -1 if x.ndim == 2 else 0, x.dtype),
            jax.eval_shape(partial(empty_tail, slots, 1)),
        ),
        prompt_lengths=tokens,
        next_positions=tokens,
        rope_length=rope_length if model.config.rope_by_length else None,
        origin=fingerprint(model),
        history=None if kept.history == UNKNOWN else kept.history,
    )


def as_slots(cache: Cache, menu: Menu, pages: int, width: int, parts: int) -> Slots:
    """The entries of a cache as one program takes them, whatever the cache's own form.

    Args:
      cache: of one row.
      menu: what the server offers.
      pages: of the result.
      width: pages that a layer of a row may have, its question and answer included.
      parts: devices that a page is dealt out to.

    Raises:
      ValueError: what a server cannot share; the sentence goes on after the cache's name.
    """
    _check(cache, menu)
    slots: Any = _plain(cache, menu.page)
    held_L = slots.counts[0].sum(-1)
    number_L, layers = -(-held_L // menu.page), slots.counts.shape[1]
    following = slots.counts.shape[2] * (menu.question_buckets[-1] + menu.max_new_tokens)
    if number_L.sum() > pages or (-(-(held_L + following) // menu.page)).max() > width:
        raise ValueError(
            f"has {int(held_L.max())} entries in a layer and {int(held_L.sum())} in all, expected"
            " no more than the server keeps of its longest prompt"
        )
    table = np.zeros((1, layers, width), np.int32)
    ends = np.cumsum(number_L)
    for layer, (count, end) in enumerate(zip(number_L, ends, strict=True)):
        table[0, layer, :count] = np.arange(end - count, end)
    source_LW = slots.table[0] if slots.table is not None else _following(slots, number_L)
    order = np.concatenate([source_LW[i, : number_L[i]] for i in range(layers)])

    def ordered(array: np.ndarray, axis: int, empty: int) -> np.ndarray:
        paged = array.reshape(*array.shape[:axis], -1, menu.page, *array.shape[axis + 1 :])
        found = np.take(paged, order, axis=axis)
        more = [(0, 0)] * found.ndim
        more[axis] = (0, pages - len(order))
        found = np.pad(found, more, constant_values=empty)
        return found.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])

    slots = slots.replace(
        entries=ordered(slots.entries, 1, 0),
        owners=ordered(slots.owners, 1, -1),
        positions=ordered(slots.positions, 1, -1),
        scales=None if slots.scales is None else ordered(slots.scales, 2, 0),
        counts=np.asarray(slots.counts, np.int32),
        table=table,
        runs=None,
    )
    return reshard_slots(slots, parts)


def _plain(cache: Cache, page: int) -> Slots:
    """A cache's slots in such pages, each layer's entries first; in NumPy.

    What `save` wrote of a server on this platform is so already, and nothing is compiled for it.
    """
    slots = cache.slots
    if slots is None or slots.sizes is not None or slots.page != page:
        cache = jax.tree.map(jnp.asarray, cache)
        slots = slots_of(cache) if cache.slots is None else cache.slots
        if slots.sizes is not None or cache.slots is None:
            slots = compacted(slots)
        size = slots.size + slots.counts.shape[1] * page
        slots = repaged(slots, page, -(-size // page) * page)
    plain: dict[str, Any] = {"sums": None, "sizes": None, "room": 0, "most": None, "alike": False}
    return jax.device_get(slots.replace(**plain))


def _following(slots: Slots, number_L: np.ndarray) -> np.ndarray:
    """The pages of layers that follow one another, as a table of them."""
    firsts_L = np.cumsum(number_L) - number_L
    if slots.runs is not None:
        firsts_L = np.array([first for first, _ in slots.runs]) // slots.page
    return firsts_L[:, None] + np.arange(number_L.max())


def _check(cache: Cache, menu: Menu) -> None:
    """Raise ValueError for a cache that no server can share."""
    if cache.batch != 1:
        raise ValueError(f"has {cache.batch} rows, expected one")
    behind = int((np.asarray(cache.tail.positions) >= 0).sum())
    if behind:
        raise ValueError(f"has {behind} tokens in its tail, expected one of compress_prompt")
    if cache.rotary_shift is not None and np.asarray(cache.rotary_shift).any():
        raise ValueError("has images, expected text alone")
    quantized = cache.slots is not None and cache.slots.scales is not None
    if quantized != menu.quantize:
        held, wanted = ("int8", "none") if quantized else ("unquantized entries", "int8")
        raise ValueError(f"has {held}, expected {wanted} as the server's methods")
