"""Whole models on packed caches: bytes, answers, int8."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import probe_of

import kvjax
from kvjax import METHODS, CompressionConfig
from kvjax.cache.slots import in_pages
from kvjax.models.checkpoints.weights import load_decoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
QUICK = {"xla_backend_optimization_level": 0}
COMPRESSING = [name for name in METHODS if name != "full"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------------------- packing
def budget_bytes(model, rows, per_head, entry, *, even=False):
    """Of `rows` prompts with `per_head` entries on average, each of `entry` bytes, in pages of 16.

    Layers that are not even begin pages wherever the one before them ends.
    """
    layers, each = model.config.num_layers, model.config.num_kv_heads * per_head
    if even:
        return rows * layers * -(-each // 16) * 16 * entry
    return rows * in_pages(layers * each, None, layers, 16)[0] * entry


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESSING)
def test_packed_holds_the_same_entries_in_exactly_the_budget(name):
    """Of three prompts of 64, 41 and 52 tokens, in two layers of two heads, in whole pages.

    Slow: each method compresses in two programs of its own.
    """
    keys, values = (jnp.asarray(normal(seed, 2, 3, 64, 2, 8)) for seed in (0, 1))
    probes = [probe_of(seed, 3, 64, 4, 2, 8, 8) for seed in (2, 3)]
    call = jax.jit(kvjax.compress, static_argnames="config", compiler_options=QUICK)
    lengths = jnp.array([64, 41, 52])
    padded, packed = (
        call(
            list(keys),
            list(values),
            probes,
            CompressionConfig.named(name, 16, layout=layout),
            lengths=lengths,
        )
        for layout in ("padded", "packed")
    )
    np.testing.assert_array_equal(packed.kept_mask(64), padded.kept_mask(64))
    slots = 2 * 2 * 16 if packed.slots.runs else in_pages(2 * 2 * 16, None, 2, 16)[0]
    assert packed.nbytes == 3 * slots * 2 * 8 * 4


@pytest.mark.parametrize(("name", "budget"), [("snapkv", 16), ("ada-prefixkv", 0.4)])
def test_packed_answers_as_padded(model, prompts, name, budget):
    padded, packed = (
        kvjax.generate(
            model,
            prompts,
            CompressionConfig.named(name, budget, layout=layout),
            max_new_tokens=12,
            eos_ids=(),
        )
        for layout in ("padded", "packed")
    )
    assert packed.tokens == padded.tokens
    np.testing.assert_allclose(packed.log_probs, padded.log_probs, atol=1e-5)
    np.testing.assert_array_equal(packed.kept, padded.kept)
    per_head = 16 if budget == 16 else int(0.4 * 64)
    entry = 2 * model.config.head_dim * 4
    assert packed.cache_bytes == budget_bytes(model, 3, per_head, entry, even=name == "snapkv")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ada-prefixkv"])
def test_quantized_caches_answer_nearly_alike(model, prompts, name):
    """Slow: answers of both dtypes are compiled."""
    exact, rough = (
        kvjax.generate(
            model,
            prompts,
            CompressionConfig.named(name, 16, layout="packed", quantize=quantize),
            max_new_tokens=12,
            eos_ids=(),
            return_cache=True,
        )
        for quantize in (None, "int8")
    )
    np.testing.assert_array_equal(rough.kept, exact.kept)
    assert [row[0] for row in rough.log_probs] == [row[0] for row in exact.log_probs]
    second = [abs(a[1] - b[1]) for a, b in zip(rough.log_probs, exact.log_probs, strict=True)]
    assert 0 < max(second) < 0.02
    head_dim = model.config.head_dim
    assert rough.cache_bytes == budget_bytes(model, 3, 16, 2 * head_dim + 8)
    pool = exact.cache.slots
    stored = rough.cache.slots.entries.reshape(*pool.entries.shape[:2], 2, head_dim)
    whole = (stored * rough.cache.slots.scales.swapaxes(1, 2)[..., None]).reshape(
        pool.entries.shape
    )
    np.testing.assert_allclose(whole, pool.entries, atol=float(jnp.abs(pool.entries).max()) / 250)


def test_int8_of_a_row_is_its_own():
    """Prompts below, at and above the budget of 12, alone and side by side: the same bytes."""
    lengths, windows = (9, 12, 20), (7, None)
    config = CompressionConfig.named("ada-snapkv", 12, quantize="int8")
    call = jax.jit(kvjax.compress, static_argnames=("config", "windows"), compiler_options=QUICK)
    keys, values = (jnp.asarray(normal(seed, 2, 3, 20, 2, 8)) for seed in (0, 1))
    queries = jnp.asarray(normal(2, 3, 6, 4, 8))

    def stored(rows, tokens):
        prompt = ([*x[:, rows, :tokens]] for x in (keys, values))
        probes = [kvjax.Probe(queries=queries[rows])] * 2
        n = jnp.array(lengths)[rows]
        pool = call(*prompt, probes, config, lengths=n, windows=windows).slots
        assert pool.entries.dtype == jnp.int8
        arrays = pool.owners, pool.positions, pool.entries, pool.scales.swapaxes(1, 2)
        filled = np.asarray(pool.owners) >= 0
        counts = pool.counts.tolist()
        return [(counts[i], *(np.asarray(x)[i, row] for x in arrays))
                for i, row in enumerate(filled)]  # fmt: skip

    together = stored(np.arange(3), 20)
    for row, tokens in enumerate((12, 12, 20)):
        # The longest in company of its like: the program of all three.
        alone = stored(np.array([row] * (3 if tokens == 20 else 1)), tokens)[0]
        for one, other in zip(alone, together[row], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [("mistral", "prefixkv"), ("qwen25-sharded", "ada-prefixkv")],
)
def test_packed_answers_as_padded_under_sliding_windows(name, method, prompts):
    """Slow: two programs a model."""
    model = load_decoder(FIXTURES / name, progress=False)
    outs = [
        kvjax.generate(
            model,
            prompts,
            CompressionConfig.named(method, 12, layout=layout),
            max_new_tokens=12,
            eos_ids=(),
        )
        for layout in ("padded", "packed")
    ]
    assert outs[0].tokens == outs[1].tokens
    np.testing.assert_array_equal(outs[0].kept, outs[1].kept)


@pytest.mark.parametrize(
    ("name", "quantize"), [("ada-snapkv", None), ("ada-snapkv", "int8"), ("prefixkv", None)]
)
def test_what_empty_slots_hold_changes_nothing(model, prompts, name, quantize):
    """NaN everywhere that no entry lies."""
    config = CompressionConfig.named(name, 16, layout="packed", quantize=quantize)
    cache = kvjax.compress_prompt(model, [prompts[0], prompts[1][:10]], config)
    empty = np.asarray(cache.slots.owners < 0)
    assert empty.sum() == empty.size - int(cache.counts.sum()) > 0
    pool = cache.slots
    if quantize:
        dirty = pool.replace(scales=jnp.where(empty[:, None], jnp.nan, pool.scales))
    else:
        dirty = pool.replace(entries=jnp.where(empty[..., None], jnp.nan, pool.entries))
    question = [[5, 6, 7]] * 2
    clean, same = (
        kvjax.generate(model, question, cache=c, max_new_tokens=6, eos_ids=())
        for c in (cache, cache.replace(slots=dirty))
    )
    assert clean.tokens == same.tokens
    assert clean.log_probs == same.log_probs


@pytest.mark.slow
def test_turns_streams_and_scores(model, prompts):
    """Slow: an answer, a stream, a second turn and a score, each a program."""
    config = CompressionConfig.named("ada-snapkv", 16, layout="packed")
    call = {"max_new_tokens": 10, "eos_ids": ()}
    first = kvjax.generate(model, prompts, config, return_cache=True, **call)
    steps = list(kvjax.stream(model, prompts, config, **call))
    drawn = [[token for step in steps for token in step.tokens[row]] for row in range(3)]
    assert drawn == first.tokens
    again = kvjax.generate(model, [[9, 8]] * 3, cache=first.cache, **call)
    assert [len(row) for row in again.tokens] == [10] * 3
    packed, padded = (
        kvjax.score(
            model,
            prompts,
            30,
            CompressionConfig.named("ada-snapkv", 8, layout=layout),
            positions=True,
        )
        for layout in ("packed", "padded")
    )
    for a, b in zip(packed, padded, strict=True):
        np.testing.assert_allclose(a.nll, b.nll, atol=1e-4)
        assert (a.kept, a.positions) == (b.kept, b.positions)


def test_layout_none_packs_uneven_budgets():
    """On a CPU; uniform ones stay padded there."""
    from kvjax.compression.capacity import packs

    packed = {name for name in COMPRESSING if packs(CompressionConfig.named(name, 16))}
    even = {("uniform", "uniform"), ("uniform", "shared")}
    kinds = {name: (METHODS[name].layers, METHODS[name].heads) for name in COMPRESSING}
    uneven = {name for name, kind in kinds.items() if kind not in even}
    assert uneven >= {"pyramidkv", "ada-snapkv", "prefixkv", "kv-compress", "joint-snapkv"}
    assert packed == uneven
    assert packs(CompressionConfig.named("snapkv", 16, layout="packed"))
