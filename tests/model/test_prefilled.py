"""Prompts read once and compressed many times: the same as each time anew."""

from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax import METHODS, CompressionConfig
from kvjax.compression.compress import probe_request
from kvjax.generation.prefilled import by_prefill, serves
from kvjax.models.checkpoints.weights import load_decoder

FIXTURES = Path(__file__).parents[1] / "fixtures"

# One method for each kind of thing that a scorer reads; two that one prefill does not serve.
NAMES = (
    "full",
    "snapkv",
    "h2o",
    "ada-expected-attention",
    "critical-ada-snapkv",
    "kvzip",
    "random",
)


def configs(budget=16) -> dict[str, CompressionConfig]:
    return {
        name: CompressionConfig.named(name, None if name == "full" else budget) for name in NAMES
    }


@pytest.fixture(scope="module")
def prefilled(model, prompts):
    return kvjax.prefill_prompts(model, prompts, list(configs().values()))


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_that_of_the_prompts(model, prompts, prefilled, name):
    config = configs()[name]
    seeds = [3, 4, 5]
    now = kvjax.compress_prompt(model, prefilled, config, seed=seeds)
    anew = kvjax.compress_prompt(model, prompts, config, seed=seeds)
    np.testing.assert_array_equal(now.kept_mask(64), anew.kept_mask(64))
    assert now.origin == anew.origin
    assert jax.tree.structure(now) == jax.tree.structure(anew)
    for one, other in zip(jax.tree.leaves(now), jax.tree.leaves(anew), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_answers_are_those_of_the_prompts(model, prompts, prefilled):
    config = configs()["snapkv"]
    call = {"max_new_tokens": 6, "seed": 1}
    now = kvjax.generate(model, prefilled, config, **call)
    anew = kvjax.generate(model, prompts, config, **call)
    assert now.tokens == anew.tokens
    np.testing.assert_allclose(now.log_probs, anew.log_probs, atol=1e-4)
    np.testing.assert_array_equal(now.kept, anew.kept)
    assert (now.cache_bytes, now.full_cache_bytes) == (anew.cache_bytes, anew.full_cache_bytes)
    steps = list(kvjax.stream(model, prefilled, config, **call))
    parts = [[token for step in steps for token in step.tokens[row]] for row in range(3)]
    assert parts == now.tokens


RULE = kvjax.Recompress(every=3, budget=24)


@pytest.mark.parametrize(
    ("config", "call"),
    [
        (CompressionConfig.named("snapkv", 16, quantize="int8"), {}),
        (CompressionConfig.named("kvzip", 16), {"recompress": RULE}),
        (CompressionConfig.named("prefixkv", 0.5), {"recompress": kvjax.Recompress(every=3)}),
    ],
    ids=["int8", "recompress", "ratio"],
)
def test_what_else_an_answer_can_be_asked_for(model, prompts, prefilled, config, call):
    """int8, compression while decoding and a cache handed back, crossed with reading once."""
    call = call | {"max_new_tokens": 7, "return_cache": True}
    now = kvjax.generate(model, prefilled, config, **call)
    anew = kvjax.generate(model, prompts, config, **call)
    assert now.tokens == anew.tokens
    np.testing.assert_allclose(now.log_probs, anew.log_probs, atol=1e-4)
    np.testing.assert_array_equal(now.kept, anew.kept)
    assert now.cache.nbytes == anew.cache.nbytes
    assert now.cache.history == anew.cache.history
    np.testing.assert_array_equal(now.cache.counts, anew.cache.counts)


def test_scores_are_those_of_the_texts(model, prompts, prefilled):
    texts = [[*prompt, *range(5, 14)] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    config = configs()["h2o"]
    now = kvjax.score(model, texts, lengths, config, prefilled=prefilled, positions=True)
    anew = kvjax.score(model, texts, lengths, config, positions=True)
    for one, other in zip(now, anew, strict=True):
        np.testing.assert_allclose(one.nll, other.nll, atol=1e-4)
        assert (one.kept, one.positions) == (other.kept, other.positions)
    with pytest.raises(ValueError, match="prefilled holds other prompts"):
        kvjax.score(model, texts, [length - 1 for length in lengths], config, prefilled=prefilled)


def test_a_group_of_rows_at_a_time(model, prompts, prefilled, monkeypatch):
    monkeypatch.setattr(kvjax.generation.prefill, "PREFILL_TOKENS", 64)
    arrays = jax.jit(
        kvjax.generation.prefill.prefill_in_groups, static_argnames="request"
    )(model, *kvjax.inputs.prompts.pad(prompts), request=prefilled.request)  # fmt: skip
    assert jax.tree.structure(arrays) == jax.tree.structure(prefilled.arrays)
    for one, other in zip(jax.tree.leaves(arrays), jax.tree.leaves(prefilled.arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_was_not_read_is_refused(model, prompts, prefilled):
    repeated = CompressionConfig.named("kvzip", 16, repeat_chunk=32)
    with pytest.raises(ValueError, match="prefilled without what 'kvzip' reads"):
        kvjax.compress_prompt(model, prefilled, repeated)
    plain = kvjax.prefill_prompts(model, prompts[:1], [CompressionConfig.named("key-diff", 16)])
    adding = CompressionConfig.named("key-diff", 16, sums=True)
    with pytest.raises(ValueError, match=r"'key-diff' reads, .* and sums=True$"):
        kvjax.compress_prompt(model, plain, adding)
    with pytest.raises(ValueError, match="'kvzip' repeats prompts or expects queries"):
        kvjax.prefill_prompts(model, prompts, [configs()["kvzip"], repeated])
    with pytest.raises(ValueError, match="images is given beside prefilled prompts"):
        kvjax.generate(model, prefilled, configs()["full"], max_new_tokens=1, images=[[], [], []])
    other = jax.tree.map(lambda x: x + 1, model)
    with pytest.raises(ValueError, match="prefilled by another model"):
        kvjax.compress_prompt(other, prefilled, configs()["full"])


def test_one_prefill_serves_every_method_and_budget():
    every = [
        CompressionConfig.named(name, budget)
        for name in METHODS
        for budget in ((None,) if name == "full" else (0.5, 0.25, 0.1, 0.05))
    ]
    (group,) = by_prefill(every, 4096)
    assert group == list(range(len(every)))
    apart = CompressionConfig.named("kvzip", 0.5, repeat_chunk=512)
    assert [len(group) for group in by_prefill([*every, apart], 4096)] == [len(every), 1]


def test_a_config_reads_what_its_other_budgets_read(model, prompts):
    """A budget that keeps all, and one whose window is short, stand for their methods."""
    few = kvjax.prefill_prompts(model, prompts, [CompressionConfig.named("snapkv", 64)])
    kvjax.compress_prompt(model, few, CompressionConfig.named("snapkv", 40))
    assert few.request.queries == 31  # of a bucket of 64


def test_what_follows_is_what_frequencies_were_chosen_for():
    model = load_decoder(FIXTURES / "rope" / "dynamic", progress=False)
    config, prompt = CompressionConfig.named("full"), [[5, 6, 7, 8] * 6]
    read = kvjax.prefill_prompts(model, prompt, [config], max_new_tokens=9)
    now = kvjax.generate(model, read, config, max_new_tokens=9)
    anew = kvjax.generate(model, prompt, config, max_new_tokens=9)
    assert now.tokens == anew.tokens
    np.testing.assert_allclose(now.log_probs, anew.log_probs, atol=1e-4)
    with pytest.raises(ValueError, match="prefilled for other texts than 30 tokens more"):
        kvjax.generate(model, read, config, max_new_tokens=30)
    with pytest.raises(ValueError, match="max_new_tokens"):
        kvjax.compress_prompt(model, read, config)


def test_a_probe_serves_what_asks_for_less():
    few, many = (
        probe_request(CompressionConfig.named("snapkv", 64, window=window), 4096)
        for window in (8, 32)
    )
    assert serves(many, few)
    assert not serves(few, many)
