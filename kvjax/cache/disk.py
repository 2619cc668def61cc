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

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvjax.cache.origin import check_cache, fingerprint
from kvjax.cache.padded import PaddedLayer
from kvjax.cache.slots import Pool, reshard_slots
from kvjax.cache.state import Cache
from kvjax.cache.tail import Tail
from kvjax.config import CompressionConfig
from kvjax.model_interface import Model

_FORMAT = "kvjax-cache-1"
_POOL = ("entries", "owners", "positions", "counts", "starts", "scales")


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
    if cache.pool is not None:
        cache = cache.replace(pool=reshard_slots(cache.pool, 1))
    arrays = {name: np.asarray(value) for name, value in _arrays(cache).items()}
    facts = {
        "model": fingerprint(model),
        "config": dataclasses.asdict(config) if config else None,
        "keep_ratio": cache.keep_ratio,
        "layers": len(cache.tail.keys),
        "regions": cache.pool.regions if cache.pool is not None else None,
        "widest": cache.pool.widest if cache.pool is not None else None,
        "sha256": _digest(arrays),
    }
    part = target.with_name(target.name + ".part")
    metadata = {"format": _FORMAT, "facts": json.dumps(facts)}
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        save_file(whole, part, metadata=metadata)
        os.replace(part, target)
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
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"cache {source}, expected a file that save_cache wrote")
    try:
        with safe_open(source, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata["facts"]) if metadata.get("format") == _FORMAT else None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"cache {source} is damaged ({error})") from None
    if facts is None:
        raise ValueError(f"cache {source} is not one of kvjax, expected format {_FORMAT}")
    if _digest(arrays) != facts["sha256"]:
        raise ValueError(f"cache {source} is damaged: its checksum differs")
    if fingerprint(model) != facts["model"]:
        raise ValueError(f"cache {source} was made by another model")
    return _cache({name: jnp.asarray(array) for name, array in arrays.items()}, facts)


def _arrays(cache: Cache) -> dict[str, Any]:
    found = {
        "prompt_lengths": cache.prompt_lengths,
        "next_positions": cache.next_positions,
        "tail.positions": cache.tail.positions,
        "tail.cursor": cache.tail.cursor,
    }
    if cache.rotary_shift is not None:
        found["rotary_shift"] = cache.rotary_shift
    for index, (keys, values) in enumerate(zip(cache.tail.keys, cache.tail.values, strict=True)):
        found |= {f"tail.{index}.keys": keys, f"tail.{index}.values": values}
    for index, layer in enumerate(cache.layers):
        for name in ("keys", "values", "positions"):
            found[f"layer.{index}.{name}"] = getattr(layer, name)
    if cache.pool is not None:
        for name in _POOL:
            if (array := getattr(cache.pool, name)) is not None:
                found[f"pool.{name}"] = array
    return found


def _cache(arrays: dict[str, Any], facts: dict[str, Any]) -> Cache:
    layers, pool = range(facts["layers"]), None
    if "pool.entries" in arrays:
        regions = facts["regions"] and tuple(tuple(region) for region in facts["regions"])
        found: dict[str, Any] = {name: arrays.get(f"pool.{name}") for name in _POOL}
        widest, dtype = facts.get("widest"), arrays["tail.0.keys"].dtype
        pool = Pool(**found, regions=regions, widest=widest, dtype=dtype)
    padded = tuple(
        PaddedLayer(**{n: arrays[f"layer.{i}.{n}"] for n in ("keys", "values", "positions")})
        for i in (layers if pool is None else ())
    )
    return Cache(
        layers=padded,
        pool=pool,
        tail=Tail(
            keys=tuple(arrays[f"tail.{i}.keys"] for i in layers),
            values=tuple(arrays[f"tail.{i}.values"] for i in layers),
            positions=arrays["tail.positions"],
            cursor=arrays["tail.cursor"],
        ),
        prompt_lengths=arrays["prompt_lengths"],
        next_positions=arrays["next_positions"],
        keep_ratio=facts["keep_ratio"],
        rotary_shift=arrays.get("rotary_shift"),
        origin=facts["model"],
    )


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
