"""Compute in 32 bits or fewer, even where JAX_ENABLE_X64=1 makes 64 JAX's default.

Counts, positions and sums are written for int32 and fp32, in Python's numbers too (`x * 2`), whose
width follows that flag. So the flag is off while anything of kvjax is traced or run, and the
programs are the same ones with it and without.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax


def in_32_bits() -> AbstractContextManager:
    """Inside, JAX's default integers and floats have 32 bits."""
    return jax.enable_x64(False)


def always_32_bits[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function, `in_32_bits` as long as it runs; also where a caller's program is traced."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with in_32_bits():
            return function(*args, **kwargs)

    return inside
