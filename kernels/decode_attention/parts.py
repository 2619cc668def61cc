"""Many new tokens taken in parts, so that what a call needs on the way does not grow with them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def over_tokens(attend: Callable[..., Any], arrays: Any, most: int) -> Any:
    """`attend(*arrays)`, at most `most` tokens at a time, in as few parts as may be.

    Args:
      attend: from arrays to arrays, whose second axis is tokens; rows do not look at one another.
      arrays: the first one is there, others may be None.
      most: tokens of a part, at least 1.
    """
    tokens = arrays[0].shape[1]
    if tokens <= most:
        return attend(*arrays)
    part = -(-tokens // -(-tokens // most))

    def split(x: Array) -> Array:
        # What fills the last part up has position -1, as padding has.
        empty = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        widths = [(0, -tokens % part if axis == 1 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=empty)
        return x.reshape(x.shape[0], -1, part, *x.shape[2:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :tokens]

    found = lax.map(lambda some: attend(*some), jax.tree.map(split, arrays))
    return jax.tree.map(join, found)
