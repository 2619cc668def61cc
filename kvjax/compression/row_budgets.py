"""What a budget comes to for each row of a batch, and which entries are open to eviction.

Everything here depends on a row's own length alone, never on the bucket or the batch, so that a
row is compressed alike alone and in company.
"""

from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from kvjax.exact import MILLION, floor_of_product
from kvjax.methods import Settings


@no_type_check  # jax maps trees to other leaves than arrays
class Rows(struct.PyTreeNode):
    """Budgets resolved row by row, all `[B]` int32.

    Attributes:
      lengths: tokens of the prompt.
      base: entries per head, on average over heads and layers, always-kept ones included.
      window: last positions that are observed (and, by most methods, always kept).
      sinks, recent: first and last positions always kept; sinks + recent <= base.
    """

    lengths: Int[Array, " B"]
    base: Int[Array, " B"]
    window: Int[Array, " B"]
    sinks: Int[Array, " B"]
    recent: Int[Array, " B"]


def fraction(config: Settings) -> float:
    """The budget as a fraction of the prompt; a profile's own where no budget is given."""
    if config.budget is None:
        return sum(config.profile) / len(config.profile) if config.profile else 1.0
    return float(config.budget)


def make_rows(
    config: Settings, lengths: Int[Array, " B"], budgets: Int[Array, " B"] | None = None
) -> Rows:
    """Resolve `config` for prompts of these lengths.

    Args:
      config: the settings.
      lengths: tokens of each prompt.
      budgets: entries per head, on average, that each row keeps at most, where `config` keeps more.

    A fraction (in millionths) of a prompt is rounded down, and is at least 2 entries. Nothing
    exceeds the prompt. A window of None becomes min(32, base // 2), or the scorer's own in place
    of 32; an explicit one that a short prompt cannot afford is cut to base - 1.
    """
    lengths = lengths.astype(jnp.int32)
    if isinstance(config.budget, int):
        base = jnp.minimum(min(config.budget, jnp.iinfo(jnp.int32).max), lengths)
    else:
        part = floor_of_product(lengths, round(fraction(config) * MILLION), MILLION)
        base = jnp.minimum(lengths, jnp.maximum(part, 2))
    if budgets is not None:
        base = jnp.minimum(base, budgets)
    if config.window is None:
        window = jnp.minimum(config.default_window, base // 2)
    else:
        window = jnp.minimum(config.window, base - 1)
    if config.recent == "window":
        recent = window
    elif config.recent == "half":
        recent = base // 2
    else:
        recent = jnp.minimum(config.recent, base)
    sinks = jnp.minimum(config.sinks, base - recent)
    return Rows(lengths=lengths, base=base, window=window, sinks=sinks, recent=recent)


class Largest(NamedTuple):
    """`Rows` of one prompt, as Python integers."""

    base: int
    window: int
    sinks: int
    recent: int


def largest(config: Settings, tokens: int) -> Largest:
    """`make_rows` for a prompt of `tokens` tokens.

    Base and window grow with the length, so they bound every prompt of at most `tokens` tokens.
    """
    with jax.ensure_compile_time_eval():
        rows = make_rows(config, jnp.array([tokens]))
        return Largest(*(int(getattr(rows, name)[0]) for name in Largest._fields))


def eligible(rows: Rows, tokens: int, window: int | None) -> Bool[Array, "B T"]:
    """Entries that a layer can still see when the prompt ends, padding excluded."""
    positions_T = jnp.arange(tokens)
    real_BT = positions_T < rows.lengths[:, None]
    if window is None:
        return real_BT
    return real_BT & (positions_T > (rows.lengths - window)[:, None])


def protected(rows: Rows, tokens: int, window: int | None) -> Bool[Array, "B T"]:
    """Entries that are always kept: sinks and recent ones, where the layer can see them."""
    positions_T = jnp.arange(tokens)
    first_BT = positions_T < rows.sinks[:, None]
    last_BT = positions_T >= (rows.lengths - rows.recent)[:, None]
    return eligible(rows, tokens, window) & (first_BT | last_BT)


def visible(size: int, tokens: int, window: int | None) -> int:
    """Of `size` entries, as many as a layer can see when a prompt of `tokens` tokens ends."""
    return min(size, tokens if window is None else max(window - 1, 1))
