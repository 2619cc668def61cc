"""Sizes that depend on lengths alone: budgets resolved by row, and slots that hold any of them."""

import dataclasses
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import probe_of

from kvjax import METHODS, CompressionConfig, ConfigError
from kvjax.cache.padded import PaddedLayer
from kvjax.cache.slots import in_pages
from kvjax.compression import allocators
from kvjax.compression.capacity import (
    capacity,
    check_prompt,
    held_slots,
    layer_capacity,
    pool_shape,
)
from kvjax.compression.compress import compress, make_plan
from kvjax.compression.row_budgets import largest, make_rows, protected

named = partial(CompressionConfig.named, layout="padded")
subject = import_module("kvjax.compression.compress")

# Every config is another program; the parts that they share are compiled once.
PARTS = [(allocators, name, ()) for name in ("select_top", "spread", "uniform_layers")]
PARTS += [(allocators, name, ()) for name in ("prefix_layers", "profile_layers")]
PARTS += [(allocators, "pyramid_layers", ("beta",)), (allocators, "ada_heads", ("floor",))]
JITTED = [
    (module, name, jax.jit(getattr(module, name), static_argnames=static))
    for module, name, static in PARTS
]


@pytest.mark.parametrize(
    ("config", "n", "expected"),  # base, window, sinks, recent
    [
        (named("snapkv", 100), 1000, (100, 32, 0, 32)),
        (named("snapkv", 100), 40, (40, 20, 0, 20)),
        (named("snapkv", 100, window=64), 1000, (100, 64, 0, 64)),
        (named("snapkv", 100, window=64), 40, (40, 39, 0, 39)),
        (named("snapkv", 100), 1, (1, 0, 0, 0)),
        (named("snapkv", 0.25), 1003, (250, 32, 0, 32)),
        (named("snapkv", 0.29), 100, (29, 14, 0, 14)),  # 0.29 * 100 is 28.999... in floats
        (named("snapkv", 0.01), 50, (2, 1, 0, 1)),
        (named("snapkv", 0.01), 1, (1, 0, 0, 0)),
        (named("snapkv", 0.999999), 2**20 - 1, (2**20 - 3, 32, 0, 32)),
        (named("h2o", 101), 1000, (101, 32, 0, 50)),
        (named("prefixkv", 2), 1000, (2, 1, 1, 1)),
        (named("streaming-llm", 3), 1000, (3, 1, 2, 1)),
        (named("streaming-llm", 3), 1, (1, 0, 0, 1)),
    ],
)
def test_rows_and_the_largest_of_them(config, n, expected):
    assert tuple(largest(config, n)) == expected
    rows = make_rows(config, jnp.asarray([7, n]))
    assert tuple(int(x[1]) for x in (rows.base, rows.window, rows.sinks, rows.recent)) == expected


def test_an_explicit_window_must_leave_something_to_select():
    config = named("snapkv", 0.1, window=16)
    message = r"window=16, expected less than the budget of 16 \(of 160 prompt tokens\)"
    with pytest.raises(ConfigError, match=message):
        check_prompt(config, 160)
    check_prompt(config, 170)
    check_prompt(named("h2o", 0.1, window=16), 160)  # observes no window


# ---------------------------------------------------------------------------- capacity
BUCKET, HEADS, DEPTH = 24, 3, 4
EVERY_LENGTH = np.arange(1, BUCKET + 1)
SCORES = ("flat", "one head", "one layer", "random")
FAMILIES = {
    "uniform": ["snapkv", "ada-snapkv", "h2o", "streaming-llm", "random"],
    "pyramid": ["pyramidkv", "ada-pyramid"],
    "prefix": ["prefixkv", "ada-prefixkv"],
    "profile": ["prefixkv", "ada-prefixkv"],
}


@st.composite
def cases(draw, family: str):
    """`named`'s arguments, and sliding windows of which many are about as wide as the budget."""

    def one_of(*values):
        return draw(st.sampled_from(values))

    method, extra = one_of(*FAMILIES[family]), {"floor": one_of(0.0, 0.37, 1.0)}
    budget = draw(st.integers(2, BUCKET - 1))
    window = st.sampled_from([None, None, 0.6, 1.0, 1.1, 1.5, 2.2]).map(
        lambda share: None if share is None else int(share * budget) + 1
    )
    windows = draw(st.one_of(st.tuples(*[window] * DEPTH), window.map(lambda w: (w,) * DEPTH)))
    cap = one_of(None, 0, 1, 5)
    if cap is not None and METHODS[method].heads == "ada" and family == "uniform":
        extra["head_cap"] = budget + cap
    elif one_of(True, False):
        budget = budget / BUCKET
    if one_of(True, False):
        extra |= {"sinks": one_of(0, 2, 6), "recent": one_of("window", "half", 1, 3, 6)}
    if family == "pyramid":
        extra["beta"] = one_of(1, 3, 20, 40)
    if family == "profile":
        share = st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0])
        extra["profile"] = draw(st.tuples(*[share] * DEPTH).filter(any))
        budget = one_of(budget, None)
    if isinstance(budget, float) or (budget or 0) > 4:
        extra["window"] = one_of(None, 1, 4)
    return (method, budget), extra, windows


def capacities(config, tokens, windows, heads):
    """Slots of every layer in the padded layout."""
    if config.skips(tokens):
        return (tokens,) * len(windows)
    found = [capacity(config, tokens, i, windows, heads) for i in range(len(windows))]
    assert held_slots(config, tokens, windows, heads) == heads * sum(found)
    return tuple(found)


def scores_of(kind: str, layer: int) -> jax.Array:
    shape = (BUCKET, HEADS, BUCKET)
    scores = np.random.default_rng(layer).gamma(0.3, size=shape)
    if kind == "one head":  # gets all that Ada-KV may give
        scores[:, 1] += 100
    if kind == "flat" or (kind == "one layer" and layer == 2):  # needs all for PrefixKV's mass
        scores = np.ones(shape)
    elif kind == "one layer":
        scores[..., 0] += 1e4
    return jnp.asarray(scores, jnp.float32)


def check_capacity(config: CompressionConfig, windows: tuple[int | None, ...], kind: str):
    """Rows of every length up to the bucket's, with scores that favour one head or one layer."""
    masks = []

    def spy(keys, values, keep, slots):
        masks.append((np.asarray(keep), slots))
        empty = jnp.zeros((BUCKET, HEADS, 1, 1))
        return PaddedLayer(keys=empty, values=empty, positions=empty[..., 0].astype(jnp.int32))

    layers = iter(range(DEPTH))
    keys = [jnp.zeros((BUCKET, BUCKET, HEADS, 1))] * DEPTH
    probes = [probe_of(0, BUCKET, BUCKET, HEADS, HEADS, 1, BUCKET)] * DEPTH
    with pytest.MonkeyPatch.context() as patch:
        for part in JITTED:
            patch.setattr(*part)
        patch.setattr(subject, "pack", spy)
        patch.setattr(subject, "score", lambda *_: scores_of(kind, next(layers)))
        lengths = jnp.asarray(EVERY_LENGTH, jnp.int32)
        compress(keys, keys, probes, config, lengths=lengths, windows=windows)

    assert tuple(slots for _, slots in masks) == capacities(config, BUCKET, windows, HEADS)
    counts = np.stack([keep.sum(-1) for keep, _ in masks], axis=1)  # [row, layer, head]
    assert (counts.max((0, 2)) <= [slots for _, slots in masks]).all()

    rows = make_rows(config, lengths)
    # The token after a prompt of n sees itself and w - 1 before it.
    seen = [np.minimum(EVERY_LENGTH, BUCKET if w is None else w - 1) for w in windows]
    caps = np.stack(seen, axis=1)
    held = np.stack([np.asarray(protected(rows, BUCKET, w)).sum(-1) for w in windows], axis=1)
    if config.head_cap is not None:
        caps = np.minimum(caps, config.head_cap)
        assert counts.max() <= config.head_cap
    asked, rounding = DEPTH * np.asarray(rows.base), 0
    if config.budget is None:
        asked, rounding = EVERY_LENGTH * sum(config.profile), 0.501
    expected = np.clip(asked, held.sum(1), caps.sum(1))
    assert (np.abs(counts.sum((1, 2)) - HEADS * expected) <= HEADS * rounding).all()

    # The packed layout's pool holds every row, and no more than the fullest may need.
    slots, regions = pool_shape(config, BUCKET, windows, HEADS)
    assert counts.sum((1, 2)).max() <= slots
    for layer, of_layer in enumerate(counts.sum(-1).T):
        assert of_layer.max() <= HEADS * layer_capacity(config, BUCKET, layer, windows)
        if regions is not None:
            assert of_layer.max() <= regions[layer][1] - regions[layer][0]
    packed = dataclasses.replace(config, layout="packed")
    assert held_slots(packed, BUCKET, windows, HEADS) == in_pages(slots, regions, DEPTH, 16)[0]


@pytest.mark.parametrize(
    "family",
    [
        f if f in ("uniform", "prefix") else pytest.param(f, marks=pytest.mark.slow)
        for f in FAMILIES
    ],
)
def test_capacity_holds_every_head_of_every_length(family):
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(cases(family), st.sampled_from(SCORES))
    def check(case, kind):
        args, extra, windows = case
        check_capacity(named(*args, **extra), windows, kind)

    check()


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        # The first layer's window cuts its ramp, and the others take the rest.
        (named("pyramidkv", 10, recent=1), (11, None, None, None)),
        # Sinks that most layers no longer see are made up for by the one that does.
        (named("pyramidkv", 9, recent=1, sinks=6), (None, 19, 19, 19)),
        # A short prompt has less than the first layer's share of the budget.
        (named("prefixkv", 12, profile=(1.0, 0.1, 0.1, 0.1)), (None,) * DEPTH),
        # What is protected is more than the profile gives, and the sum still exact.
        (named("prefixkv", 6, profile=(1.0, 0.0, 0.0, 0.0)), (None,) * DEPTH),
        (named("prefixkv", profile=(0.9, 0.9, 0.9, 0.0), sinks=4, recent=3), (None,) * DEPTH),
        (named("ada-prefixkv", 8, profile=(0.0, 0.0, 1.0, 0.0)), (5, None, 9, 3)),
    ],
)
def test_capacity_where_layers_lend_to_each_other(config, windows):
    for kind in SCORES:
        check_capacity(config, windows, kind)


# ---------------------------------------------------------------------------- the pool
def layer_sizes(config: CompressionConfig, windows: tuple[int | None, ...]) -> np.ndarray:
    """Entries per head `[T, L]` of a prompt of each length up to the bucket's, without scores."""
    lengths = jnp.asarray(EVERY_LENGTH, jnp.int32)
    with pytest.MonkeyPatch.context() as patch:
        for part in JITTED:
            patch.setattr(*part)
        return np.asarray(make_plan(config, lengths, BUCKET, windows).sizes)


def check_pool(config: CompressionConfig, windows: tuple[int | None, ...]):
    """Every length fits, in all and in each layer, and the fullest fills the pool."""
    sizes = layer_sizes(config, windows)
    slots, regions = pool_shape(config, BUCKET, windows, HEADS)
    assert HEADS * sizes.sum(1).max() <= slots
    if config.budget is not None and 1 not in windows:
        assert HEADS * sizes.sum(1).max() == slots
    for layer, most in enumerate(sizes.max(0)):
        assert most <= layer_capacity(config, BUCKET, layer, windows)
        if regions is not None:
            assert HEADS * most <= regions[layer][1] - regions[layer][0]


@pytest.mark.parametrize("family", ["uniform", "pyramid", "profile"])
def test_the_pool_holds_every_length_and_wastes_nothing(family):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(cases(family))
    def check(case):
        args, extra, windows = case
        check_pool(named(*args, **extra), windows)

    check()


SMALL = (0.05, 0.0, 0.1, 0.05)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (named("prefixkv", profile=(0.05,) * DEPTH), (None,) * DEPTH),
        (named("prefixkv", profile=SMALL, sinks=4, recent=3), (None,) * DEPTH),
        (named("ada-prefixkv", profile=SMALL), (None, 9, None, 5)),
        (named("prefixkv", 0.1, profile=SMALL), (None,) * DEPTH),
        (named("prefixkv", 3, profile=SMALL), (8,) * DEPTH),
        (named("snapkv", 12), (5, 5, 5, 5)),
        (named("snapkv", 12), (5, None, 5, None)),
        (named("snapkv", 4), (5, None, 9, None)),
        (named("ada-pyramid", 12), (5, 9, 5, 5)),
    ],
)
def test_the_pool_of_small_profiles_and_of_sliding_windows(config, windows):
    check_pool(config, windows)


def stored(config, lengths, tokens, windows=(None, None)):
    """A packed cache of random keys, and the entries of each row that its pool holds."""
    keys = [
        jax.random.normal(jax.random.key(i), (len(lengths), tokens, 2, 4))
        for i, _ in enumerate(windows)
    ]
    probes = [probe_of(i, len(lengths), tokens, 2, 2, 4, tokens) for i, _ in enumerate(windows)]
    call = jax.jit(compress, static_argnames=("config", "windows"))
    cache = call(keys, keys, probes, config, lengths=jnp.array(lengths), windows=windows)
    return cache, (np.asarray(cache.slots.owners) >= 0).sum(1).tolist()


def test_a_small_profile_loses_nothing_of_a_short_prompt():
    """The first and the last token of every head, more than 5 % of 10 tokens."""
    config = CompressionConfig.named("prefixkv", profile=(0.05, 0.05))
    cache, held = stored(config, (10, 3), 10)
    assert cache.counts.tolist() == [[[2, 2], [2, 2]]] * 2
    assert held == [8, 8]
    assert np.flatnonzero(cache.kept_mask(10)[0, 1, 1]).tolist() == [0, 9]


def test_sliding_windows_get_no_slots_that_they_cannot_fill():
    """Of 32 tokens the next one sees 6 in a layer whose window is 7."""
    config = CompressionConfig.named("snapkv", 12, layout="packed")
    for windows, sizes in (((7, 7), (6, 6)), ((7, 9), (6, 8)), ((7, 20), (6, 18))):
        slots, regions = pool_shape(config, 32, windows, 2)
        assert slots == 2 * sum(sizes)
        assert regions == (((0, 12), (12, 24)) if sizes == (6, 6) else None)
    cache, held = stored(config, (32,), 32, (7, 20))
    assert held == [2 * (6 + 18)]
    assert cache.counts.tolist() == [[[6, 6], [18, 18]]]
    assert cache.nbytes == in_pages(2 * (6 + 18), None, 2, 16)[0] * 2 * 4 * 4


def test_more_slots_than_an_index_counts_are_refused():
    windows = (None,) * 80
    message = "budget=1000000 comes to 5120000000 slots for a prompt of 1000000 tokens, expected"
    for config in (CompressionConfig.named("ada-snapkv", 10**6), named("kv-compress", 10**6)):
        with pytest.raises(ConfigError, match=message):
            pool_shape(config, 10**6, windows, 64)
    with pytest.raises(ConfigError, match=message):
        capacity(named("kv-compress", 10**6), 10**6, 0, windows, 64)
    assert pool_shape(named("ada-snapkv", 10**5), 10**6, windows, 64)[0] == 512 * 10**6
    assert capacity(named("snapkv", 10**6), 10**6, 0, windows, 64) == 10**6


@pytest.mark.parametrize(
    ("method", "slots"),
    [
        ("snapkv", (12,) * 3),
        ("h2o", (12,) * 3),
        ("pyramidkv", (19, 13, 13)),
        ("prefixkv", (32,) * 3),
    ],
)
def test_capacity_of_a_bucket(method, slots):
    """Uniform sizes pay for the budget exactly; a layer's own window is always enough."""
    config = named(method, budget=12)
    assert capacities(config, 32, (None,) * 3, 2) == slots
    assert capacities(config, 32, (7,) * 3, 2) == (6,) * 3
    assert capacities(named(method, budget=32), 32, (7,) * 3, 2) == (32,) * 3
