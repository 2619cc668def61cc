"""How many slots a cache needs, before anything is known of a prompt but its bucket.

L layers, K KV heads. Everything here is static: what it returns becomes the shapes of a program.
"""

from kvjax.cache.slots import in_pages, page_size
from kvjax.compression.allocators import LAYERS, head_allocator, layer_allocator
from kvjax.compression.row_budgets import largest, visible
from kvjax.compression.slot_bounds import Bound, Bucket
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
    if config.quantize is not None or config.sums:
        return True
    even = LAYERS[config.layers].even and head_allocator(config).even
    return not even or platform() != "cpu"


def check_prompt(config: CompressionConfig, tokens: int):
    """Raise ConfigError where an explicit window leaves a prompt nothing to select."""
    if config.window is None or not config.uses_window or config.skips(tokens):
        return
    base = largest(config, tokens).base
    if base < tokens and config.window >= base:
        raise ConfigError(
            f"window={config.window}, expected less than the budget of {base}"
            f" (of {tokens} prompt tokens)"
        )


def pool_shape(
    config: CompressionConfig, tokens: int, windows: tuple[int | None, ...], kv_heads: int
) -> tuple[int, tuple[tuple[int, int], ...] | None]:
    """Slots of the pool for a bucket of `tokens`, and each layer's region where it is fixed.

    No layer is given slots for more than it can see when the prompt ends.

    Raises:
      ConfigError: more slots than an index can count.
    """
    base = largest(config, tokens).base
    shares = [visible(base, tokens, window) for window in windows]
    # A layer that cannot hold its share leaves it to the others, which depends on the prompt.
    fixed = layer_allocator(config).even and len(set(shares)) == 1
    if not fixed:
        room = sum(visible(tokens, tokens, window) for window in windows)
        shares = [min(_bound(config, tokens, windows).total, room)]
    slots = _checked(config, kv_heads * sum(shares), tokens)
    if not fixed:
        return slots, None
    size = kv_heads * shares[0]
    return slots, tuple((index * size, (index + 1) * size) for index in range(len(windows)))


def _bound(config: CompressionConfig, tokens: int, windows: tuple[int | None, ...]) -> Bound:
    """The layer allocator's bound, never below what is always kept."""
    rows = largest(config, tokens)
    bound = layer_allocator(config).bound(Bucket(config, rows, tokens, windows))
    held = rows.sinks + rows.recent
    total = max(bound.total, sum(visible(held, tokens, window) for window in windows))
    sizes = [max(size, held) for size in bound.layers]
    cut = any(window is not None and window <= bound.widest for window in windows)
    if cut and (len(set(windows)) > 1 or not layer_allocator(config).even):
        sizes = [total] * len(windows)  # what other layers cannot hold may all come here
    return Bound([min(size, tokens) for size in sizes], bound.widest, total)


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
    bound = _bound(config, tokens, windows)
    if layer_allocator(config).by_head:
        _checked(config, kv_heads * bound.total, tokens)
        size = kv_heads * bound.layers[index]
    else:
        size = head_allocator(config).bound(config, bound.layers[index], kv_heads)
    rows = largest(config, tokens)
    return visible(max(size, rows.sinks + rows.recent), tokens, windows[index])


def layer_capacity(
    config: CompressionConfig, tokens: int, index: int, windows: tuple[int | None, ...]
) -> int:
    """Entries a head, on average over its heads, that layer `index` may get of such a prompt."""
    return visible(_bound(config, tokens, windows).layers[index], tokens, windows[index])


def held_slots(
    config: CompressionConfig,
    tokens: int,
    windows: tuple[int | None, ...],
    kv_heads: int,
    *,
    parts: int = 1,
) -> int:
    """Slots of all layers' and heads' buffers for a bucket of `tokens`, empty ones included.

    Of the packed layout these are whole pages, split into `parts`.
    """
    if config.skips(tokens):
        return tokens * len(windows) * kv_heads
    if packs(config):
        shape = pool_shape(config, tokens, windows, kv_heads)
        return in_pages(*shape, len(windows), page_size(parts))[0]
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
    if not config.quantizes or config.skips(tokens):
        return 2 * head_dim * itemsize
    return 2 * (head_dim + 4)
