"""Time compiled functions, and measure how fast this machine's memory is."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Arrays that no cache holds: bytes that bandwidth is measured with.
_LARGE = {"cpu": 2**28, "gpu": 2**32, "tpu": 2**31}


class Timing(NamedTuple):
    """Seconds of several runs."""

    median: float
    least: float
    runs: int


def timed(function: Callable, *arrays: Any, repeats: int = 5, per: int = 1) -> tuple[Timing, Any]:
    """Time a function that is compiled beforehand and run once to warm up; its result comes too.

    Args:
      function: of arrays, jittable.
      arrays: its arguments.
      repeats: timed runs, >= 1.
      per: steps that the function does; the seconds are those of one.
    """
    compiled = jax.jit(function).lower(*arrays).compile()
    out = jax.block_until_ready(compiled(*arrays))
    seconds = []
    for _ in range(repeats):
        out = None  # two results at once may not fit
        began = time.perf_counter()
        out = jax.block_until_ready(compiled(*arrays))
        seconds.append((time.perf_counter() - began) / per)
    return Timing(float(np.median(seconds)), min(seconds), repeats), out


def bandwidth(repeats: int = 5) -> dict[str, float]:
    """Bytes a second: of a copy (bytes read and written), and of reading for a product."""
    size = _LARGE.get(jax.default_backend(), 2**28)
    x = jnp.ones((size // 4096, 1024), jnp.float32)
    copy, _ = timed(lambda x: x + 1, x, repeats=repeats)
    read, _ = timed(lambda x: x @ jnp.ones((1024,), jnp.float32), x, repeats=repeats)
    return {"copy": 2 * x.nbytes / copy.least, "read": x.nbytes / read.least}


def peak_bytes() -> int | None:
    """Most memory that the device has had in use, where it counts that."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
