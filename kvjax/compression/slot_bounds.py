"""How many entries an allocator can come to give, before anything is known of a prompt.

Everything here is static: what it returns becomes the shapes of a program (`capacity.py`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvjax.compression.row_budgets import Largest
from kvjax.exact import MILLION, THOUSAND
from kvjax.methods import Settings


class Bucket(NamedTuple):
    """What is known of a prompt before it is read, which is all that a bound may go by.

    Attributes:
      config: the settings.
      rows: the budget of the longest prompt.
      tokens: most tokens of a prompt.
      windows: each layer's sliding window, or None.
    """

    config: Settings
    rows: Largest
    tokens: int
    windows: tuple[int | None, ...]


class Bound(NamedTuple):
    """Most entries a head, on average over a layer's heads, of any prompt of a bucket.

    Attributes:
      layers: of each layer, where none of them is cut by its sliding window.
      widest: of any layer; a narrower sliding window cuts it, and others get what is left.
      total: of all layers together.
    """

    layers: Sequence[int]
    widest: int
    total: int


# ---------------------------------------------------------------------------- layers
def even_layers(bucket: Bucket) -> Bound:
    """All layers get the same."""
    base, layers = bucket.rows.base, len(bucket.windows)
    return Bound([base] * layers, base, layers * base)


def any_layer(bucket: Bucket) -> Bound:
    """Where scores decide, one layer may get everything."""
    base, layers = bucket.rows.base, len(bucket.windows)
    return Bound([layers * base] * layers, base, layers * base)


def pyramid(bucket: Bucket) -> Bound:
    """Sizes fall linearly; short prompts cannot fill the first layers, and the last get more."""
    rows, layers = bucket.rows, len(bucket.windows)
    if layers == 1:
        return even_layers(bucket)
    held = rows.sinks + rows.recent
    ramp, low = rows.base - held, (rows.base - held) // bucket.config.beta
    fallen = [2 * (ramp - low) * index // (layers - 1) for index in range(layers)]
    sizes = [held + 1 + max(2 * ramp - low - down, ramp) for down in fallen]
    return Bound(sizes, 2 * rows.base, layers * rows.base)


def profile(bucket: Bucket) -> Bound:
    """A share of the prompt or of the budget for each layer, and what others cannot hold."""
    config, base, tokens = bucket.config, bucket.rows.base, bucket.tokens
    shares = [round(share * MILLION) for share in config.profile or ()]
    layers, whole = len(shares), max(sum(shares), 1)
    if config.budget is None:
        scaled, among, total = tokens, MILLION, (tokens * sum(shares) + MILLION // 2) // MILLION
    else:
        scaled, among, total = layers * base, whole, layers * base
    sizes = [-(-share * scaled // among) for share in shares]
    if config.budget is not None:
        # A layer that wants more than a short prompt has leaves the rest to the others. None of
        # them is raised by more than `base`, nor above one that the profile prefers to it.
        part = MILLION if isinstance(config.budget, int) else round(config.budget * MILLION)
        if part * layers * max(shares) > whole * MILLION:
            peers = [sum(share >= mine for share in shares) for mine in shares]
            most = [-(-layers * base // among) for among in peers]
            sizes = [min(size + base, top) for size, top in zip(sizes, most, strict=True)]
    return Bound([size + 2 for size in sizes], -(-max(shares) * scaled // among) + base, total)


# ---------------------------------------------------------------------------- heads
def ada(config: Settings, size: int, kv_heads: int) -> int:
    """One head may get everything but the others' floor."""
    alpha = round(config.floor * THOUSAND) / THOUSAND
    top = math.ceil((1 - alpha) * kv_heads * size + alpha * size) + 1
    return min(top, config.head_cap or top)


def even_heads(config: Settings, size: int, kv_heads: int) -> int:
    """All heads get the same."""
    return size
