"""Compute what kernels compute once more, in NumPy and float64.

B batch, T new or prompt tokens, W queries, M slots, N query heads, K KV heads, H head dim.
Arguments are those of the kernels' public functions; scores of all pairs exist at once, so sizes
are small.
"""

from typing import Any

import numpy as np

Found = tuple[np.ndarray, np.ndarray]


def paged_attention(
    q, query_positions, entries, owners, positions, table, lengths, *, page, kv_heads, window=None,
    evicted=None, scales=None,
) -> Found:  # fmt: skip
    """Output `[B, T, N, H]` and log-sum-exp `[B, T, N]`; see `kernels.decode_attention`."""
    heads, head_dim = q.shape[2:]
    owner_N = np.arange(heads) // (heads // kv_heads)
    place_BM = (np.asarray(table)[..., None] * page + np.arange(page)).reshape(len(table), -1)
    owners, positions = (np.take_along_axis(x, place_BM, axis=1) for x in (owners, positions))
    entries = np.take_along_axis(entries, place_BM[..., None], axis=1)
    if scales is not None:
        scales = np.take_along_axis(scales, place_BM[:, None], axis=2)
    slot_M = np.arange(owners.shape[1])
    inside_BM = slot_M < np.asarray(lengths)[:, None]
    mine_BNM = inside_BM[:, None] & (owners[:, None] == owner_N[:, None])
    seen_BTNM = mine_BNM[:, None] & _near(query_positions, positions, window)[:, :, None]
    if evicted is not None:
        first_BN, last_BTN = evicted[0][:, owner_N], evicted[1][:, :, owner_N]
        gone_BTNM = (slot_M >= first_BN[:, None, :, None]) & (slot_M < last_BTN[..., None])
        seen_BTNM &= ~gone_BTNM
    entries = np.where((owners >= 0)[..., None], entries, 0).astype(np.float64)
    k_BMH, v_BMH = entries[..., :head_dim], entries[..., head_dim:]
    if scales is not None:
        k_BMH, v_BMH = (x * scales[:, i, :, None] for i, x in enumerate((k_BMH, v_BMH)))
    s_BTNM = np.einsum("btnh,bmh->btnm", q.astype(np.float64), k_BMH) * head_dim**-0.5
    return _softmax(s_BTNM, seen_BTNM, v_BMH, "btnm,bmh->btnh")


def prefill_attention(q, k, v, lengths, *, window=None) -> Found:
    """Output `[B, T, N, H]` and log-sum-exp `[B, N, T]`; zeros and -inf where nothing is seen."""
    tokens = q.shape[1]
    at_BT = np.broadcast_to(np.arange(tokens), q.shape[:2])
    s_BNWT, seen_BNWT = _scores(q, at_BT, k, lengths, window)
    v_BTNH = np.repeat(v.astype(np.float64), q.shape[2] // v.shape[2], axis=2)
    return _softmax(s_BNWT, seen_BNWT, v_BTNH, "bnwt,btnh->bwnh")


def window_scores(
    q, query_positions, k, lengths, *, window=None, power=1, group=None
) -> np.ndarray:
    """Column sums `[B, N or K, T]`; see `kernels.window_scores`."""
    s_BNWT, seen_BNWT = _scores(q, query_positions, k, lengths, window)
    peak_BNW1 = np.where(seen_BNWT, s_BNWT, -1e30).max(-1, keepdims=True)
    p_BNWT = np.where(seen_BNWT, np.exp(np.minimum(s_BNWT - peak_BNW1, 0)), 0.0)
    total_BNW1 = p_BNWT.sum(-1, keepdims=True)
    p_BNWT = (p_BNWT / np.where(total_BNW1 > 0, total_BNW1, 1)) ** power
    sums_BNT = p_BNWT.sum(2)
    if group is None:
        return sums_BNT
    sums_BKGT = sums_BNT.reshape(len(q), k.shape[2], -1, k.shape[1])
    return sums_BKGT.max(2) if group == "max" else sums_BKGT.mean(2)


def _near(query_positions, key_positions, window) -> np.ndarray:
    """`[B, queries, keys]`: at or before the query, and in its window."""
    distance = query_positions[:, :, None] - key_positions[:, None]
    return (distance >= 0) & (distance < (window or np.inf))


def _scores(q, query_positions, k, lengths, window) -> tuple[np.ndarray, np.ndarray]:
    """Scaled scores `[B, N, W, T]` of a prompt's keys, and which count."""
    tokens, heads, head_dim = k.shape[1], q.shape[2], q.shape[3]
    key_BT = np.broadcast_to(np.arange(tokens), (len(k), tokens))
    seen_BWT = _near(query_positions, key_BT, window) & (key_BT < lengths[:, None])[:, None]
    k_BTNH = np.repeat(k.astype(np.float64), heads // k.shape[2], axis=2)
    s_BNWT = np.einsum("bwnh,btnh->bnwt", q.astype(np.float64), k_BTNH) * head_dim**-0.5
    return s_BNWT, np.broadcast_to(seen_BWT[:, None], s_BNWT.shape)


def _softmax(scores: Any, visible: Any, values: Any, product: str) -> Found:
    """Weighted values and log-sum-exp over the last axis of the visible scores."""
    any_visible = visible.any(-1)
    peak = np.where(any_visible, np.where(visible, scores, -np.inf).max(-1), 0.0)
    exponents = np.where(visible, scores, 0.0) - peak[..., None] * visible
    weights = np.where(visible, np.exp(exponents), 0.0)
    total = weights.sum(-1)
    weights /= np.where(total > 0, total, 1.0)[..., None]
    with np.errstate(divide="ignore"):
        return np.einsum(product, weights, values), peak + np.log(total)
