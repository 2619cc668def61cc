"""A compressed cache on disk: safetensors, and what it belongs to.

A document is compressed once and asked for days. The file says which model and config made it; a
wrong model, a file cut short or a changed byte is refused.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvjax.cache.history import History
from kvjax.cache.origin import check_cache, fingerprint
from kvjax.cache.padded import PaddedLayer
from kvjax.cache.slot_moves import reshard_slots
from kvjax.cache.slots import Slots, in_pages, page_size
from kvjax.cache.state import Cache
from kvjax.cache.tail import Tail
from kvjax.config import CompressionConfig
from kvjax.model_interface import Model

_FORMAT = "kvjax-cache-2"
_BEFORE = "kvjax-cache-1"
_SLOTS = ("entries", "owners", "positions", "counts", "table", "sizes", "scales", "sums")
_STATIC = ("runs", "room", "most", "alike", "page")


def save_cache(
    path: str | Path, cache: Cache, model: Model, config: CompressionConfig | None = None
) -> Path:
    """Write a cache; a file of this name is replaced once the new one is whole.

    Args:
      path: of the file, in a folder that exists.
      cache: from `compress_prompt`, or from an answer (its tail is written too).
      model: the model that made it.
      config: how it was compressed, for the record.

    Raises:
      ValueError: a path that cannot be written, or a cache of another model.
    """
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir():
        raise ValueError(f"path={str(path)!r}, expected the name of a file in a folder that exists")
    check_cache(cache, model)
    slots = None
    if cache.slots is not None:
        slots = reshard_slots(cache.slots, 1)
        cache = cache.replace(slots=slots)
    arrays = {name: np.asarray(value) for name, value in _arrays(cache).items()}
    facts = {
        "model": fingerprint(model),
        "config": dataclasses.asdict(config) if config else None,
        "keep_ratio": cache.keep_ratio,
        "layers": len(cache.tail.keys),
        "turns": cache.history
        and [one.turns and [dict(turn) for turn in one.turns] for one in cache.history],
        "slots": slots and {name: getattr(slots, name) for name in _STATIC},
        "tokens": int(arrays["next_positions"].max()),
        "sha256": _digest(arrays),
    }
    part = target.with_name(target.name + ".part")
    metadata = {"format": _FORMAT, "facts": json.dumps(facts, default=str)}
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        save_file(whole, part, metadata=metadata)
        _flush(part)
        os.replace(part, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"path={str(path)!r} cannot be written ({error})") from None
    return target


def load_cache(path: str | Path, model: Model) -> Cache:
    """Read a cache that `save_cache` wrote.

    Raises:
      ValueError: not such a file, damaged, or made by another model.
      OSError: it cannot be read.
    """
    return jax.tree.map(jnp.asarray, load_on_host(path, model))


def load_on_host(path: str | Path, model: Model) -> Cache:
    """Read a cache as `load_cache` does, into arrays of NumPy."""
    source = Path(path)
    made, facts, arrays = _read(source)
    if _digest(arrays) != facts["sha256"]:
        raise ValueError(f"cache {source} is damaged: its checksum differs")
    if fingerprint(model) != facts["model"]:
        raise ValueError(f"cache {source} was made by another model")
    if made == _BEFORE:
        arrays, facts = _converted(arrays, facts)
    return _cache(arrays, facts)


def cache_facts(path: str | Path) -> dict[str, Any]:
    """What a file says of its cache: model, config, tokens; its arrays are not read.

    Raises:
      ValueError: not such a file, or damaged where this is written.
      OSError: it cannot be read.
    """
    return _read(Path(path), whole=False)[1]


def _read(source: Path, whole: bool = True) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Format, facts and arrays of a file."""
    if not source.is_file():
        raise ValueError(f"cache {source}, expected a file that save_cache wrote")
    try:
        with safe_open(source, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = file.keys() if whole else ()
            arrays = {name: file.get_tensor(name) for name in names}
        made = metadata.get("format")
        facts = json.loads(metadata["facts"]) if made in (_FORMAT, _BEFORE) else None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"cache {source} is damaged ({error})") from None
    if facts is None:
        raise ValueError(f"cache {source} is not one of kvjax, expected format {_FORMAT}")
    return str(made), facts, arrays


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _arrays(cache: Cache) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt_lengths": cache.prompt_lengths,
        "next_positions": cache.next_positions,
        "tail.positions": cache.tail.positions,
        "tail.cursor": cache.tail.cursor,
    }
    if cache.history is not None:
        found["history"] = _padded([one.tokens for one in cache.history])
    for name in ("rotary_shift", "rope_length"):
        if (array := getattr(cache, name)) is not None:
            found[name] = array
    for index, (keys, values) in enumerate(zip(cache.tail.keys, cache.tail.values, strict=True)):
        found |= {f"tail.{index}.keys": keys, f"tail.{index}.values": values}
    found |= {f"tail.{index}.sums": sums for index, sums in enumerate(cache.tail.sums)}
    for index, layer in enumerate(cache.layers):
        for name in ("keys", "values", "positions"):
            found[f"layer.{index}.{name}"] = getattr(layer, name)
    if cache.slots is not None:
        for name in _SLOTS:
            if (array := getattr(cache.slots, name)) is not None:
                found[f"slots.{name}"] = array
    return found


def _cache(arrays: dict[str, Any], facts: dict[str, Any]) -> Cache:
    layers, slots = range(facts["layers"]), None
    if facts["slots"]:
        static = dict(facts["slots"])
        static["runs"] = static["runs"] and tuple(tuple(run) for run in static["runs"])
        found: dict[str, Any] = {name: arrays.get(f"slots.{name}") for name in _SLOTS}
        slots = Slots(**found, **static, dtype=arrays["tail.0.keys"].dtype)
    padded = tuple(
        PaddedLayer(**{n: arrays[f"layer.{i}.{n}"] for n in ("keys", "values", "positions")})
        for i in (layers if slots is None else ())
    )
    return Cache(
        layers=padded,
        slots=slots,
        tail=Tail(
            keys=tuple(arrays[f"tail.{i}.keys"] for i in layers),
            values=tuple(arrays[f"tail.{i}.values"] for i in layers),
            positions=arrays["tail.positions"],
            cursor=arrays["tail.cursor"],
            sums=tuple(arrays[f"tail.{i}.sums"] for i in layers if f"tail.{i}.sums" in arrays),
        ),
        prompt_lengths=arrays["prompt_lengths"],
        next_positions=arrays["next_positions"],
        keep_ratio=facts["keep_ratio"],
        rotary_shift=arrays.get("rotary_shift"),
        rope_length=arrays.get("rope_length"),
        origin=facts["model"],
        history=_history(arrays.get("history"), facts.get("turns")),
    )


def _padded(rows: list[tuple[int, ...]]) -> np.ndarray:
    """Rows of token ids as one int32 array, with -1 behind each."""
    found = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, tokens in zip(found, rows, strict=True):
        row[: len(tokens)] = tokens
    return found


def _history(tokens: Any, turns: Any) -> tuple[History, ...] | None:
    """What `_padded` and the facts say of each row; caches saved before have neither."""
    if tokens is None:
        return None
    rows = [row[row >= 0].tolist() for row in np.asarray(tokens)]
    return tuple(
        History(tuple(row), None if one is None else tuple(one))
        for row, one in zip(rows, turns, strict=True)
    )


def _converted(
    arrays: dict[str, np.ndarray], facts: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What version 2 would have written of a file of version 1, whose layers had no pages.

    There a layer's slots lay behind those of the one before it, from static regions, from `starts`
    where entries came and went, or as far as counts said.
    """
    facts = facts | {"slots": None}
    if "pool.entries" not in arrays:
        return arrays, facts
    old = {name[5:]: x for name, x in arrays.items() if name.startswith("pool.")}
    counts, page = old["counts"], page_size()
    batch, layers, _ = counts.shape
    if facts["regions"]:
        firsts = np.tile([first for first, _ in facts["regions"]], (batch, 1))
        sizes = np.tile([end - first for first, end in facts["regions"]], (batch, 1))
    elif "starts" in old:
        firsts, sizes = old["starts"][:, :-1], np.diff(old["starts"], axis=1)
    else:
        sizes = counts.sum(-1)
        firsts = np.cumsum(sizes, axis=1) - sizes
    runs = facts["regions"] and tuple(map(tuple, facts["regions"]))
    total, runs = in_pages(old["owners"].shape[1], runs, layers, page)
    used = -(-counts.sum(-1) // page)
    begins = (np.cumsum(used, axis=1) - used) * page
    if runs:
        begins = np.tile([first for first, _ in runs], (batch, 1))
    new = {
        "entries": np.zeros((batch, total, old["entries"].shape[2]), old["entries"].dtype),
        "owners": np.full((batch, total), -1, np.int8),
        "positions": np.full((batch, total), -1, np.int32),
        "scales": np.zeros((batch, 2, total), np.float32),
    }
    for row, layer in np.ndindex(batch, layers):
        source = firsts[row, layer] + np.arange(int(sizes[row, layer]))
        source = source[old["owners"][row, source] >= 0]
        target = begins[row, layer] + np.arange(len(source))
        for name in ("entries", "owners", "positions"):
            new[name][row, target] = old[name][row, source]
        if "scales" in old:
            new["scales"][row, :, target] = old["scales"][row, :, source]
    if "scales" not in old:
        del new["scales"]
    new["counts"] = counts
    kept = {name: x for name, x in arrays.items() if not name.startswith("pool.")}
    static = {"runs": runs, "page": page}
    static |= {"room": old["owners"].shape[1], "alike": runs is not None}
    static |= {"most": int(sizes.max())}
    return kept | {f"slots.{name}": x for name, x in new.items()}, facts | {"slots": static}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
