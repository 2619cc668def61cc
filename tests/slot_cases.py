"""Layers of slots for attention, and what a query finds there, in float64."""

import jax.numpy as jnp
import numpy as np

from kvjax.kernels.decode_attention import paged_attention, tpu

MANY = {"tokens": 7, "heads": 6, "kv_heads": 2, "head_dim": 64, "slots": 300}  # 21 rows a head


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_case(seed, *, batch=2, tokens=1, heads=6, kv_heads=2, head_dim=8, slots=40, owners="any"):
    """A pool whose layer lies at [start, end) of each row; NaN in every slot without an owner."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, slots // 3 + 1, batch)
    end = rng.integers(slots // 2, slots + 1, batch)
    drawn = rng.integers(0, kv_heads, (batch, slots))
    if owners == "runs":
        drawn = np.sort(drawn, axis=1)
    elif owners == "one head":
        drawn[:] = kv_heads - 1
    elif owners == "one slot":
        drawn[:] = 0
        drawn[np.arange(batch), end - 1] = kv_heads - 1
    elif owners == "empty layer":
        end = start.copy()
    owned = (np.arange(slots) >= start[:, None]) & (np.arange(slots) < end[:, None])
    # A slot outside the layer is another layer's, or empty.
    drawn = np.where(owned | (rng.random((batch, slots)) < 0.5), drawn, -1)
    if owners == "holes":
        drawn = np.where(rng.random((batch, slots)) < 0.4, -1, drawn)
    positions = np.where(drawn >= 0, rng.integers(0, 100, (batch, slots)), -1)
    entries = normal(seed + 1, batch, slots, 2 * head_dim)
    entries[drawn < 0] = np.nan
    query_positions = rng.integers(80, 120, (batch, tokens))
    return {
        "q": normal(seed + 2, batch, tokens, heads, head_dim),
        "query_positions": query_positions.astype(np.int32),
        "entries": entries,
        "owners": drawn.astype(np.int8),
        "positions": positions.astype(np.int32),
        "start": start.astype(np.int32),
        "end": end.astype(np.int32),
    }


def oracle(case, kv_heads, window=None, evicted=None):
    """One query, head and slot at a time, in float64."""
    q = case["q"].astype(np.float64)
    batch, tokens, heads, head_dim = q.shape
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, t, n in np.ndindex(batch, tokens, heads):
        owner, scores, values = n // (heads // kv_heads), [], []
        for m in range(case["start"][b], case["end"][b]):
            distance = case["query_positions"][b, t] - case["positions"][b, m]
            if case["owners"][b, m] != owner or distance < 0:
                continue
            if window is not None and distance >= window:
                continue
            if evicted is not None and evicted[0][b, owner] <= m < evicted[1][b, t, owner]:
                continue
            entry = case["entries"][b, m].astype(np.float64)
            scores.append(q[b, t, n] @ entry[:head_dim] / np.sqrt(head_dim))
            values.append(entry[head_dim:])
        if scores:
            weights = np.exp(np.array(scores) - max(scores))
            out[b, t, n] = weights @ np.array(values) / weights.sum()
            lse[b, t, n] = max(scores) + np.log(weights.sum())
    return out, lse


def make_dead(seed, case, kv_heads):
    """Evicted slots of each head, for each query, as (first, one past the last)."""
    rng = np.random.default_rng(seed)
    batch, tokens, slots = case["q"].shape[0], case["q"].shape[1], case["owners"].shape[1]
    first = rng.integers(0, slots, (batch, kv_heads)).astype(np.int32)
    more = rng.integers(0, slots // 3, (batch, tokens, kv_heads)).astype(np.int32)
    return first, first[:, None] + more


def quantized(case):
    """The case in int8, and the same entries as float32. Scales of unowned slots are NaN."""
    head_dim = case["q"].shape[-1]
    halves = case["entries"].reshape(*case["entries"].shape[:2], 2, head_dim)
    scales = np.abs(halves).max(-1) / 127
    whole = np.nan_to_num(np.round(halves / scales[..., None]), nan=99)
    exact = (whole * scales[..., None]).astype(np.float32).reshape(case["entries"].shape)
    entries = whole.reshape(case["entries"].shape).astype(np.int8)
    of_slots = scales.transpose(0, 2, 1).astype(np.float32)
    return case | {"entries": entries, "scales": of_slots}, case | {"entries": exact}


def ragged(seed, owners):
    """One row with seven tokens, the other with two and padding."""
    case = make_case(seed, owners=owners, **MANY)
    case["query_positions"][1, 2:] = -1
    return case


def paged(seed, case, page, *, shared=False):
    """The case's layer in pages anywhere in larger pools, or in one that both rows share.

    Pages that are not the layer's hold NaN and owners that would be seen.
    """
    rng = np.random.default_rng(seed)
    start, end = case["start"], case["end"]
    batch, lengths = len(start), end - start
    pages = -(-max(lengths.max(), 1) // page) + 1
    total = (batch * pages if shared else pages) + 3
    if shared:
        table = rng.permutation(total)[: batch * pages].reshape(batch, pages)
    else:
        table = np.stack([rng.permutation(total)[:pages] for _ in range(batch)])
    pools = 1 if shared else batch
    width = case["entries"].shape[2]
    found = {
        "entries": np.full((pools, total * page, width), np.nan, np.float32),
        "owners": rng.integers(0, 2, (pools, total * page)).astype(np.int8),
        "positions": np.zeros((pools, total * page), np.int32),
    }
    if "scales" in case:
        found["entries"] = np.zeros((pools, total * page, width), np.int8)
        found["scales"] = np.full((pools, 2, total * page), np.nan, np.float32)
    for row in range(batch):
        number = np.arange(lengths[row])
        at = table[row, number // page] * page + number % page
        pool, here = 0 if shared else row, slice(start[row], end[row])
        for name in ("entries", "owners", "positions"):
            found[name][pool, at] = case[name][row, here]
        if "scales" in case:
            found["scales"][pool][:, at] = case["scales"][row][:, here]
    return found | {
        "q": case["q"],
        "query_positions": case["query_positions"],
        "table": table.astype(np.int32),
        "lengths": lengths.astype(np.int32),
    }


def through_pages(case, evicted, page, implementation, **rules):
    """What a platform's kernel finds through the table."""
    call = {name: jnp.asarray(x) for name, x in case.items()}
    table, lengths = call.pop("table"), call.pop("lengths")
    run = {"kv_heads": 2, "evicted": evicted, **rules}
    if implementation == "pallas":
        more = {"tile": 128, "interpret": True, "pages": (table, page)}
        zero = jnp.zeros_like(lengths)
        return tpu.slot_attention(**call, start=zero, end=lengths, **run, **more)
    return paged_attention(**call, table=table, lengths=lengths, page=page, **run)
