"""How many requests fit: bytes of a tail, of a page, and of a whole request.

Nothing is asked of a device: all of it follows from shapes.
"""

from kvjax.serve.menu import Menu

# Beside an entry of the pool: its owner and its position, in int8 two scales, and what it has
# received where that is added up.
_BESIDE, _SCALES, _SUM = 5, 8, 4


def tail_bytes(menu: Menu, itemsize: int) -> int:
    """Bytes of one row's tail and remembered queries, for keys and values of so many bytes."""
    shape, rule = menu.shape, menu.recompress
    heads = 2 * menu.tail_slots * shape.num_kv_heads
    if rule is not None:
        heads += rule.queries * shape.num_heads
    sums = menu.sums * _SUM * menu.tail_slots * shape.num_kv_heads
    return shape.num_layers * (heads * shape.head_dim * itemsize + sums)


def page_bytes(menu: Menu, itemsize: int) -> int:
    """Bytes of a page, for keys and values of so many bytes before they are quantized."""
    entry = 2 * menu.shape.head_dim * (1 if menu.quantize else itemsize)
    return menu.page * (entry + _BESIDE + _SCALES * menu.quantize + _SUM * menu.sums)


def pages_within(cache_bytes: int, menu: Menu, rows: int, itemsize: int) -> int:
    """Pages that fit beside the tails of so many rows.

    Raises:
      ValueError: fewer than one a layer.
    """
    tails, page = rows * tail_bytes(menu, itemsize), page_bytes(menu, itemsize)
    pages, layers = (cache_bytes - tails) // page, menu.shape.num_layers
    if pages < layers:
        raise ValueError(
            f"cache_bytes={cache_bytes}, expected at least {tails + layers * page} for {rows} rows'"
            " tails and a page of each layer"
        )
    return pages


def request_bytes(
    menu: Menu, length: int, new_tokens: int, itemsize: int, method: str | None = None
) -> int:
    """Bytes that a request can come to hold: its pages as they are promised, and a tail.

    Args:
      menu: with a bucket for the prompt.
      length: tokens of the prompt.
      new_tokens: of the answer.
      itemsize: bytes of a number of a key or value.
      method: one of the menu's; the first by default.
    """
    entries = menu.choose(method, length, None).entries
    pages = menu.pages(entries, menu.growth(new_tokens))
    return pages * page_bytes(menu, itemsize) + tail_bytes(menu, itemsize)
