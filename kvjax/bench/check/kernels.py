"""Compare kernels with float64, and with XLA on the same device.

Each part draws problems with whatever a cache can hold: rows of other lengths, layers that begin
anywhere, owners in any order, NaN in empty slots. B batch, T tokens, W queries, N query heads,
K KV heads, H head dim, M slots.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.bench.check import oracle
from kvjax.bench.check.part import Failed, error, tolerance
from kvjax.kernels import decode_attention, prefill_attention, window_scores
from kvjax.kernels.platform import platform
from kvjax.kernels.shapes import TESTED, Shape

# What a platform's own kernels are called by the three wrappers.
ATTENTION = {"gpu": "triton", "tpu": "pallas", "cpu": "xla"}
SCORES = ATTENTION
PREFILL = {"gpu": "cudnn", "tpu": "splash", "cpu": "xla"}
# Heads of the small problems, N and K; two widths of head take turns.
HEADS, KV_HEADS, HEAD_DIMS = 8, 2, (64, 128)
PAGE = 128  # slots of a page, as on a TPU
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 100, "power": 2, "group": "max"},
    {"group": "mean"},
)
# (new tokens, what else): a decode step, a short question, one that is taken head by head.
POOLS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ()),
    (1, ("window", "evicted")),
    (5, ("evicted",)),
    (130, ("window", "evicted")),
    (130, ("run",)),
)


def run(function: Callable, *arrays: Any) -> Any:
    """What a compiled function gives."""
    return jax.jit(function)(*arrays)


def _precision(dtype: Any) -> Any:
    """Products of fp32 in fp32: by default a GPU takes TF32, and a TPU bf16."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


# ---------------------------------------------------------------------------- the pool
def pool_problem(rng: np.random.Generator, tokens: int, head_dim: int, slots: int, dtype: Any):
    """One layer of two rows in pages of a pool: arguments of `paged_attention` by name."""
    batch, slots = 2, -(-slots // PAGE) * PAGE
    pages = slots // PAGE
    table = np.stack([rng.permutation(pages)[: pages - 1] for _ in range(batch)])
    owners = rng.integers(-1, KV_HEADS, (batch, slots))
    positions = np.where(owners >= 0, rng.integers(0, 400, owners.shape), -1)
    entries: Any = rng.normal(size=(batch, slots, 2 * head_dim)).astype(np.float32)
    entries[owners < 0] = np.nan
    found = {
        "q": rng.normal(size=(batch, tokens, HEADS, head_dim)),
        "query_positions": 300 + rng.integers(0, 100, (batch, 1)) + np.arange(tokens),
        "owners": owners.astype(np.int8),
        "positions": positions,
        "table": table,
        "lengths": rng.integers(slots // 2, (pages - 1) * PAGE + 1, batch),
    }
    if dtype == jnp.int8:
        halves = np.nan_to_num(entries.reshape(batch, slots, 2, head_dim), nan=1.0)
        scales = np.abs(halves).max(-1) / 127
        entries = np.round(halves / scales[..., None]).reshape(entries.shape)
        found["scales"] = scales.transpose(0, 2, 1)
    return found | {"entries": entries}


def _evicted(rng: np.random.Generator, tokens: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    first = rng.integers(0, slots, (2, KV_HEADS))
    return first, first[:, None] + rng.integers(0, slots // 3, (2, tokens, KV_HEADS))


def pool(dtype: str, small: bool = False) -> dict[str, Any]:
    """`paged_attention` of entries in this dtype; queries of int8 entries are bf16."""
    slots = 300 if small else 3000
    wide = "bfloat16" if dtype == "int8" else dtype
    cases = {}
    for index, (tokens, options) in enumerate(POOLS):
        rng = np.random.default_rng(index)
        head_dim = HEAD_DIMS[index % 2]
        case = pool_problem(rng, tokens, head_dim, slots, jnp.dtype(dtype))
        static: dict[str, Any] = {"kv_heads": KV_HEADS, "page": PAGE}
        static["window"] = 150 if "window" in options else None
        case["evicted"] = _evicted(rng, tokens, slots) if "evicted" in options else None
        arrays = _arrays(case, wide, entries=dtype)
        if "run" in options:
            case["table"] = np.broadcast_to(np.arange(case["table"].shape[1]), case["table"].shape)
        run: dict[str, Any] = {}
        if "run" in options:
            run = {"consecutive": True, "run": (0, case["table"].shape[1] * PAGE)}
        call = partial(_by_name, decode_attention.paged_attention, **static, **run)
        name = ", ".join([f"{tokens} tokens", f"H {head_dim}", *options])
        cases[name] = call, arrays, partial(oracle.paged_attention, **static)
    return _compare(cases, ATTENTION, wide)


# ---------------------------------------------------------------------------- the prompt
def prompt_problem(rng: np.random.Generator, tokens: int, head_dim: int) -> dict[str, Any]:
    """Queries, keys and values of two rows, the second one shorter."""
    shape = (2, tokens, KV_HEADS, head_dim)
    return {
        "q": rng.normal(size=(2, tokens, HEADS, head_dim)),
        "k": rng.normal(size=shape),
        "v": rng.normal(size=shape),
        "lengths": np.array([tokens, tokens - 37]),
    }


def prefill(dtype: str, small: bool = False) -> dict[str, Any]:
    """`prefill_attention`, with and without a sliding window."""
    tokens = 128 if small else 640
    cases = {}
    for head_dim, window in zip(HEAD_DIMS, (None, 100), strict=True):
        case = prompt_problem(np.random.default_rng(head_dim), tokens, head_dim)
        call = partial(_by_name, _real_rows, window=window)
        expected = partial(_real_rows_of_oracle, window=window)
        name = f"H {head_dim}" + (f", window {window}" if window else "")
        cases[name] = call, _arrays(case, dtype), expected
    # cuDNN takes no fp32.
    return _compare(cases, PREFILL | {"gpu": "xla"} if dtype == "float32" else PREFILL, dtype)


def _real_rows(q, k, v, lengths, **settings):
    """What rows of padding hold has no meaning."""
    out, lse = prefill_attention.prefill_attention(q, k, v, lengths, **settings)
    real_BT = jnp.arange(q.shape[1]) < lengths[:, None]
    return jnp.where(real_BT[..., None, None], out, 0), jnp.where(real_BT[:, None], lse, 0)


def _real_rows_of_oracle(q, k, v, lengths, *, window):
    out, lse = oracle.prefill_attention(q, k, v, lengths, window=window)
    real_BT = np.arange(q.shape[1]) < lengths[:, None]
    return np.where(real_BT[..., None, None], out, 0), np.where(real_BT[:, None], lse, 0)


def scores(dtype: str, small: bool = False) -> dict[str, Any]:
    """`window_scores` and `accumulated_scores`: powers, groups, a sliding window."""
    tokens, queries = (128, 20) if small else (640, 32)
    cases = {}
    for index, settings in enumerate(SETTINGS):
        rng, head_dim = np.random.default_rng(index), HEAD_DIMS[index % 2]
        case = prompt_problem(rng, tokens, head_dim)
        del case["v"]
        at_BW = case["lengths"][:, None] - queries + np.arange(queries)
        last = {"q": case["q"][:, -queries:], "query_positions": at_BW}
        expected = partial(oracle.window_scores, **settings)
        call = partial(_by_name, window_scores.window_scores, **settings)
        told = ", ".join([f"H {head_dim}", *(f"{k} {v}" for k, v in settings.items())])
        cases[f"window, {told}"] = call, _arrays(case | last, dtype), expected
        arrays = _arrays(case, dtype)
        arrays["lse"] = jnp.asarray(_log_sums(arrays, settings.get("window")), jnp.float32)
        call = partial(_by_name, window_scores.accumulated_scores, **settings)
        expected = partial(_accumulated, **settings)
        cases[f"accumulated, {told}"] = call, arrays, expected
    return _compare(cases, SCORES, dtype)


def _log_sums(arrays: Mapping[str, Any], window: int | None) -> np.ndarray:
    q, k = (np.asarray(arrays[name], np.float64) for name in "qk")
    return oracle.prefill_attention(q, k, k, np.asarray(arrays["lengths"]), window=window)[1]


def _accumulated(q, k, lse, lengths, **settings):
    at_BT = np.broadcast_to(np.arange(q.shape[1]), q.shape[:2])
    at_BT = np.where(at_BT < lengths[:, None], at_BT, -1)
    return oracle.window_scores(q, at_BT, k, lengths, **settings)


# ---------------------------------------------------------------------------- at the size of a load
def loaded(small: bool = False) -> dict[str, Any]:
    """Kernels at the shapes of known models under load, in bf16, against XLA on this device."""
    shapes: tuple[Shape, ...] = TESTED
    if small:
        shapes = (TESTED[0]._replace(name="small", batch=2, tokens=256, budget=32),)
    cases: dict[str, Any] = {}
    for shape in shapes:
        cases[f"{shape.name}, a step"] = ATTENTION, *_loaded_pool(shape, 1)
        cases[f"{shape.name}, a question"] = ATTENTION, *_loaded_pool(shape, 128)
        cases[f"{shape.name}, scores"] = SCORES, *_loaded_scores(shape)
    most, worst = tolerance(jnp.bfloat16), dict[str, float]()
    for name, (kernels, call, arrays) in cases.items():
        mine = kernels[platform()]
        expected = run(partial(call, implementation="xla"), arrays)
        found = run(partial(call, implementation=mine), arrays)
        _note(worst, mine, name, found, expected, most)
    return _shown(worst, most, len(cases))


def _loaded_pool(shape: Shape, tokens: int):
    """Four layers, the second attended to; each head owns half as much as the one before."""
    keys = jax.random.split(jax.random.key(0), 2)
    rows = shape.batch if tokens == 1 else 1
    weights = 0.5 ** np.arange(shape.kv_heads)
    counts = np.floor(shape.slots * weights / weights.sum()).astype(int)
    owners = np.full(shape.slots, -1)
    owners[: counts.sum()] = np.repeat(np.arange(shape.kv_heads), counts)
    slots, head_dim, dtype = 4 * shape.slots, shape.head_dim, shape.dtype
    page = math.gcd(shape.slots, PAGE)
    arrays = {
        "q": jax.random.normal(keys[0], (rows, tokens, shape.heads, head_dim), dtype),
        "query_positions": jnp.broadcast_to(shape.tokens + jnp.arange(tokens), (rows, tokens)),
        "entries": jax.random.normal(keys[1], (rows, slots, 2 * head_dim), dtype),
        "owners": jnp.broadcast_to(jnp.asarray(np.tile(owners, 4), jnp.int8), (rows, slots)),
        "positions": jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32) // 4, (rows, slots)),
        "table": jnp.full((rows, 1), shape.slots // page, jnp.int32),
        "lengths": jnp.full((rows,), shape.slots, jnp.int32),
    }
    static: dict[str, Any] = {"kv_heads": shape.kv_heads, "page": page, "consecutive": True}
    return partial(_by_name, decode_attention.paged_attention, **static), arrays


def _loaded_scores(shape: Shape):
    keys, queries = jax.random.split(jax.random.key(1), 2), 32
    at_W = jnp.arange(shape.tokens - queries, shape.tokens, dtype=jnp.int32)
    q_shape = (1, queries, shape.heads, shape.head_dim)
    k_shape = (1, shape.tokens, shape.kv_heads, shape.head_dim)
    arrays = {
        "q": jax.random.normal(keys[0], q_shape, shape.dtype),
        "query_positions": at_W[None],
        "k": jax.random.normal(keys[1], k_shape, shape.dtype),
        "lengths": jnp.full((1,), shape.tokens, jnp.int32),
    }
    return partial(_by_name, window_scores.window_scores), arrays


# ---------------------------------------------------------------------------- comparing
def _by_name(function: Callable, arrays: Mapping[str, Any], **settings: Any) -> Any:
    return function(**arrays, **settings)


def _arrays(case: Mapping[str, Any], dtype: str, **others: str) -> dict[str, Any]:
    """On the device: floats in the dtype, all else as int32 but for owners."""

    def put(name, value):
        if value is None or isinstance(value, tuple):
            return value and tuple(jnp.asarray(x, jnp.int32) for x in value)
        if name == "scales":
            return jnp.asarray(value, jnp.float32)
        if name == "owners":
            return jnp.asarray(value, jnp.int8)
        whole = value.dtype.kind == "i" and name not in others
        return jnp.asarray(value, jnp.int32 if whole else others.get(name, dtype))

    return {name: put(name, value) for name, value in case.items()}


def _compare(cases: Mapping[str, Any], kernels: Mapping[str, str], dtype: str) -> dict[str, Any]:
    """The kernel and XLA's against float64, case by case; the worst error of each."""
    mine, most = kernels[platform()], tolerance(dtype)
    worst = {"xla": 0.0, mine: 0.0}
    with _precision(jnp.dtype(dtype)):
        for name, (call, arrays, expected) in cases.items():
            exact = expected(**jax.tree.map(_in_float64, arrays, is_leaf=lambda x: x is None))
            for implementation in worst:
                found = run(partial(call, implementation=implementation), arrays)
                _note(worst, implementation, name, found, exact, most)
    return _shown(worst, most, len(cases))


def _in_float64(x: Any) -> Any:
    whole = x is None or jnp.issubdtype(x.dtype, jnp.integer)
    return np.asarray(x, np.float64) if not whole else x if x is None else np.asarray(x)


def _note(worst: dict[str, float], implementation: str, name: str, found, expected, most: float):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    far = max(error(a, b) for a, b in pairs)
    worst[implementation] = max(worst.get(implementation, 0.0), far)
    if not far <= most:
        raise Failed(f"{implementation}, {name}: error {far:.1e}, expected at most {most:.1e}")


def _shown(worst: Mapping[str, float], most: float, cases: int) -> dict[str, Any]:
    told = ", ".join(f"{name} {far:.1e}" for name, far in worst.items())
    shown = f"{cases} cases, error {told} (bound {most:.1e})"
    return {"errors": dict(worst), "tolerance": most, "cases": cases, "shown": shown}
