"""A tile of a layer's entries on a TPU, fetched page by page through its table.

The table lies in scalar memory. Two tiles have room: while one is multiplied, the pages of the next
are copied beside it.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Bytes of the table in scalar memory, which has a megabyte on the chips that kvjax is for.
MOST_TABLE = 2**18


def supports(dtype: jnp.dtype, table_shape: tuple[int, ...], page: int) -> bool:
    """Whether pages of this size and a table of this shape can be fetched."""
    rows = 32 // jnp.dtype(dtype).itemsize  # of a tile in memory: 8 of fp32, 32 of int8
    return page % rows == 0 and 2048 % page == 0 and math.prod(table_shape) * 4 <= MOST_TABLE


class Tiles:
    """Where tiles come from and go to, inside of a kernel.

    Args:
      table: `[B * R]` in scalar memory.
      entries: `[X, M, E]` in the chip's large memory.
      buffer: `[2, tile, E]` scratch, and `arrived`, a semaphore for each half.
      row: of the batch, with `width` pages in the table.
      page: slots of a page.
    """

    def __init__(self, table, entries, buffer, arrived, *, row, width: int, page: int):
        self.table, self.entries, self.buffer, self.arrived = table, entries, buffer, arrived
        self.pool = row if entries.shape[0] > 1 else 0
        self.row, self.width, self.page = row, width, page

    def start(self, half, first, end):
        """Begin to fetch the tile from slot `first` on, as far as `end`."""
        self._each(half, first, end, lambda copy: copy.start())

    def wait(self, half, first, end):
        """Wait until it is there."""
        self._each(half, first, end, lambda copy: copy.wait())

    def _each(self, half, first, end, act):
        tile = self.buffer.shape[1]
        pages = pl.cdiv(jnp.minimum(end - first, tile), self.page)

        def one(index, _):
            page = self.table[self.row * self.width + first // self.page + index]
            source = pl.multiple_of(page * self.page, self.page)
            target = pl.multiple_of(index * self.page, self.page)
            act(
                pltpu.make_async_copy(
                    self.entries.at[self.pool, pl.ds(source, self.page)],
                    self.buffer.at[half, pl.ds(target, self.page)],
                    self.arrived.at[half],
                )
            )
            return _

        lax.fori_loop(0, pages, one, 0)
