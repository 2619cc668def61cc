"""Squared attention probabilities that a cache's entries receive, added up while it is used.

KV-Compress (Rehg 2024, arXiv 2410.00161) evicts by them: every new query, of an answer or of a
question, adds the squares of its probabilities, summed over the query heads of a group, to each
entry that it sees, slots and tail; a new entry begins with 0.

    slots.sums           what slots have received, while nothing is added
    tail.slot_sums       the same while something is: written at every step, as the tail is
    tail.sums            what the tail's entries have received

so that the slots stay a constant of the decode loop. Only where `begin` was called is anything
added, or another program traced.

B batch, X pools (B, or one that all rows share), T new tokens, N query heads, K KV heads, H head
dim, U slots of the tail, M slots.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax import sharding
from kvjax.cache import attend
from kvjax.cache.state import Cache
from kvjax.kernels.decode_attention import paged_attention
from kvjax.kernels.decode_attention.reference import in_sight, merge, merge_weights
from kvjax.kernels.decode_attention.squares import add_scored, add_slots, add_tail
from kvjax.sharding import GROUP, QUERY_HEADS


def begin(cache: Cache) -> Cache:
    """The cache, to whose entries attention adds from now on.

    Each row has entries of its own, in slots with sums. Entries of the tail without sums have 0.
    """
    tail, slots = cache.tail, cache.slots
    assert slots is not None
    assert slots.sums is not None  # who lets users ask for this has checked it
    sums = tail.sums or tuple(jnp.zeros(keys.shape[:3], jnp.float32) for keys in tail.keys)
    sums = tuple(sharding.constrain(x, "BKU") for x in sums)
    slot_sums = sharding.constrain(slots.sums, "BM")
    tail = tail.replace(sums=sums, slot_sums=slot_sums)
    return cache.replace(slots=slots.replace(sums=None), tail=tail)


def settle(cache: Cache) -> Cache:
    """The cache with its slots' sums beside their entries; nothing is added any more."""
    tail, slots = cache.tail, cache.slots
    if tail.slot_sums is None:
        return cache
    assert slots is not None  # `begin` has seen to it
    slots = slots.replace(sums=tail.slot_sums)
    return cache.replace(slots=slots, tail=tail.replace(slot_sums=None))


def attend_and_add(
    q: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    cache: Cache,
    layer: int,
    window: int | None,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """As `kvjax.cache.attend.attend`, of a cache that has begun to add; it comes back with more.

    Many tokens are taken in parts, one after the other.
    """
    tail = cache.tail
    add = partial(_add, cache=cache, layer=layer, window=window)
    found = tail.slot_sums, tail.sums[layer]
    batch, tokens, heads, _ = q.shape
    part = min(tokens, max(1, attend.MOST_ROWS // (batch * heads)))
    if part == tokens:
        out, slot_sums, tail_sums = add(q, positions, *found)
    else:
        # What fills the last part up has position -1, as padding has.
        more = -tokens % part
        q = jnp.pad(q, ((0, 0), (0, more), (0, 0), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, more)), constant_values=-1)
        parts = tuple(
            x.reshape(batch, -1, part, *x.shape[2:]).swapaxes(0, 1) for x in (q, positions)
        )

        def step(sums, some):
            out, *more = add(*some, *sums)
            return tuple(more), out

        (slot_sums, tail_sums), outs = lax.scan(step, found, parts)
        out = outs.swapaxes(0, 1).reshape(batch, -1, *q.shape[2:])[:, :tokens]
    sums = (*tail.sums[:layer], tail_sums, *tail.sums[layer + 1 :])
    return out, cache.replace(tail=tail.replace(slot_sums=slot_sums, sums=sums))


def _add(q, positions, slot_sums, tail_sums, *, cache: Cache, layer: int, window: int | None):
    """Output of some new tokens, and both sums with what they gave."""
    rules, axes, arrays = attend.slot_problem(q, positions, cache, layer, window)
    pools = "BM" if slot_sums.shape[0] == q.shape[0] else ".M"  # one that rows share lies by slot
    equation = f"{axes},{pools},BKU->BTNH,{pools},BKU"
    return sharding.by_device(partial(_add_here, rules), equation, *arrays, slot_sums, tail_sums)


def _add_here(rules, *arrays):
    """One device's slots for all query heads, and its own heads' tail."""
    *arrays, slot_sums, tail_sums = arrays
    new, call, of_tail = attend.slot_call(*arrays, **rules)
    layer = {name: call[name] for name in ("owners", "table", "lengths", "page")}
    scored = new.q.shape[1] == 1 and not call["consecutive"]
    out, lse, *scores = paged_attention(**call, scores=scored)
    parts = attend.of_own_heads(out, lse)
    parts.append(attend.attend_tail(new, rules["window"], of_tail))
    out = merge(parts).astype(new.q.dtype)
    _, lse_BTN = merge_weights(jnp.stack([lse for _, lse in parts]))
    of_all = lse_BTN
    if sharding.on_device():
        of_all = lax.all_gather(lse_BTN, QUERY_HEADS, axis=2, tiled=True)
    if scored:
        slot_sums = add_scored(slot_sums, scores[0], of_all, **layer)
    else:
        more = {name: x for name, x in call.items() if name != "run"}
        slot_sums = add_slots(slot_sums, of_all, **more)
    visible = _in_tail(new, rules, of_tail)
    more = add_tail(jnp.zeros_like(tail_sums), lse_BTN, new.q, new.keys, visible)
    if sharding.on_device():  # a group's query heads may lie on several devices
        more = lax.psum(more, GROUP)
    return out, slot_sums, tail_sums + more


def _in_tail(new, rules, of_tail):
    """`[B, #K, T, U]` entries of the tail that each new token sees."""
    held_B11U = new.tail_positions[:, None, None]
    seen = in_sight(held_B11U, new.positions[:, None, :, None], rules["window"])
    seen &= held_B11U >= 0
    return seen if of_tail is None else seen & ~of_tail.mask()
