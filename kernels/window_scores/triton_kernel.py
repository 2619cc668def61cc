"""The Triton kernels of `gpu.py`; this file alone needs triton."""

import inspect

import triton
import triton.language as tl


def jit(function):
    """`triton.jit`, which has to see the function itself, under a type checker's wrapper too."""
    return triton.jit(inspect.unwrap(function))


@jit
def _scores(q, k, row_position, key, length, SCALE: tl.constexpr, WINDOW: tl.constexpr):
    """Scores of rows against keys, and which of them count."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    distance = row_position[:, None] - key[None, :]
    seen = (distance >= 0) & (key < length)[None, :]
    if WINDOW > 0:
        seen = seen & (distance < WINDOW)
    return s, seen


@jit
def log_sums_kernel(
    q_ptr,  # [B, W, N, H]
    position_ptr,  # [B, W]
    k_ptr,  # [B, T, K, H]
    length_ptr,  # [B]
    lse_ptr,  # [B, N, SPLITS, W]
    W: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,  # G * W up to a power of two
    WIDTH: tl.constexpr,  # H up to a power of two
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Log-sum-exp of every query over one share of the keys."""
    G: tl.constexpr = N // K
    batch = (tl.program_id(0) // K).to(tl.int64)
    head = tl.program_id(0) % K
    split = tl.program_id(1)
    length = tl.load(length_ptr + batch)
    share = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    low = split * share
    high = tl.minimum(low + share, length)

    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    real = row < G * W
    inside = column < H
    query = row % W
    q_head = head * G + row // W
    place = ((batch * W + query) * N + q_head)[:, None] * H + column[None, :]
    q = tl.load(q_ptr + place, mask=real[:, None] & inside[None, :], other=0.0)
    position = tl.load(position_ptr + batch * W + query, mask=real, other=-1)

    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(low, high, TILE):
        key = first + tl.arange(0, TILE)
        k_place = ((batch * T + key[:, None]) * K + head) * H + column[None, :]
        k = tl.load(k_ptr + k_place, mask=(key < high)[:, None] & inside[None, :], other=0.0)
        s, seen = _scores(q, k, position, key, high, SCALE, WINDOW)
        s = tl.where(seen, s, -1e30)
        top = tl.maximum(peak, tl.max(s, 1))
        total = total * tl.exp(peak - top) + tl.sum(
            tl.where(seen, tl.exp(s - top[:, None]), 0.0), 1
        )
        peak = top
    lse = tl.where(total > 0, peak + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + ((batch * N + q_head) * SPLITS + split) * W + query, lse, mask=real)


@jit
def columns_kernel(
    q_ptr,  # [B, W, N, H]
    position_ptr,  # [B, W]
    k_ptr,  # [B, T, K, H]
    length_ptr,  # [B]
    lse_ptr,  # [B, N, W]
    sums_ptr,  # [B, N, T], or [B, K, T] with a GROUP
    W: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    POWER: tl.constexpr,
    GROUP: tl.constexpr,  # of the query heads of a KV head: 0 each, 1 their mean, 2 their max
    CAUSAL: tl.constexpr,  # queries are the tokens 0 .. W - 1: blocks before the keys are skipped
):
    """Sums over all queries of (softmax ** POWER) for one KV head and one tile of its keys."""
    G: tl.constexpr = N // K
    batch = (tl.program_id(0) // K).to(tl.int64)
    head = tl.program_id(0) % K
    length = tl.load(length_ptr + batch)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WIDTH)
    inside = column < H
    k_place = ((batch * T + key[:, None]) * K + head) * H + column[None, :]
    k = tl.load(k_ptr + k_place, mask=(key < length)[:, None] & inside[None, :], other=0.0)

    begin = 0
    if CAUSAL:
        begin = tl.program_id(1) * TILE // ROWS * ROWS
    reduced = tl.zeros([TILE], tl.float32)
    for member in range(0, G):
        q_head = head * G + member
        sums = tl.zeros([TILE], tl.float32)
        for first in range(begin, W, ROWS):
            query = first + tl.arange(0, ROWS)
            real = query < W
            place = ((batch * W + query) * N + q_head)[:, None] * H + column[None, :]
            q = tl.load(q_ptr + place, mask=real[:, None] & inside[None, :], other=0.0)
            position = tl.load(position_ptr + batch * W + query, mask=real, other=-1)
            lse = tl.load(lse_ptr + (batch * N + q_head) * W + query, mask=real, other=0.0)
            s, seen = _scores(q, k, position, key, length, SCALE, WINDOW)
            p = tl.where(seen, tl.exp(s - lse[:, None]), 0.0)
            if POWER == 2:
                p = p * p
            sums += tl.sum(p, 0)
        if GROUP == 0:
            tl.store(sums_ptr + (batch * N + q_head) * T + key, sums, mask=key < T)
        elif GROUP == 1:
            reduced += sums / G
        else:
            reduced = tl.maximum(reduced, sums)
    if GROUP > 0:
        tl.store(sums_ptr + (batch * K + head) * T + key, reduced, mask=key < T)
