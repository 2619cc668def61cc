"""The contracts of generation, on a tiny random checkpoint with grouped heads."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import TYPICAL

import kvjax
from kvjax import CompressionConfig, Sampling
from kvjax.cache.state import with_room
from kvjax.generation import decode, prefill
from kvjax.generation.programs import generate_program, prefill_compress_program
from kvjax.inputs.prompts import pad
from kvjax.models.checkpoints.weights import load_decoder
from kvjax.models.layers import in_parts

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
STEPS = 12
BUDGET = 16


def joined(pieces):
    return [item for piece in pieces for item in piece]


def compressed(model, prompts, config, seed=0):
    """In the bucket of 64 whatever their lengths: a program a method serves several tests."""
    tokens, lengths = pad(prompts, 64)
    return prefill_compress_program(model, tokens, lengths, jax.random.key(seed), config=config)


@jax.jit
def forced(model, cache, step_tokens):
    """Logits of given tokens fed one by one to a cache."""

    def step(cache, token):
        x, cache = model.extend(token[:, None], jnp.ones_like(token), cache)
        return cache, model.logits(x[:, 0])

    return jax.lax.scan(step, with_room(cache, STEPS), step_tokens.T)[1].swapaxes(0, 1)


@pytest.fixture(scope="module")
def step_tokens():
    return np.random.default_rng(1).integers(3, 80, (3, STEPS)).astype(np.int32)


@pytest.fixture(scope="module")
def full_logits(model, prompts, step_tokens):
    first, cache = compressed(model, prompts, CompressionConfig.named("full"))
    return np.asarray(first), np.asarray(forced(model, cache, step_tokens))


# ------------------------------------------------------------------------- budgets and buckets
@pytest.mark.parametrize("name", TYPICAL)
def test_budget_of_the_bucket_is_bit_identical_to_full(model, prompts, name):
    full = compressed(model, prompts, CompressionConfig.named("full"))
    same = compressed(model, prompts, CompressionConfig.named(name, budget=64))
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    assert same[1].keep_ratio is False  # nothing was evicted, so nothing dies while decoding


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPICAL)
def test_prompt_within_the_budget_keeps_every_entry(model, prompts, step_tokens, name):
    """Slow: prefill, compression and forced steps are compiled for each method."""
    short = [row[:length] for row, length in zip(prompts, (16, 9, 12), strict=True)]
    full = CompressionConfig.named("full")
    first, cache = compressed(model, short, CompressionConfig.named(name, budget=BUDGET))
    expected_first, expected_cache = compressed(model, short, full)
    assert decode.kept_entries(cache)[:, 0, 0].tolist() == [16, 9, 12]
    assert (decode.kept_entries(cache) == decode.kept_entries(cache)[:, :1, :1]).all()
    expected = forced(model, expected_cache, step_tokens)
    np.testing.assert_array_equal(first, expected_first)
    np.testing.assert_allclose(forced(model, cache, step_tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TYPICAL)
def test_compression_changes_what_is_decoded_but_not_the_first_token(
    model, prompts, step_tokens, full_logits, name
):
    first, cache = compressed(model, prompts, CompressionConfig.named(name, budget=BUDGET))
    np.testing.assert_array_equal(first, full_logits[0])
    assert int(decode.kept_entries(cache).sum()) == 3 * 2 * 2 * BUDGET
    later = np.asarray(forced(model, cache, step_tokens))
    assert np.isfinite(later).all()
    assert np.abs(later - full_logits[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["full", *TYPICAL])
def test_nan_in_every_empty_slot_changes_nothing(model, prompts, step_tokens, name):
    rows = [prompts[0], prompts[1][:10], prompts[2]]  # the second one leaves slots empty
    _, cache = compressed(model, rows, CompressionConfig.named(name, budget=BUDGET))
    cache = with_room(cache, STEPS)

    def poison(array, filled):
        return jnp.where(filled[..., None], array, jnp.nan)

    tail = cache.tail.replace(
        keys=tuple(jnp.full_like(k, jnp.nan) for k in cache.tail.keys),
        values=tuple(jnp.full_like(v, jnp.nan) for v in cache.tail.values),
    )
    layers = tuple(
        layer.replace(
            keys=poison(layer.keys, layer.positions >= 0),
            values=poison(layer.values, layer.positions >= 0),
        )
        for layer in cache.layers
    )
    pool = cache.slots
    if pool is not None:
        pool = pool.replace(entries=poison(pool.entries, pool.owners >= 0))
    poisoned = cache.replace(layers=layers, tail=tail, slots=pool)
    for part in (poisoned.tail.keys, pool or [layer.keys for layer in layers]):
        assert any(bool(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(part))
    np.testing.assert_array_equal(
        forced(model, poisoned, step_tokens), forced(model, cache, step_tokens)
    )


@pytest.mark.parametrize("name", TYPICAL)
def test_a_row_alone_and_in_any_batch(model, prompts, name):
    config = CompressionConfig.named(name, budget=BUDGET)
    _, together = compressed(model, prompts, config)
    _, others = compressed(model, [prompts[1], prompts[0][:5], prompts[0][::-1]], config)
    tokens, lengths = pad(prompts[1:2])
    assert tokens.shape == (1, 48)  # a smaller bucket
    key = jax.random.key(0)
    _, alone = prefill_compress_program(model, tokens, lengths, key, config=config)
    kept = alone.kept_mask(48)[0]
    assert kept.sum() == 2 * 2 * BUDGET
    np.testing.assert_array_equal(together.kept_mask(48)[1], kept)
    np.testing.assert_array_equal(others.kept_mask(48)[0], kept)


def test_positions_go_on_from_the_prompt_whatever_was_evicted(model, prompts, step_tokens):
    config = CompressionConfig.named("snapkv", budget=BUDGET)
    cache = with_room(compressed(model, prompts, config)[1], 1)
    assert cache.next_positions.tolist() == [64, 41, 52]
    _, cache = model.extend(jnp.asarray(step_tokens[:, :1]), jnp.ones(3, jnp.int32), cache)
    assert cache.tail.positions.tolist() == [[64], [41], [52]]
    assert cache.next_positions.tolist() == [65, 42, 53]


# ------------------------------------------------------------------------- large batches
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"), [("ada-snapkv", "packed"), ("prefixkv", "packed"), ("random", "padded")]
)
def test_rows_in_groups_are_rows_together(model, prompts, monkeypatch, name, layout):
    """Four rows of 64 tokens, two at a time.

    Slow: each layout is compiled twice, in groups and whole.
    """
    config = CompressionConfig.named(name, BUDGET, layout=layout)
    tokens, lengths = pad([*prompts, prompts[0][::-1]])
    key = jax.random.key(3)
    key = jax.random.split(key, 4) if name == "random" else key

    def run(tokens, lengths, key, limit):
        monkeypatch.setattr(prefill, "PREFILL_TOKENS", limit)
        return prefill.prefill_compress(model, tokens, lengths, key, config)

    program = jax.jit(run, static_argnums=3)
    groups, together = (program(tokens, lengths, key, limit) for limit in (150, 256))
    assert jax.tree.structure(groups) == jax.tree.structure(together)
    for a, b in zip(jax.tree.leaves(groups), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_groups_are_equal_and_as_few_as_fit():
    limit = prefill.PREFILL_TOKENS
    assert prefill._groups(1, 9 * limit) == 1
    assert prefill._groups(4, limit // 4) == 1
    assert prefill._groups(4, limit) == 4
    assert prefill._groups(6, limit // 4) == 2  # three rows twice
    assert prefill._groups(7, limit // 4) == 7


@pytest.mark.parametrize(
    ("rows", "tokens", "parts"),
    [(2, 100, {100}), (2, 256, {128}), (2, 300, {128, 44}), (9, 64, {64}), (9, 200, {128, 72})],
)
def test_a_long_prompt_in_parts(monkeypatch, rows, tokens, parts):
    """Whole parts of 128 tokens and what is left, however many rows there are."""
    monkeypatch.setattr("kvjax.models.layers.MLP_TOKENS", 256)
    x = jax.random.normal(jax.random.key(0), (rows, tokens, 3))
    sizes = []

    def twice(part):
        sizes.append(part.shape[1])
        return 2 * part

    np.testing.assert_array_equal(in_parts(twice, x), 2 * x)
    assert set(sizes) == parts


# ------------------------------------------------------------------------- one program, stages
@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "prefixkv"])
def test_stream_and_timed_stages_draw_the_same_tokens(model, prompts, name):
    """Slow: the stages are compiled whole, apart and timed."""
    config = CompressionConfig.named(name, budget=BUDGET)
    whole = kvjax.generate(model, prompts, config, max_new_tokens=STEPS, eos_ids=())
    assert [len(row) for row in whole.tokens] == [STEPS] * 3
    pieces = list(kvjax.stream(model, prompts, config, max_new_tokens=STEPS, eos_ids=()))
    assert len(pieces) > 1
    for row in range(3):
        assert joined(step.tokens[row] for step in pieces) == whole.tokens[row]
        streamed = joined(step.log_probs[row] for step in pieces)
        np.testing.assert_allclose(streamed, whole.log_probs[row], atol=1e-5)
    staged, timings = kvjax.timed_generate(model, prompts, config, max_new_tokens=STEPS, eos_ids=())
    assert staged.tokens == whole.tokens
    assert staged.cache_bytes == whole.cache_bytes
    assert min(timings.prefill, timings.compress, timings.decode, timings.compile) > 0
    assert timings.compilations == 3


def test_greedy_tokens_are_the_likeliest_ones(model, prompts):
    out = kvjax.generate(model, prompts, max_new_tokens=STEPS, eos_ids=())
    forced_tokens = np.array(out.tokens, np.int32)
    first, cache = compressed(model, prompts, CompressionConfig.named("full"))
    logits = np.asarray(forced(model, cache, forced_tokens))
    logits = np.concatenate([np.asarray(first)[:, None], logits[:, :-1]], axis=1)
    np.testing.assert_array_equal(logits.argmax(-1), forced_tokens)
    log_probs = np.asarray(jax.nn.log_softmax(logits)).max(-1)
    np.testing.assert_allclose(out.log_probs, log_probs, atol=1e-5)


def test_one_compilation_for_another_prompt_seed_temperature_and_allocation(model, prompts):
    config = CompressionConfig.named("ada-snapkv", budget=BUDGET, pooling="none")
    warm = Sampling(temperature=0.7, top_p=0.9)
    before = generate_program._cache_size()
    first = kvjax.generate(model, prompts, config, max_new_tokens=4, sampling=warm)
    assert generate_program._cache_size() == before + 1
    other = [[(7 * token) % 77 + 3 for token in row[:60]] for row in prompts]
    second = kvjax.generate(
        model, other, config, max_new_tokens=4, sampling=Sampling(temperature=1.5, top_p=0.5),
        seed=5,
    )  # fmt: skip
    assert generate_program._cache_size() == before + 1
    assert first.kept.tolist() != second.kept.tolist()
    assert first.kept.sum() == second.kept.sum()


# ------------------------------------------------------------------------- ends and sampling
def test_an_eos_token_ends_its_row_alone(model, prompts):
    free = kvjax.generate(model, prompts, max_new_tokens=STEPS, eos_ids=())
    eos = free.tokens[1][4]
    ended = kvjax.generate(model, prompts, max_new_tokens=STEPS, eos_ids=[eos, 79])
    for row, (mine, theirs) in enumerate(zip(ended.tokens, free.tokens, strict=True)):
        stops = [i for i, token in enumerate(theirs) if token in (eos, 79)]
        end = stops[0] + 1 if stops else STEPS
        assert mine == theirs[:end], row
        assert len(ended.log_probs[row]) == end
    assert len(ended.tokens[1]) <= 5


def test_seeds_and_rules_of_sampling(model, prompts):
    def draw(seed, **rules):
        sampling = Sampling(**rules)
        return kvjax.generate(
            model, prompts, max_new_tokens=STEPS, sampling=sampling, seed=seed, eos_ids=()
        ).tokens

    hot = draw(1, temperature=1.0)
    assert hot == draw(1, temperature=1.0)
    assert hot != draw(2, temperature=1.0)
    assert draw(3, temperature=1.0, top_k=1) == draw(0)
    repeated = draw(0, repetition_penalty=1e6)
    assert all(len(set(row)) == len(row) for row in repeated)
    assert all(not set(row) & set(prompt) for row, prompt in zip(repeated, prompts, strict=True))


# ------------------------------------------------------------------------- caches that are held
def test_compress_once_ask_many(model, prompts):
    """Slow: 10 s or more with no program kept: a question, and several of them, are compiled."""
    config = CompressionConfig.named("ada-snapkv", budget=BUDGET)
    cache = kvjax.compress_prompt(model, prompts[:1], config)
    before = jax.tree.map(np.asarray, cache)
    questions = [[5, 9, 11], [17, 4, 8, 20, 33]]
    both = kvjax.generate(model, questions, cache=cache, max_new_tokens=6)
    for row, question in enumerate(questions):
        alone = kvjax.generate(model, [question], cache=cache, max_new_tokens=6)
        assert alone.tokens[0] == both.tokens[row]
        streamed = list(kvjax.stream(model, [question], cache=cache, max_new_tokens=6))
        assert joined(step.tokens[0] for step in streamed) == both.tokens[row]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)  # asked, not changed
    assert both.kept.shape == (2, 2, 2)


def test_a_question_block_equals_its_tokens_one_by_one(model, prompts, step_tokens):
    for name in ("full", "prefixkv"):
        config = CompressionConfig.named(name, budget=BUDGET)
        _, cache = compressed(model, prompts, config)
        counts = jnp.array([STEPS, 5, 9])
        x, _ = model.extend(jnp.asarray(step_tokens), counts, with_room(cache, STEPS))
        one_by_one = forced(model, cache, step_tokens)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(
                model.logits(x[row, :count]), one_by_one[row, :count], atol=1e-5, rtol=0
            )


def test_a_second_turn_continues_the_first(model, prompts):
    turn = [7, 8, 9]
    first = kvjax.generate(model, prompts, max_new_tokens=5, eos_ids=(), return_cache=True)
    second = kvjax.generate(model, [turn] * 3, cache=first.cache, max_new_tokens=5, eos_ids=())
    joined = [p + a + turn for p, a in zip(prompts, first.tokens, strict=True)]
    assert second.tokens == kvjax.generate(model, joined, max_new_tokens=5, eos_ids=()).tokens


def test_a_second_turn_after_rows_that_ended_early(model, prompts):
    free = kvjax.generate(model, prompts, max_new_tokens=5, eos_ids=())
    eos = [free.tokens[0][1]]
    first = kvjax.generate(model, prompts, max_new_tokens=5, eos_ids=eos, return_cache=True)
    assert {len(row) for row in first.tokens} == {2, 5}
    turn = [[7, 8, 9], [4], [6, 5]]
    second = kvjax.generate(model, turn, cache=first.cache, max_new_tokens=5, eos_ids=())
    joined = [p + a + t for p, a, t in zip(prompts, first.tokens, turn, strict=True)]
    alone = kvjax.generate(model, joined, max_new_tokens=5, eos_ids=())
    assert second.tokens == alone.tokens


def test_prefixkv_takes_nothing_from_a_window_that_it_kept_whole():
    windowed = load_decoder(FIXTURES / "mistral", progress=False)  # a window of 8 everywhere
    prompt = [np.random.default_rng(7).integers(3, 80, 59).tolist()]
    full = kvjax.generate(windowed, prompt, max_new_tokens=STEPS, eos_ids=())
    config = CompressionConfig.named("prefixkv", budget=BUDGET)
    out = kvjax.generate(windowed, prompt, config, max_new_tokens=STEPS, eos_ids=())
    assert out.kept.tolist() == [[[7, 7], [7, 7]]]  # of 59: what is outside is not eligible
    assert out.tokens == full.tokens


def test_the_context_is_counted_row_by_row(model, prompts):
    rows = [prompts[0], prompts[0][:4]]
    cache = kvjax.compress_prompt(model, rows, CompressionConfig.named("full"))
    room = model.config.max_position_embeddings - len(rows[0])
    long_turn = [[5], [5] * (room - 4)]
    out = kvjax.generate(model, long_turn, cache=cache, max_new_tokens=2)
    assert [len(row) for row in out.tokens] == [2, 2]
    with pytest.raises(ValueError, match="exceeds the model's context"):
        kvjax.generate(model, long_turn[::-1], cache=cache, max_new_tokens=5)


def test_left_padded_arrays_are_converted(model, prompts):
    width = max(map(len, prompts))
    left = np.array([[0] * (width - len(row)) + row for row in prompts])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    config = CompressionConfig.named("snapkv", budget=BUDGET)
    padded = kvjax.generate(model, left, config, attention_mask=mask, max_new_tokens=6)
    assert padded.tokens == kvjax.generate(model, prompts, config, max_new_tokens=6).tokens


# ------------------------------------------------------------------------- stored profiles
@pytest.mark.slow
def test_a_stored_profile_sizes_the_layers(model, prompts):
    """Slow: profiles are static, and each is a program."""
    config = CompressionConfig.named("prefixkv", profile=(0.5, 0.25))
    out = kvjax.generate(model, prompts, config, max_new_tokens=2)
    for row, prompt in enumerate(prompts):
        sizes = out.kept[row, :, 0]
        assert sizes.sum() == round(0.75 * len(prompt))
        assert abs(sizes[0] - 0.5 * len(prompt)) < 1
    scaled = CompressionConfig.named("prefixkv", profile=(0.5, 0.25), budget=12)
    kept = kvjax.generate(model, prompts, scaled, max_new_tokens=2).kept
    assert kept[:, :, 0].tolist() == [[16, 8]] * 3


# ------------------------------------------------------------------------- wrong calls
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 500}, "max_new_tokens=500"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": [[3, 80]]}, "token id 80"),
        ({"prompts": "text"}, "tokenizer=None"),
        ({"stop": "x"}, "stop="),
        ({"config": CompressionConfig.named("snapkv", budget=0.25, window=16)}, "window=16"),
        ({"config": CompressionConfig.named("prefixkv", profile=(0.5,))}, "profile has 1"),
    ],
)
def test_wrong_calls_name_the_argument(model, prompts, arguments, named):
    call = {"prompts": prompts, "max_new_tokens": 4} | arguments
    with pytest.raises(ValueError, match=named):
        kvjax.generate(model, **call)
