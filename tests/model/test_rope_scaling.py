"""Rotary embeddings scaled for longer texts: YaRN, dynamic NTK, LongRoPE.

Logits are Hugging Face's (tests/fixtures/README.md), row by row; here all rows of a case share a
padded batch. What `generate` and the others compute is held against one pass over the whole text.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import kvjax
from kvjax.cache.state import with_room
from kvjax.config import CompressionConfig
from kvjax.generation import prefill
from kvjax.inputs.prompts import pad
from kvjax.model_interface import ProbeRequest, Rotary
from kvjax.models.checkpoints.weights import load_decoder

FOLDER = Path(__file__).parents[1] / "fixtures" / "rope"
CASES = sorted(path.name for path in FOLDER.iterdir())
ROWS = ("short", "across", "long")
STEPS = 16
TOLERANCE = 1e-4
NEW = 8
CALL = {"max_new_tokens": NEW, "eos_ids": ()}
ROOMY = CompressionConfig.named("ada-snapkv", budget=96, window=8)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    folder = FOLDER / request.param
    return load_decoder(folder, progress=False), np.load(folder / "expected.npz")


@pytest.fixture(scope="module", params=["dynamic", "longrope"])
def by_length(request):
    return load_decoder(FOLDER / request.param, progress=False)


@pytest.fixture(scope="module")
def dynamic():
    return load_decoder(FOLDER / "dynamic", progress=False)


@pytest.fixture(scope="module")
def prompts():
    """Below the original length of 48, up to it, and above it."""
    rng = np.random.default_rng(1)
    return [rng.integers(5, 80, size).tolist() for size in (25, 44, 61)]


@jax.jit
def text_logits(model, tokens, lengths, rope_length):
    """Logits of every position, with frequencies chosen for `rope_length` tokens."""
    x = model.embed(tokens)
    for layer in model.layers:
        x, _, _, _ = layer.prefill(x, lengths, ProbeRequest(), Rotary(length=rope_length))
    return model.logits(x)


@jax.jit
def forced_steps(model, tokens, lengths, step_tokens):
    """Prefill, then feed given tokens one by one: logits after the prompt and after each."""
    full = CompressionConfig.named("full")
    rope_length = prefill.rope_lengths(model, lengths, step_tokens.shape[1])
    logits, cache = prefill.prefill_compress(
        model, tokens, lengths, jax.random.key(0), full, rope_length=rope_length
    )

    def step(cache, token):
        x, cache = model.extend(token[:, None], jnp.ones_like(lengths), cache)
        return cache, model.logits(x[:, 0])

    _, later = jax.lax.scan(step, with_room(cache, STEPS), step_tokens.T)
    return jnp.concatenate([logits[None], later])


def test_whole_texts_of_a_batch(case):
    model, expected = case
    tokens, lengths = pad([expected[f"{row}_tokens"] for row in ROWS])
    logits = np.asarray(text_logits(model, tokens, lengths, lengths))
    for found, row, length in zip(logits, ROWS, lengths, strict=True):
        wanted = expected[f"{row}_logits"]
        np.testing.assert_allclose(found[:length], wanted, atol=TOLERANCE, rtol=0)


def test_cached_decoding_of_a_batch(case):
    model, expected = case
    texts = [expected[f"{row}_tokens"] for row in ROWS]
    tokens, lengths = pad([text[:-STEPS] for text in texts])
    steps = np.stack([text[-STEPS:] for text in texts])
    logits = np.asarray(forced_steps(model, tokens, lengths, steps))
    for index, row in enumerate(ROWS):
        wanted = expected[f"{row}_logits"][-STEPS - 1 :]
        np.testing.assert_allclose(logits[:, index], wanted, atol=TOLERANCE, rtol=0)


def test_the_forward_pass_of_training(case):
    model, expected = case
    tokens = expected["long_tokens"]
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, tokens[None]))[0]
    np.testing.assert_allclose(logits, expected["long_logits"], atol=TOLERANCE, rtol=0)


# ---------------------------------------------------------------------------- whole calls
def log_probs(model, prompts, answers, rope_length):
    """Of each answer's tokens, from one pass over prompt and answer."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens, lengths = pad(rows, 128)
    logits = text_logits(model, tokens, lengths, np.asarray(rope_length, np.int32))
    every = np.asarray(jax.nn.log_softmax(logits))
    return [
        [every[row, len(prompt) + step - 1, token] for step, token in enumerate(answer)]
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def check_answers(model, prompts, out, rope_length):
    found = log_probs(model, prompts, out.tokens, rope_length)
    np.testing.assert_allclose(out.log_probs, found, atol=TOLERANCE)


def test_answers_by_prompt_and_new_tokens(by_length, prompts):
    """A row's frequencies are those of its prompt and answer, alone and in a batch."""
    lengths = [len(prompt) + NEW for prompt in prompts]
    out = kvjax.generate(by_length, prompts, ROOMY, return_cache=True, **CALL)
    check_answers(by_length, prompts, out, lengths)
    np.testing.assert_array_equal(out.cache.rope_length, lengths)
    alone = kvjax.generate(by_length, prompts[1:2], ROOMY, **CALL)
    assert alone.tokens == out.tokens[1:2]
    with pytest.raises(AssertionError):  # other frequencies are told apart
        check_answers(by_length, prompts, out, [2 * length for length in lengths])


def joined(steps, name):
    """What the steps of a stream have of each row."""
    return [[one for step in steps for one in getattr(step, name)[row]] for row in range(3)]


def test_streams_and_phases(dynamic, prompts):
    chosen = [len(prompt) + NEW for prompt in prompts]
    steps = list(kvjax.stream(dynamic, prompts, ROOMY, **CALL))
    answers = joined(steps, "tokens")
    wanted = log_probs(dynamic, prompts, answers, chosen)
    np.testing.assert_allclose(joined(steps, "log_probs"), wanted, atol=TOLERANCE)
    timed, _ = kvjax.timed_generate(dynamic, prompts, ROOMY, **CALL)
    assert timed.tokens == answers
    np.testing.assert_allclose(timed.log_probs, wanted, atol=TOLERANCE)


def test_questions_keep_the_frequencies_of_their_cache(dynamic, prompts, tmp_path):
    """Also turns beyond what was announced, and a cache that was saved and loaded."""
    question = [11, 12, 13]
    cache = kvjax.compress_prompt(dynamic, prompts, ROOMY, max_new_tokens=[4, 30, 7])
    chosen = [29, 74, 68]
    np.testing.assert_array_equal(cache.rope_length, chosen)
    first = kvjax.generate(dynamic, [question] * 3, cache=cache, return_cache=True, **CALL)
    asked = [prompt + question for prompt in prompts]
    check_answers(dynamic, asked, first, chosen)
    again = [p + a + question for p, a in zip(asked, first.tokens, strict=True)]
    second = kvjax.generate(dynamic, [question] * 3, cache=first.cache, return_cache=True, **CALL)
    check_answers(dynamic, again, second, chosen)
    np.testing.assert_array_equal(second.cache.rope_length, chosen)

    loaded = kvjax.load_cache(kvjax.save_cache(tmp_path / "cache", first.cache, dynamic), dynamic)
    np.testing.assert_array_equal(loaded.rope_length, chosen)
    third = kvjax.generate(dynamic, [question] * 3, cache=loaded, **CALL)
    assert third.log_probs == second.log_probs


def test_a_cache_is_asked_twice_under_recompression(dynamic, prompts):
    """A stream gives its own cache away after every segment, and never the caller's."""
    cache = kvjax.compress_prompt(dynamic, prompts, ROOMY, max_new_tokens=20)
    rule = kvjax.Recompress(every=3, budget=96)
    call = CALL | {"cache": cache, "recompress": rule}
    question, chosen = [11, 12, 13], [len(prompt) + 20 for prompt in prompts]
    one, two = (list(kvjax.stream(dynamic, [question] * 3, **call)) for _ in range(2))
    assert [step.tokens for step in one] == [step.tokens for step in two]
    answers, found = joined(one, "tokens"), joined(one, "log_probs")
    wanted = log_probs(dynamic, [prompt + question for prompt in prompts], answers, chosen)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    np.testing.assert_array_equal(cache.rope_length, chosen)


@pytest.mark.parametrize("method", ["kvzip", "expected-attention"])
def test_scorers_see_each_rows_own_frequencies(dynamic, prompts, method):
    """The same entries stay of a row alone and beside longer ones; of other lengths others do."""
    config = CompressionConfig.named(method, budget=16)
    compress = jax.jit(prefill.prefill_compress, static_argnums=4)

    def kept(rows, more):
        tokens, lengths = pad(rows, 64)
        rest = jax.random.key(0), config, None, lengths + more
        return np.asarray(compress(dynamic, tokens, lengths, *rest)[1].kept_mask(64))

    together = kept(prompts, 0)
    for row, prompt in enumerate(prompts):  # three times, so that all share a program
        np.testing.assert_array_equal(together[row], kept([prompt] * 3, 0)[0])
    assert (together != kept(prompts, 400)).any((1, 2, 3)).all()


def test_expected_queries_are_as_long_as_queries():
    """The expectation of the first layer, with YaRN's attention factor and without it."""
    model = load_decoder(FOLDER / "yarn", progress=False)
    layer, scaling = model.layers[0], model.config.rope_scaling
    x, lengths = model.embed(jnp.arange(5, 37)[None]), jnp.array([32])
    request, found = ProbeRequest(future=4), []
    for factor in (scaling.attention_factor, 1.0):
        changed = dataclasses.replace(scaling, attention_factor=factor)
        layer.attention.config = dataclasses.replace(model.config, rope_scaling=changed)
        found.append(layer.prefill(x, lengths, request)[3])
    longer, plain = found
    by = scaling.attention_factor
    np.testing.assert_allclose(longer.future_mean, by * plain.future_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(longer.future_cov, by**2 * plain.future_cov, rtol=1e-5, atol=1e-6)


def test_scores_by_the_whole_text(dynamic, prompts):
    cuts = [10, 30, 40]
    scored = kvjax.score(dynamic, prompts, cuts)
    heads = [prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)]
    rests = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
    wanted = log_probs(dynamic, heads, rests, [len(prompt) for prompt in prompts])
    for one, row in zip(scored, wanted, strict=True):
        np.testing.assert_allclose(one.nll, -np.array(row), atol=TOLERANCE)


def test_groups_of_rows(dynamic, prompts, monkeypatch):
    tokens, lengths = map(jnp.asarray, pad(prompts))
    chosen = jnp.asarray(lengths + np.array([4, 30, 7], np.int32))

    def run(limit):
        monkeypatch.setattr(prefill, "PREFILL_TOKENS", limit)
        rest = jax.random.key(0), ROOMY, None, chosen
        return jax.jit(lambda model: prefill.prefill_compress(model, tokens, lengths, *rest))

    whole, grouped = (run(limit)(dynamic)[1] for limit in (1024, 64))
    np.testing.assert_array_equal(grouped.rope_length, chosen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grouped, whole)


# ---------------------------------------------------------------------------- what stays as it is
def test_other_models_have_no_such_number(model, prompts, tmp_path):
    cache = kvjax.compress_prompt(model, prompts, ROOMY, max_new_tokens=9)
    assert cache.rope_length is None
    path = kvjax.save_cache(tmp_path / "cache", cache, model)
    with safe_open(path, framework="numpy") as file:
        assert "rope_length" not in set(file.keys())
    again = kvjax.compress_prompt(model, prompts, ROOMY)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), cache, again))


def test_wrong_lengths(dynamic, prompts):
    for wrong in (-1, [1, 2]):
        with pytest.raises(ValueError, match=r"^max_new_tokens=.*, expected an integer of at leas"):
            kvjax.compress_prompt(dynamic, prompts, ROOMY, max_new_tokens=wrong)
    cache = kvjax.compress_prompt(dynamic, prompts, ROOMY).replace(rope_length=None)
    with pytest.raises(ValueError, match=r"^cache\.rope_length is None, expected the tokens that"):
        kvjax.generate(dynamic, [[5]] * 3, cache=cache, **CALL)


# ---------------------------------------------------------------------------- context
def test_the_context_is_what_the_scaling_says():
    found = {name: load_decoder(FOLDER / name, progress=False).config.context for name in CASES}
    assert found == {"dynamic": 192, "longrope": 192, "yarn": 192, "yarn-mscale": 192}
    stated = {
        name: json.loads((FOLDER / name / "config.json").read_text())["max_position_embeddings"]
        for name in CASES
    }
    assert stated == {"dynamic": 48, "longrope": 192, "yarn": 48, "yarn-mscale": 192}


def test_max_context_moves_the_limit_alone(dynamic, prompts, tmp_path):
    """Programs and caches go from one to the other: it is one model."""
    less, _ = kvjax.load(FOLDER / "dynamic", progress=False, max_context=64)
    with pytest.raises(ValueError, match=r"61 tokens \+ max_new_tokens=8 exceeds .* at most 64"):
        kvjax.generate(less, prompts[2], ROOMY, **CALL)
    cache = kvjax.compress_prompt(dynamic, prompts, ROOMY)
    compiled = kvjax.compilations()
    again = kvjax.compress_prompt(less, prompts, ROOMY)
    assert kvjax.compilations() == compiled
    assert again.origin == cache.origin
    with pytest.raises(ValueError, match=r"^max_context must be a positive integer, got 0$"):
        kvjax.load(FOLDER / "dynamic", progress=False, max_context=0)
