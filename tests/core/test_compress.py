"""compress(): what every named method keeps, for ragged batches and sliding windows.

Padding is NaN throughout, so that a padded key that is scored, ranked or gathered shows.
"""

import dataclasses
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.compression.scorers
from kvjax import METHODS, CompressionConfig, Probe
from kvjax.cache.padded import PaddedLayer, pack
from kvjax.cache.slots import first_page
from kvjax.compression import allocators
from kvjax.compression.compress import Packing, choose, compress, probe_request
from kvjax.compression.row_budgets import Rows, eligible, make_rows, protected

N, K, H = 4, 2, 3
TOKENS, LENGTHS = 32, (32, 20, 9, 3, 1)
WINDOWS = {
    "none": (None, None, None),
    "uniform": (10, 10, 10),
    "mixed": (7, None, 15),
}
named = partial(CompressionConfig.named, layout="padded")
subject = import_module("kvjax.compression.compress")

# Every config is another program. To share what was compiled, its parts are jitted here and the
# rest runs op by op; `test_jit_gives_the_same` compiles the whole, the users' way.
PARTS = [(allocators, name, ()) for name in ("select_top", "spread", "uniform_layers")]
PARTS += [(allocators, "prefix_layers", ()), (allocators, "pyramid_layers", ("beta",))]
PARTS += [(allocators, "ada_heads", ("floor",)), (allocators, "global_heads", ())]
PARTS += [(allocators, "joint_heads", ("floor",))]
PARTS += [(kvjax.compression.scorers, "window_scores", ("window", "power", "group"))]
PARTS += [(kvjax.compression.scorers, "over_group", ("kv_heads", "how"))]
PARTS += [(kvjax.compression.scorers, "smooth", ("how", "kernel")), (subject, "pack", ("slots",))]
PARTS += [(subject, "put_layer", ("layer", "room"))]
PARTS += [(subject, name, ("tokens", "window")) for name in ("eligible", "protected")]
JITTED = [
    (module, name, jax.jit(getattr(module, name), static_argnames=static))
    for module, name, static in PARTS
]


@pytest.fixture(autouse=True, scope="module")
def jitted_parts():
    with pytest.MonkeyPatch.context() as patch:
        for part in JITTED:
            patch.setattr(*part)
        yield


# ---------------------------------------------------------------------------- prompts
def row(seed: int, n: int, tokens: int) -> SimpleNamespace:
    """A random prompt of n tokens in one layer, NaN behind; the same in any bucket."""
    rng = np.random.default_rng(seed)
    padding = ((0, tokens - n), (0, 0), (0, 0))
    drawn = {
        "keys": rng.normal(size=(n, K, H)),
        "values": rng.normal(size=(n, K, H)),
        "column_sums": rng.gamma(0.5, size=(n, N, 1)),
        "output_norms": rng.gamma(0.5, size=(n, K, 1)),
        "reconstruction": rng.random(size=(n, K, 1)),
    }
    arrays = {name: np.pad(x, padding, constant_values=np.nan) for name, x in drawn.items()}
    root = rng.normal(size=(N, H, H))
    future = {"future_mean": rng.normal(size=(N, H)), "future_cov": root @ root.swapaxes(1, 2)}
    return SimpleNamespace(**arrays, **future, queries=rng.normal(size=(n, N, H)))


def prompts(config: CompressionConfig, lengths, tokens: int, layers: int, first: int = 0):
    """Keys, values and probes of every layer: what `compress` takes."""
    asked = probe_request(config, tokens)
    keys, values, probes = [], [], []
    for layer in range(layers):
        rows = [row(100 * layer + first + i, n, tokens) for i, n in enumerate(lengths)]
        keys.append(stack(x.keys for x in rows))
        values.append(stack(x.values for x in rows))
        last = [np.maximum(np.arange(n - asked.queries, n), 0) for n in lengths]
        queries = stack(x.queries[at] for x, at in zip(rows, last, strict=True))
        probe = Probe(queries=queries if asked.queries else None)
        per_entry = {
            "column_sums": asked.column_sums,
            "output_norms": asked.output_norms,
            "reconstruction": asked.repeat,
        }
        for name in [name for name, wanted in per_entry.items() if wanted]:
            probe = probe.replace(**{name: stack(getattr(x, name)[..., 0].T for x in rows)})
        for name in ("future_mean", "future_cov") if asked.future else ():
            probe = probe.replace(**{name: stack(getattr(x, name) for x in rows)})
        probes.append(probe)
    return keys, values, probes


def stack(arrays) -> jax.Array:
    return jnp.asarray(np.stack(list(arrays)), jnp.float32)


def compressed(config, lengths=LENGTHS, tokens=TOKENS, windows=WINDOWS["none"], first=0):
    arrays = prompts(config, lengths, tokens, len(windows), first)
    rest = {"lengths": jnp.asarray(lengths, jnp.int32), "windows": windows}
    return arrays, compress(*arrays, config, **rest)


def kept(layer: PaddedLayer, batch_row: int) -> list[list[int]]:
    """Positions that each head keeps, in slot order."""
    positions = np.asarray(layer.positions[batch_row])
    return [head[head >= 0].tolist() for head in positions]


def everything_kept(cache, batch_row: int) -> list[list[list[int]]]:
    return [kept(layer, batch_row) for layer in cache.layers]


def seen(n: int, window: int | None) -> range:
    """Positions that the next token of a prompt of n tokens still sees."""
    return range(n) if window is None else range(max(0, n - window + 1), n)


# ---------------------------------------------------------------------------- every method
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("budget", [12, 0.4], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept(method, budget, windows):
    config, pools = named(method, budget), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "_pack", partial(packed_beside, subject._pack, pools))
        (keys, values, _), cache = compressed(config, windows=windows)
    if method != "full":
        assert_stored(pools[-1], cache)
        of_slot = pools[-1].nbytes // pools[-1].size  # what pages waste apart
        assert pools[-1].room * of_slot <= cache.nbytes
    rows = make_rows(config, jnp.asarray(LENGTHS))
    for i, n in enumerate(LENGTHS):
        base, sinks, recent = (int(x[i]) for x in (rows.base, rows.sinks, rows.recent))
        total = 0
        for layer, window in enumerate(windows):
            heads, can = kept(cache.layers[layer], i), seen(n, window)
            if method == "full":
                can = range(n)
            held = {*range(sinks), *range(n - recent, n)} & {*can}
            for head in heads:
                assert head == sorted(set(head))
                assert held <= set(head) <= set(can)
            total += sum(map(len, heads))
            if METHODS[method].heads == "shared":
                assert heads[0] == heads[1]
            if METHODS[method].heads in ("uniform", "shared"):
                assert len(heads[0]) == len(heads[1])
            if METHODS[method].layers == "uniform" and windows == WINDOWS["none"]:
                assert sum(map(len, heads)) == K * (n if method == "full" else base)
        if method == "full":
            assert total == len(windows) * K * n
        else:
            assert total == K * min(len(windows) * base, sum(len(seen(n, w)) for w in windows))
    for layer, one in enumerate(cache.layers):
        check_gathered(one, keys[layer], values[layer], whole=method == "full")


def packed_beside(pack_layer, pools: list, kept, index, layer, size, plan):
    """`_pack`, of the same choice in the packed layout too: `pools` has it after each layer."""
    beside = Packing(slots=pools[-1] if pools and index else None)
    packed = plan.replace(config=dataclasses.replace(plan.config, layout="packed"))
    pools.append(pack_layer(beside, index, layer, size, packed).slots)
    return pack_layer(kept, index, layer, size, plan)


def assert_stored(pool, padded):
    """The pool holds what `counts` says of each layer and head, and that is what was chosen."""
    owners, places, counts = map(np.asarray, (pool.owners, pool.positions, pool.counts))
    of_layers = counts.sum(-1)
    firsts = [np.asarray(first_page(pool, layer)) for layer in range(counts.shape[1])]
    starts = np.stack(firsts, axis=1) * pool.page
    for i, layer, head in np.ndindex(counts.shape):
        run = slice(starts[i, layer], starts[i, layer] + of_layers[i, layer])
        stored = places[i, run][owners[i, run] == head].tolist()
        assert len(stored) == counts[i, layer, head]
        assert stored == kept(padded.layers[layer], i)[head]
    assert (owners >= 0).sum() == counts.sum()


def check_gathered(layer: PaddedLayer, keys, values, whole: bool):
    """Survivors lie in front and are the originals bit for bit; empty slots hold zeros."""
    positions = np.asarray(layer.positions)
    filled = positions >= 0
    assert (positions[~filled] == -1).all()
    slots = np.arange(positions.shape[-1])
    np.testing.assert_array_equal(filled, slots < filled.sum(-1, keepdims=True))
    at = np.maximum(positions, 0)[..., None]
    for ours, original in ((layer.keys, keys), (layer.values, values)):
        originals = np.take_along_axis(np.asarray(original).swapaxes(1, 2), at, axis=2)
        np.testing.assert_array_equal(np.asarray(ours)[filled], originals[filled])
        if not whole:  # `full` leaves the padding as it came, behind the mask
            assert (np.asarray(ours)[~filled] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_in_a_larger_bucket_keeps_the_same(method):
    """Slow: every method is compiled for four shapes, its own batch and three rows alone."""
    config, windows = named(method, budget=9), WINDOWS["mixed"]
    _, batch = compressed(config, windows=windows)
    for i, n in enumerate(LENGTHS):
        _, alone = compressed(config, (n,), 40, windows, first=i)
        assert everything_kept(alone, 0) == everything_kept(batch, i)


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(method):
    config, windows = named(method, budget=7), WINDOWS["mixed"]
    arrays, with_nan = compressed(config, windows=windows)
    clean = jax.tree.map(lambda x: jnp.nan_to_num(x, nan=1e3), arrays)
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    without = compress(*clean, config, lengths=lengths, windows=windows)
    for one, other in zip(with_nan.layers, without.layers, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        filled = np.asarray(one.positions) >= 0
        np.testing.assert_array_equal(one.keys[filled], other.keys[filled])
        assert np.isfinite(one.values[filled]).all()


def test_prefixkv_keeps_the_first_and_the_last_token():
    _, cache = compressed(named("prefixkv", budget=6))
    for i, n in enumerate(LENGTHS):
        for heads in everything_kept(cache, i):
            assert all({0, n - 1} <= set(head) for head in heads)
    assert cache.keep_ratio


def test_h2o_keeps_the_last_half_and_the_heaviest():
    config = named("h2o", budget=6)
    (_, _, probes), cache = compressed(config)
    sums = np.asarray(probes[0].column_sums[0]).reshape(K, -1, TOKENS).mean(1)
    for head, mass in zip(kept(cache.layers[0], 0), sums, strict=True):
        heavy = np.argsort(-mass[: TOKENS - 3])[:3]
        assert head == sorted([*heavy, TOKENS - 3, TOKENS - 2, TOKENS - 1])


def test_streaming_llm_keeps_four_sinks_and_the_recent():
    _, cache = compressed(named("streaming-llm", budget=10))
    expected = {32: [*range(4), *range(26, 32)], 20: [*range(4), *range(14, 20)], 9: [*range(9)]}
    for i, n in enumerate(LENGTHS):
        assert everything_kept(cache, i) == [[expected.get(n, [*range(n)])] * K] * 3


def test_snapkv_keeps_the_window_and_the_best_of_the_pooled_scores():
    """Against attention written out in numpy."""
    config = named("snapkv", budget=10, window=3, kernel=3)
    (keys, _, probes), cache = compressed(config, (TOKENS,) * 5)
    late = np.arange(TOKENS) > (TOKENS - 3 + np.arange(3))[:, None]
    for layer, i, head in np.ndindex(3, 5, K):
        group = np.asarray(probes[layer].queries[i])[:, head * N // K : (head + 1) * N // K]
        logits = np.einsum("wgh,th->gwt", group, keys[layer][i, :, head]) / np.sqrt(H)
        p = np.exp(np.where(late, -np.inf, logits))
        p /= p.sum(-1, keepdims=True)
        raw = np.pad(p.sum((0, 1))[: TOKENS - 3], 1)
        pooled = np.maximum(np.maximum(raw[:-2], raw[1:-1]), raw[2:])
        top = np.argsort(-pooled, kind="stable")[:7]
        assert kept(cache.layers[layer], i)[head] == sorted([*top, 29, 30, 31])


def test_budget_of_the_bucket_leaves_the_cache_alone():
    (keys, values, _), cache = compressed(named("ada-snapkv", budget=TOKENS))
    for layer, k, v in zip(cache.layers, keys, values, strict=True):
        np.testing.assert_array_equal(layer.keys, k.swapaxes(1, 2))
        np.testing.assert_array_equal(layer.values, v.swapaxes(1, 2))
    assert everything_kept(cache, 1) == [[[*range(20)]] * K] * 3


@pytest.mark.parametrize("method", ["ada-pyramid", "prefixkv"])
def test_jit_gives_the_same(method):
    config, windows = named(method, budget=0.3), (7, None)
    arrays, eager = compressed(config, windows=windows)
    call = jax.jit(compress, static_argnames=("config", "windows", "tail_slots"))
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    cache = call(*arrays, config=config, lengths=lengths, windows=windows, tail_slots=5)
    for one, other in zip(cache.layers, eager.layers, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.keys, other.keys)
    assert cache.tail.positions.shape == (len(LENGTHS), 5)
    np.testing.assert_array_equal(cache.next_positions, LENGTHS)


# ---------------------------------------------------------------------------- rows
def example_rows(**changes) -> Rows:
    numbers = {"lengths": 6, "base": 4, "window": 1, "sinks": 1, "recent": 2} | changes
    return Rows(**{name: jnp.asarray([value]) for name, value in numbers.items()})


@pytest.mark.parametrize(
    ("window", "can", "held"),
    [
        (None, [0, 1, 2, 3, 4, 5], [0, 4, 5]),
        (6, [1, 2, 3, 4, 5], [4, 5]),  # position 6 sees 1..6
        (2, [5], [5]),
        (1, [], []),
    ],
)
def test_eligible_and_protected(window, can, held):
    rows = example_rows()
    assert np.flatnonzero(eligible(rows, 8, window)[0]).tolist() == can
    assert np.flatnonzero(protected(rows, 8, window)[0]).tolist() == held


def test_choose_by_hand():
    scores = jnp.asarray([[[9.0, 5, 1, 3, 0, 0, 8, 8], [9.0, 1, 2, 4, 0, 0, 8, 8]]])
    pick = partial(choose, scores, jnp.asarray([4]), example_rows(), window=None)
    by_head = pick(config=named("h2o", 4))
    assert [np.flatnonzero(head).tolist() for head in by_head[0]] == [[0, 1, 4, 5], [0, 3, 4, 5]]
    shared = pick(config=named("streaming-llm", 4))
    assert [np.flatnonzero(head).tolist() for head in shared[0]] == [[0, 3, 4, 5]]
    ada = choose(scores, jnp.asarray([4]), example_rows(), named("ada-snapkv", 4, floor=0.0), None)
    assert [np.flatnonzero(head).tolist() for head in ada[0]] == [[0, 1, 4, 5], [0, 3, 4, 5]]
    lopsided = scores.at[0, 0].multiply(10)
    ada = choose(
        lopsided, jnp.asarray([4]), example_rows(), named("ada-snapkv", 4, floor=0.0), None
    )
    assert [np.flatnonzero(head).tolist() for head in ada[0]] == [[0, 1, 3, 4, 5], [0, 4, 5]]


def test_pack_by_hand():
    values = jnp.arange(2 * 4 * 2 * 1, dtype=jnp.bfloat16).reshape(2, 4, 2, 1)
    keep = jnp.asarray([[[1, 0, 1, 0], [0, 0, 0, 1]], [[0, 0, 0, 0], [1, 1, 1, 0]]], bool)
    layer = pack(-values, values, keep, slots=3)
    expected = [[[0, 2, -1], [3, -1, -1]], [[-1, -1, -1], [0, 1, 2]]]
    assert layer.positions.tolist() == expected
    assert layer.lengths.tolist() == [[2, 1], [0, 3]]
    assert layer.values[..., 0].tolist() == [[[0, 4, 0], [7, 0, 0]], [[0, 0, 0], [9, 11, 13]]]
    assert layer.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer.keys, -layer.values)


# ---------------------------------------------------------------------------- refusals
def test_a_profile_of_another_model_is_refused():
    config = named("prefixkv", profile=(0.5, 0.5))
    with pytest.raises(ValueError, match="profile has 2 layers, expected the model's 3"):
        compressed(config)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("snapkv", "probe 0 has 0 queries, expected the last 4"),
        ("h2o", "probe 0 has column_sums=None, expected it for 'h2o'"),
        ("critical-ada-snapkv", "probe 0 has output_norms=None, expected it for 'critical-ada-"),
        ("ada-kvzip", "probe 0 has reconstruction=None, expected it for 'ada-kvzip'"),
        ("expected-attention", "probe 0 has future_mean=None, expected it for 'expected-att"),
    ],
)
def test_a_probe_without_what_the_scorer_reads_is_refused(method, message):
    keys = [jnp.zeros((1, TOKENS, K, H))]
    probe = Probe(queries=jnp.zeros((1, 4, N, H)) if method.startswith("critical") else None)
    with pytest.raises(ValueError, match=message):
        compress(keys, keys, [probe], named(method, budget=8))
