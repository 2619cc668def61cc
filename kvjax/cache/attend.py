"""Attention of new tokens to what the cache holds of a layer: kept entries and tail.

Over a mesh, slots are split and everything else lies by KV head: a query is made known to all
devices, each attends with all query heads to its own slots, and what they found is sent to the
devices that have those heads, which merge it by log-sum-exp.

B batch, X rows of entries (B, or fewer where rows share them), T new tokens, N query heads, K KV
heads, H head dim, U slots of the tail, M slots of the pool, R pages of a layer.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax import sharding
from kvjax.cache.ratio import evicted_ranges
from kvjax.cache.slots import Slots, pages_of
from kvjax.cache.state import Cache
from kvjax.cache.tail import Tail
from kvjax.kernels.decode_attention import Evicted, merge, padded_attention, paged_attention
from kvjax.kernels.decode_attention.padded import over_tokens
from kvjax.sharding import HEADS, MODEL, QUERY_HEADS, REST

# Rows (new tokens x query heads, of a whole batch) that are attended at once. What they need on the
# way are several fp32 copies of their outputs, 16 MiB each at H = 128; and compilers keep more or
# fewer of them, as it pleases them.
MOST_ROWS = 2**15


def attend(
    q: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    cache: Cache,
    layer: int,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Attend new tokens to a layer's kept entries and to the tail, by true position.

    Args:
      q: queries after RoPE; their own keys are in the tail already.
      positions: their positions, -1 for padding (its output is zeros).
      cache: what is held; its slots are split as the mesh in use is, if there is one.
      layer: which.
      window: width of a sliding-window layer, or None.
    """
    most = max(1, MOST_ROWS // (q.shape[0] * q.shape[2]))
    return over_tokens(
        lambda q, positions: _attend(q, positions, cache, layer, window), (q, positions), most
    )


class _New(NamedTuple):
    """New tokens with the tail of their layer, and tokens of each row's prompt."""

    q: Float[Array, "B T N H"]
    positions: Int[Array, "B T"]
    keys: Float[Array, "B K U H"]
    values: Float[Array, "B K U H"]
    tail_positions: Int[Array, "B U"]
    prompt_lengths: Int[Array, " B"]

    @property
    def tail(self) -> Tail:
        """The layer's tail; nothing is written to it."""
        return Tail((self.keys,), (self.values,), self.tail_positions, jnp.zeros((), jnp.int32))


def _attend(q, positions, cache: Cache, layer: int, window: int | None):
    if cache.slots is not None:
        rules, axes, arrays = slot_problem(q, positions, cache, layer, window)
        body = partial(_attend_slots, **rules)
    else:
        body = partial(_attend_padded, window=window, keep_ratio=cache.keep_ratio)
        held = cache.layers[layer]
        rest = [held.keys, held.values, held.positions]
        axes, arrays = _problem(q, positions, cache, layer, "BKSH,BKSH,BKS", rest)
    return sharding.by_device(body, f"{axes}->BTNH", *arrays)


def slot_problem(q, positions, cache: Cache, layer: int, window: int | None):
    """What is static of attention to packed slots, the letters of its arrays, and these.

    For `slot_call`, on every device with its own parts.
    """
    slots = cache.slots
    assert slots is not None
    rules = {"window": window, "keep_ratio": cache.keep_ratio, "layout": _layout(slots, layer)}
    letters = "BR,B,B.,BME,BM,BM" + ",B2M" * (slots.scales is not None)
    rest = [pages_of(slots, layer), slots.lengths[:, layer], slots.counts[:, layer]]
    rest += [slots.entries, slots.owners, slots.positions]
    rest += [slots.scales] if slots.scales is not None else []
    return rules, *_problem(q, positions, cache, layer, letters, rest)


def _problem(q, positions, cache: Cache, layer: int, letters: str, held: list[Array]):
    """Letters and arrays of what new tokens bring and of what is held of a layer."""
    tail = cache.tail
    new = q, positions, tail.keys[layer], tail.values[layer], tail.positions, cache.prompt_lengths
    # What rows share lies on every device of the data axis.
    axes = [
        name if x.shape[0] == cache.batch else f".{name[1:]}"
        for name, x in zip(letters.split(","), held, strict=True)
    ]
    return f"BTNH,BT,BKUH,BKUH,BU,B,{','.join(axes)}", (*new, *held)


def _layout(slots: Slots, layer: int) -> dict:
    """What is static of a layer's place in the pool, as one device has it."""
    parts = sharding.parts()
    if slots.parts != parts:
        raise ValueError(f"the cache's slots are split into {slots.parts}, expected {parts} parts")
    run = None
    if slots.runs is not None:
        run = slots.runs[layer][0] // parts, slots.runs[layer][1] // parts
    return {"page": slots.page // parts, "consecutive": slots.table is None, "run": run}


def _attend_padded(*arrays, window, keep_ratio):
    """Heads do not look at one another's keys: no device needs another's."""
    new, (keys, values, held) = _New(*arrays[:6]), arrays[6:]
    rows = new.q.shape[0] // held.shape[0]
    of_prompt = of_tail = None
    if keep_ratio:
        kept_BK = jnp.repeat((held >= 0).sum(-1, dtype=jnp.int32), rows, axis=0)
        of_prompt, of_tail = _evicted(new, kept_BK, window, held.shape[-1])
        of_prompt = folded_evicted(of_prompt, rows)
    asked = folded(new.q, rows), folded(new.positions, rows)
    part = padded_attention(*asked, keys, values, held, window=window, evicted=of_prompt)
    return merge([unfolded(part, rows), attend_tail(new, window, of_tail)]).astype(new.q.dtype)


def _attend_slots(*arrays, window, keep_ratio, layout):
    """One device's slots for all query heads, and its own heads' tail."""
    new, call, of_tail = slot_call(*arrays, window=window, keep_ratio=keep_ratio, layout=layout)
    rows = new.q.shape[0] // call["table"].shape[0]
    parts = of_own_heads(*unfolded(paged_attention(**call), rows))
    return merge([*parts, attend_tail(new, window, of_tail)]).astype(new.q.dtype)


def of_own_heads(out, lse) -> list[tuple[Array, Array]]:
    """What was found for all query heads, as parts for those of this device."""
    return _to_heads(out, lse) if sharding.on_device() else [(out, lse)]


def slot_call(*arrays, window, keep_ratio, layout) -> tuple[_New, dict, Evicted | None]:
    """The new tokens, `paged_attention`'s arguments, and what is evicted of the tail."""
    new, (table_XR, length_X, counts_XK, entries, owners, held, *scales) = (
        _New(*arrays[:6]),
        arrays[6:],
    )
    on_mesh = sharding.on_device()
    rows = new.q.shape[0] // table_XR.shape[0]
    evicted = of_tail = None
    if keep_ratio:
        kept_BK = jnp.repeat(counts_XK, rows, axis=0)
        gone, of_tail = _evicted(new, kept_BK, window)
        gone = folded_evicted(gone, rows)
        # A head's slots follow one another: its evicted ones too.
        before_XK = jnp.cumsum(counts_XK, axis=-1) - counts_XK
        evicted = before_XK + gone.first, before_XK[:, None] + gone.last
    q = new.q
    if on_mesh:
        q, length_X = lax.all_gather(q, QUERY_HEADS, axis=2, tiled=True), _here(length_X)
        evicted = evicted and (_here(evicted[0]), _here(evicted[1]))
        of_tail = of_tail and _of_own_heads(of_tail, new.keys.shape[1])
    call = {
        "q": folded(q, rows),
        "query_positions": folded(new.positions, rows),
        "entries": entries,
        "owners": owners,
        "positions": held,
        "table": table_XR,
        "lengths": length_X,
        "kv_heads": counts_XK.shape[1],
        "window": window,
        "evicted": evicted,
        "scales": scales[0] if scales else None,
        **layout,
    }
    return new, call, of_tail


def _evicted(new: _New, kept: Int[Array, "B K"], window: int | None, slots: int = 0):
    return evicted_ranges(kept, new.prompt_lengths, new.positions, window, new.tail, slots)


def attend_tail(new: _New, window: int | None, evicted: Evicted | None):
    """Output and log-sum-exp of the tail, in fp32."""
    held = new.keys, new.values, new.tail_positions[:, None]
    return padded_attention(new.q, new.positions, *held, window=window, evicted=evicted)


# ---------------------------------------------------------------------------- over a mesh
def _here(slot: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """How many of this device's slots come before a slot of the whole pool."""
    return -((lax.axis_index(MODEL) - slot) // lax.axis_size(MODEL))


def _of_own_heads(evicted: Evicted, kv_heads: int) -> Evicted:
    """What is evicted of the tail, for this device's KV heads."""
    mine = partial(
        lax.dynamic_slice_in_dim,
        start_index=lax.axis_index(HEADS) * kv_heads,
        slice_size=kv_heads,
    )
    return evicted._replace(
        order=mine(evicted.order, axis=1),
        first=mine(evicted.first, axis=1),
        last=mine(evicted.last, axis=2),
    )


def _to_heads(out_BTNH, lse_BTN) -> list[tuple[Array, Array]]:
    """What every device found for this one's query heads, output and log-sum-exp in one message."""
    both = jnp.concatenate([out_BTNH, lse_BTN[..., None]], axis=-1)
    parts = lax.axis_size(QUERY_HEADS)
    both = both.reshape(*both.shape[:2], parts, -1, both.shape[-1])
    both = lax.all_to_all(both, QUERY_HEADS, split_axis=2, concat_axis=0)
    if lax.axis_size(REST) > 1:
        both = lax.all_gather(both, REST).reshape(-1, *both.shape[1:])
    return [(part[..., :-1], part[..., -1]) for part in both]


# ---------------------------------------------------------------------------- rows that share
def folded(x: Array, rows: int) -> Array:
    """`[B, T, ...]` of rows that share their entries, `rows` of them, as `[B / rows, rows T, ...]`.

    To attention they are one row with more new tokens: what they share is read once for all.
    """
    return x if rows == 1 else x.reshape(x.shape[0] // rows, -1, *x.shape[2:])


def folded_evicted(evicted: Evicted, rows: int) -> Evicted:
    """What rows that share their entries have evicted of them, as of `folded` rows."""
    return evicted._replace(first=evicted.first[::rows], last=folded(evicted.last, rows))


def unfolded(
    part: tuple[Float[Array, "X Y N H"], Float[Array, "X Y N"]], rows: int
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """What came of folded rows, row by row again."""
    if rows == 1:
        return part
    out, lse = (x.reshape(x.shape[0] * rows, -1, *x.shape[2:]) for x in part)
    return out, lse
