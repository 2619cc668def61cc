"""How many slots a cache needs, before anything is known of a prompt but its bucket.

L layers, K KV heads. Everything here is static: what it returns becomes the shapes of a program.
"""

import math

from kvjax import budgets
from kvjax.config import CompressionConfig
from kvjax.kernels.platform import platform
from kvjax.rows import largest


def packs(config: CompressionConfig) -> bool:
    """Whether `config` keeps its entries in the packed layout.

    Where it does not say: packed on an accelerator, and for budgets that differ by head or layer;
    padded for uniform ones on a CPU, whose matrix products gain nothing from looking at all heads.
    """
    if config.layout is not None:
        return config.layout == "packed"
    if config.quantize is not None:
        return True
    uneven = config.heads == "ada" or config.layers != "uniform"
    return uneven or platform() != "cpu"


def pool_shape(
    config: CompressionConfig, tokens: int, windows: tuple[int | None, ...], kv_heads: int
) -> tuple[int, tuple[tuple[int, int], ...] | None]:
    """Slots of the pool for a bucket of `tokens`, and each layer's region where it is fixed."""
    layers, base = len(windows), min(largest(config, tokens).base, tokens)
    if config.profile is not None:
        total = min(_profile_reach(config, base, tokens, 0)[0], layers * tokens)
        return kv_heads * total, None
    if config.layers != "uniform" or any(window is not None for window in windows):
        return kv_heads * layers * base, None
    size = kv_heads * base
    return layers * size, tuple((index * size, (index + 1) * size) for index in range(layers))


def capacity(
    config: CompressionConfig,
    tokens: int,
    index: int,
    windows: tuple[int | None, ...],
    kv_heads: int,
) -> int:
    """Slots a head that layer `index` needs for any prompt of at most `tokens` tokens.

    The padded layout pays for what its longest head might get: exactly the budget for uniform
    sizes, more for the others.
    """
    size = _reach(config, tokens, index, windows)
    if config.heads in ("global", "joint"):
        size = kv_heads * size
    elif config.heads == "ada":
        alpha = round(config.floor * budgets.THOUSAND) / budgets.THOUSAND
        top = math.ceil((1 - alpha) * kv_heads * size + alpha * size) + 1
        size = min(top, config.head_cap or top)
    return _visible(size, tokens, windows[index])


def layer_capacity(
    config: CompressionConfig, tokens: int, index: int, windows: tuple[int | None, ...]
) -> int:
    """Entries a head, on average over its heads, that layer `index` may get of such a prompt."""
    return _visible(_reach(config, tokens, index, windows), tokens, windows[index])


def _visible(size: int, tokens: int, window: int | None) -> int:
    return min(size, tokens if window is None else max(window - 1, 1))


def _reach(
    config: CompressionConfig, tokens: int, index: int, windows: tuple[int | None, ...]
) -> int:
    rows, layers = largest(config, tokens), len(windows)
    base, held = rows.base, rows.sinks + rows.recent
    total, most, size = layers * base, base, base
    if config.profile is not None:
        total, most, size = _profile_reach(config, base, tokens, index)
        size = max(size, held)
    elif config.layers in ("prefix", "global", "joint"):
        size = total
    elif config.layers == "pyramid" and layers > 1:
        ramp, low = base - held, (base - held) // config.beta
        step = 2 * (ramp - low) / (layers - 1)
        most = 2 * base
        size = held + 1 + max(math.ceil(2 * ramp - low - index * step), ramp)
    cut = any(window is not None and window <= most for window in windows)
    if cut and len(set(windows)) + (config.layers != "uniform") > 1:
        size = total  # what other layers cannot hold may all come here
    return min(size, tokens)


def _profile_reach(
    config: CompressionConfig, base: int, tokens: int, index: int
) -> tuple[int, int, int]:
    """Most entries that a profile gives to all layers, to any one, and to layer `index`."""
    profile = config.profile or ()
    layers, shares = len(profile), sum(profile)
    if config.budget is None:
        total, scale, crowded = math.ceil(tokens * shares) + 1, float(tokens), False
    else:
        total, scale = layers * base, layers * base / shares
        # A layer that wants more than a short prompt has leaves the rest to the others.
        part = 1 if isinstance(config.budget, int) else config.fraction
        crowded = part * layers * max(profile) > shares
    size = profile[index] * scale
    if crowded:
        # No layer is raised by more than `base`, nor above one that the profile prefers to it.
        peers = sum(share >= profile[index] for share in profile)
        size = min(size + base, total / peers)
    return total, math.ceil(max(profile) * scale) + base, math.ceil(size) + 2


def held_slots(
    config: CompressionConfig, tokens: int, windows: tuple[int | None, ...], kv_heads: int
) -> int:
    """Slots of all layers' and heads' buffers for a bucket of `tokens`, empty ones included."""
    if config.skips(tokens):
        return tokens * len(windows) * kv_heads
    if packs(config):
        return pool_shape(config, tokens, windows, kv_heads)[0]
    return kv_heads * sum(
        capacity(config, tokens, index, windows, kv_heads) for index in range(len(windows))
    )


def slot_bytes(config: CompressionConfig, tokens: int, head_dim: int, itemsize: int) -> int:
    """Bytes of a slot's key and value for a bucket of `tokens`, with their scales in int8."""
    if config.quantize is None or config.skips(tokens):
        return 2 * head_dim * itemsize
    return 2 * (head_dim + 4)
