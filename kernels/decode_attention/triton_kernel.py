"""The Triton kernel of `gpu.py`; this file alone needs triton.

Rows (T new tokens x N query heads) are in X blocks of ROWS, a power of two of at least 16. A
program reads a share of the slots between one block's bounds; the shares are merged by their
log-sum-exps.
"""

import inspect

import triton
import triton.language as tl


def jit(function):
    """`triton.jit`, which has to see the function itself, under a type checker's wrapper too."""
    return triton.jit(inspect.unwrap(function))


@jit
def slot_attention_kernel(
    q_ptr,  # [B, R, H]
    rows_ptr,  # [B, R, 4]: KV head, position, first and one past the last evicted slot
    entries_ptr,  # [POOLS, M, 2H]
    scales_ptr,  # [POOLS, 2, M] if QUANTIZED
    owners_ptr,  # [POOLS, M]
    positions_ptr,  # [POOLS, M]
    first_ptr,  # [B, X]: bounds of the slots that a block of rows looks at
    end_ptr,  # [B, X]
    table_ptr,  # [B, PAGES] if PAGES
    o_ptr,  # [B, SPLITS, R, H]
    lse_ptr,  # [B, SPLITS, R]
    scores_ptr,  # [B, GROUP, PAGES * PAGE] if GROUP
    R: tl.constexpr,
    M: tl.constexpr,
    POOLS: tl.constexpr,  # B, or 1 for a pool that all rows share
    PAGES: tl.constexpr,  # 0 where slots are numbered as the pool's are, else through the table
    PAGE: tl.constexpr,  # slots of a page
    H: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,  # X
    WIDTH: tl.constexpr,  # H up to a power of two
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 for none
    EVICTS: tl.constexpr,
    QUANTIZED: tl.constexpr,  # entries are int8
    GROUP: tl.constexpr,  # query heads of a KV head, where slots' scores are asked for; else 0
):
    block = tl.program_id(0)
    batch = (block // BLOCKS).to(tl.int64)
    pool = batch if POOLS > 1 else batch * 0
    split = tl.program_id(1)
    start = tl.load(first_ptr + block)
    end = tl.load(end_ptr + block)
    share = tl.cdiv(tl.cdiv(end - start, SPLITS), TILE) * TILE
    low = start + split * share
    high = tl.minimum(low + share, end)

    row = (block % BLOCKS) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real = row < R
    inside = column < H
    q_mask = real[:, None] & inside[None, :]
    q = tl.load(q_ptr + (batch * R + row[:, None]) * H + column[None, :], mask=q_mask, other=0.0)
    about = rows_ptr + (batch * R + row) * 4
    owner = tl.load(about, mask=real, other=-2)
    position = tl.load(about + 1, mask=real, other=-1)
    if EVICTS:
        evicted_first = tl.load(about + 2, mask=real, other=0)
        evicted_last = tl.load(about + 3, mask=real, other=0)

    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(low, high, TILE):
        number = first + tl.arange(0, TILE)
        mine = number < high
        slot = number
        if PAGES > 0:
            page = tl.load(table_ptr + batch * PAGES + number // PAGE, mask=mine, other=0)
            slot = page * PAGE + number % PAGE
        slot_owner = tl.load(owners_ptr + pool * M + slot, mask=mine, other=-1).to(tl.int32)
        slot_position = tl.load(positions_ptr + pool * M + slot, mask=mine, other=0)
        # An empty slot is not read at all: what it holds cannot matter.
        held = mine & (slot_owner >= 0)
        base = entries_ptr + (pool * M + slot[:, None]) * (2 * H) + column[None, :]
        mask = held[:, None] & inside[None, :]
        k = tl.load(base, mask=mask, other=0).to(q.dtype)
        v = tl.load(base + H, mask=mask, other=0).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        distance = position[:, None] - slot_position[None, :]
        visible = held[None, :] & (owner[:, None] == slot_owner[None, :]) & (distance >= 0)
        if WINDOW > 0:
            visible = visible & (distance < WINDOW)
        if EVICTS:
            before = number[None, :] < evicted_first[:, None]
            visible = visible & (before | (number[None, :] >= evicted_last[:, None]))
        if QUANTIZED:
            of_keys = scales_ptr + 2 * pool * M + slot
            s = s * tl.load(of_keys, mask=held, other=0.0)[None, :]
        s = tl.where(visible, s, -1e30)
        if GROUP > 0:
            # The rows of a slot's owner write its scores, whatever they are, and no others.
            mine_too = held[None, :] & (owner[:, None] == slot_owner[None, :])
            line = (batch * GROUP + row % GROUP) * (PAGES * PAGE)
            tl.store(scores_ptr + line[:, None] + number[None, :], s, mask=mine_too)
        top = tl.maximum(peak, tl.max(s, 1))
        p = tl.where(visible, tl.exp(s - top[:, None]), 0.0)
        decay = tl.exp(peak - top)
        total = total * decay + tl.sum(p, 1)
        if QUANTIZED:
            p = p * tl.load(of_keys + M, mask=held, other=0.0)[None, :]
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        peak = top
    safe = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, peak + tl.log(safe), float("-inf"))
    place = (batch * SPLITS + split) * R + row
    tl.store(o_ptr + place[:, None] * H + column[None, :], acc / safe[:, None], mask=q_mask)
    tl.store(lse_ptr + place, lse, mask=real)
