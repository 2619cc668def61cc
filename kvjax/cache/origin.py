"""Fingerprint the model that made a cache: its configs, and some values of each weight."""

import functools
import hashlib
import weakref
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.cache.state import Cache
from kvjax.model_interface import Model

_SAMPLE = 256  # values of each weight that are read


def fingerprint(model: Model) -> str:
    """A digest of the model's configs, and of shape, dtype and some values of each weight.

    The same for the same weights on any devices. It reads weights once; as long as they are the
    very same arrays, it is remembered.
    """
    return _digest(_Weights(model))


def owned(cache: Cache, model: Model) -> Cache:
    """The cache, if this model can continue it, without its origin and its history.

    No program depends on these.

    Raises:
      ValueError: a cache of other sizes or another dtype, or one that another model made.
    """
    check_cache(cache, model)
    return cache.replace(origin=None, history=None)


def check_cache(cache: Cache, model: Model) -> None:
    """Raise ValueError where a cache has not the model's sizes and dtype, or another origin.

    One without an origin (`kvjax.compress`) is compared in sizes and dtype alone, and has to say
    what its rows' rotary frequencies were chosen for, where the model's depend on length.
    """
    config, keys = model.config, cache.tail.keys
    _, kv_heads, _, head_dim = keys[0].shape
    held = _told(len(keys), kv_heads, head_dim, keys[0].dtype)
    dtype = model.embed.table_VD[...].dtype
    wanted = _told(config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    if held != wanted:
        raise ValueError(f"cache has {held}, expected the model's {wanted}")
    if config.rope_by_length and cache.rope_length is None:
        raise ValueError(
            "cache.rope_length is None, expected the tokens that each row's rotary frequencies were"
            " chosen for (the model scales them by length)"
        )
    if cache.origin is not None and cache.origin != fingerprint(model):
        raise ValueError(
            f"cache was made by another model (fingerprint {cache.origin[:12]}), expected one that"
            f" this model made ({fingerprint(model)[:12]})"
        )


def _told(layers: int, kv_heads: int, head_dim: int, dtype: Any) -> str:
    return f"{layers} layers of {kv_heads} KV heads of {head_dim} numbers in {dtype}"


class _Weights:
    """A model's arrays, equal to another's where they are the very same; it keeps none alive."""

    def __init__(self, model: Model):
        self.configs = repr(model.config)
        if (vision := getattr(model, "vision_config", None)) is not None:
            self.configs += repr(vision)
        leaves, _ = jax.tree_util.tree_flatten_with_path(model)
        self.paths = tuple(path for path, _ in leaves)
        self.leaves = tuple(weakref.ref(leaf) for _, leaf in leaves)
        self.ids = tuple(id(leaf) for _, leaf in leaves)

    def __hash__(self) -> int:
        return hash((self.configs, self.ids))

    def __eq__(self, other: object) -> bool:
        # An id may be another array's by now, so the arrays are asked too.
        return (
            isinstance(other, _Weights)
            and (self.configs, self.ids) == (other.configs, other.ids)
            and all(a() is b() is not None for a, b in zip(self.leaves, other.leaves, strict=True))
        )


@functools.lru_cache(maxsize=8)
def _digest(weights: _Weights) -> str:
    digest = hashlib.sha256(weights.configs.encode())
    for path, reference in zip(weights.paths, weights.leaves, strict=True):
        leaf: Any = reference()  # alive: its model is asked about
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(_sample(leaf).tobytes())
    return digest.hexdigest()


def _sample(leaf: jax.Array) -> np.ndarray:
    """Evenly spaced values; of a weight on an accelerator no more than these leave it."""
    places = np.arange(0, leaf.size, max(1, leaf.size // _SAMPLE))[:_SAMPLE]
    devices: Any = leaf.sharding.device_set
    on_host = all(device.platform == "cpu" for device in devices)
    if not leaf.ndim or (on_host and leaf.is_fully_addressable):
        return np.asarray(leaf).reshape(-1)[places]
    return _fetched(leaf, places)


def _fetched(leaf: jax.Array, places: np.ndarray) -> np.ndarray:
    whole = None
    if isinstance(leaf.sharding, NamedSharding):  # every host reads all of them
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    pick = jax.jit(_at, out_shardings=whole)
    return np.asarray(pick(leaf, np.unravel_index(places, leaf.shape)))


def _at(leaf: jax.Array, places: tuple[jax.Array, ...]) -> jax.Array:
    return leaf[places]
