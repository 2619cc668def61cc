"""How many slots a cache needs, before anything is known of a prompt but its bucket.

L layers, K KV heads. Everything here is static: what it returns becomes the shapes of a program.
"""

import math

from kvjax import exact
from kvjax.compression.row_budgets import largest
from kvjax.config import CompressionConfig, ConfigError
from kvjax.exact import MOST
from kvjax.kernels.platform import platform


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
    """Slots of the pool for a bucket of `tokens`, and each layer's region where it is fixed.

    No layer is given slots for more than it can see when the prompt ends.

    Raises:
      ConfigError: more slots than an index can count.
    """
    base = largest(config, tokens).base
    shares = [_visible(base, tokens, window) for window in windows]
    # A layer that cannot hold its share leaves it to the others, which depends on the prompt.
    fixed = config.layers == "uniform" and len(set(shares)) == 1
    if not fixed:
        room = sum(_visible(tokens, tokens, window) for window in windows)
        shares = [min(_total(config, tokens, windows), room)]
    slots = _checked(config, kv_heads * sum(shares), tokens)
    if not fixed:
        return slots, None
    size = kv_heads * shares[0]
    return slots, tuple((index * size, (index + 1) * size) for index in range(len(windows)))


def _total(config: CompressionConfig, tokens: int, windows: tuple[int | None, ...]) -> int:
    """Most entries a head, of all layers, of a prompt of at most `tokens` tokens."""
    rows = largest(config, tokens)
    if config.profile is None or config.budget is not None:
        return len(windows) * rows.base
    shares = sum(_millionths(config))
    asked = (tokens * shares + exact.MILLION // 2) // exact.MILLION
    # Whatever the profile says, a layer keeps what is protected.
    held = rows.sinks + rows.recent
    return max(asked, sum(_visible(held, tokens, window) for window in windows))


def _millionths(config: CompressionConfig) -> list[int]:
    return [round(share * exact.MILLION) for share in config.profile or ()]


def _checked(config: CompressionConfig, slots: int, tokens: int) -> int:
    if slots > MOST:
        raise ConfigError(
            f"budget={config.budget!r} comes to {slots} slots for a prompt of {tokens} tokens,"
            f" expected at most {MOST}"
        )
    return slots


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
        _checked(config, kv_heads * _total(config, tokens, windows), tokens)
        size = kv_heads * size
    elif config.heads == "ada":
        alpha = round(config.floor * exact.THOUSAND) / exact.THOUSAND
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
    total, most, size = _total(config, tokens, windows), base, base
    if config.profile is not None:
        most, size = _profile_reach(config, base, tokens, index)
        size = max(size, held)
    elif config.layers in ("prefix", "global", "joint"):
        size = total
    elif config.layers == "pyramid" and layers > 1:
        ramp, low = base - held, (base - held) // config.beta
        most = 2 * base
        fallen = 2 * (ramp - low) * index // (layers - 1)
        size = held + 1 + max(2 * ramp - low - fallen, ramp)
    cut = any(window is not None and window <= most for window in windows)
    if cut and len(set(windows)) + (config.layers != "uniform") > 1:
        size = total  # what other layers cannot hold may all come here
    return min(size, tokens)


def _profile_reach(
    config: CompressionConfig, base: int, tokens: int, index: int
) -> tuple[int, int]:
    """Most entries that a profile gives to any layer, and to layer `index`."""
    shares = _millionths(config)
    layers, whole = len(shares), max(sum(shares), 1)
    if config.budget is None:
        scaled, among = tokens, exact.MILLION
    else:
        scaled, among = layers * base, whole
    size = -(-shares[index] * scaled // among)
    if config.budget is not None:
        # A layer that wants more than a short prompt has leaves the rest to the others. None of
        # them is raised by more than `base`, nor above one that the profile prefers to it.
        part = exact.MILLION
        if not isinstance(config.budget, int):
            part = round(config.fraction * exact.MILLION)
        if part * layers * max(shares) > whole * exact.MILLION:
            peers = sum(share >= shares[index] for share in shares)
            size = min(size + base, -(-layers * base // peers))
    return -(-max(shares) * scaled // among) + base, size + 2


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


def most_kept(
    config: CompressionConfig,
    tokens: int,
    length: int,
    windows: tuple[int | None, ...],
    kv_heads: int,
) -> int:
    """Entries that are kept of a prompt of `length` tokens in a bucket of `tokens`, at most.

    Of all layers and heads; exact but for profiles whose sinks a sliding window has left behind.
    """
    if config.skips(tokens):
        return length * len(windows) * kv_heads
    return pool_shape(config, length, windows, kv_heads)[0]


def slot_bytes(config: CompressionConfig, tokens: int, head_dim: int, itemsize: int) -> int:
    """Bytes of a slot's key and value for a bucket of `tokens`, with their scales in int8."""
    if config.quantize is None or config.skips(tokens):
        return 2 * head_dim * itemsize
    return 2 * (head_dim + 4)
