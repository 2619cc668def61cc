"""Questions, turns and streams: one sequence of stages, whoever asks and however often."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CompressionConfig, Recompress, Sampling
from kvjax.cache.state import with_room
from kvjax.cache.tail import compact, empty_tail
from kvjax.generation import decode
from kvjax.generation.programs import ask_program, flat, whole
from kvjax.generation.request import BLOCK, Options, Request, doubled
from kvjax.generation.sampling import row_keys
from kvjax.models.checkpoints.weights import load_decoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
NEW = 12
ADA = CompressionConfig.named("ada-snapkv", 16)
RATIO = CompressionConfig.named("prefixkv", 0.5)
INT8 = CompressionConfig.named("snapkv", 16, quantize="int8")
RULE = Recompress(every=4, budget=40)
QUESTION = [[9, 8, 7, 30, 41], [12, 5, 20]]
slow = partial(pytest.param, marks=pytest.mark.slow)


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(ord("0") + int(token)) for token in tokens)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 80, size).tolist() for size in (64, 41)]


def ask(model, prompts, config=ADA, **changes):
    return kvjax.generate(
        model, prompts, config, **{"max_new_tokens": NEW, "eos_ids": ()} | changes
    )


def streamed(model, prompts, config=ADA, **changes):
    """Tokens and log-probabilities of each row, as a stream hands them out."""
    call = {"max_new_tokens": NEW, "eos_ids": ()} | changes
    steps = list(kvjax.stream(model, prompts, config, **call))
    rows = range(len(steps[0].tokens))
    return tuple(
        [[one for step in steps for one in getattr(step, name)[row]] for row in rows]
        for name in ("tokens", "log_probs")
    )


def close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


# ---------------------------------------------------------------------------- the same stages
@pytest.fixture(scope="module")
def ratio_cache(model, prompts):
    return kvjax.compress_prompt(model, prompts, RATIO)


@pytest.mark.slow
def test_a_ratio_cache_under_a_budget(model, ratio_cache):
    """The question sees what the ratio left, recompressed or not, streamed or not.

    Slow: a question under a rule, whole and as a stream.
    """
    plain = ask(model, QUESTION, cache=ratio_cache)
    whole = ask(model, QUESTION, cache=ratio_cache, recompress=RULE)
    tokens, log_probs = streamed(model, QUESTION, cache=ratio_cache, recompress=RULE)
    close([row[:1] for row in whole.log_probs], [row[:1] for row in plain.log_probs])
    assert tokens == whole.tokens
    close(log_probs, whole.log_probs)


def test_what_the_ratio_evicted_does_not_come_back(model, ratio_cache):
    """A question of 40 tokens takes 20 entries of each head with it, under a budget as before."""
    lengths = jnp.array([40, 40])
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, 80, (2, 48)), jnp.int32)
    _, cache = ask_program(model, ratio_cache, tokens, lengths, tail_slots=64)
    kept, prompt = np.asarray(ratio_cache.counts), np.array([64, 41])[:, None, None]
    room = Recompress(every=4, budget=64)
    opened, _, held = decode.open_answer(model, cache, room, 4, 1.0, asked=True)
    expected = kept + 40 - 40 * (prompt - kept) // prompt
    np.testing.assert_array_equal(opened.slots.counts, expected)
    np.testing.assert_array_equal(held.kept, kept)
    assert int(opened.tail.cursor) == 0  # what survives of the question is among the entries


@pytest.mark.slow
def test_a_stop_string_that_never_comes_changes_nothing(model, prompts):
    """Slow: 10 s or more with no program kept: stages whole and apart, under a rule."""
    quiet = {"tokenizer": Letters(), "stop": "never", "return_cache": True, "recompress": RULE}
    stopped = ask(model, prompts, **quiet)
    plain = ask(model, prompts, recompress=RULE, return_cache=True)
    assert stopped.tokens == plain.tokens
    np.testing.assert_array_equal(stopped.kept, plain.kept)
    assert stopped.kept.sum() == 2 * 2 * 2 * 16
    assert stopped.cache_bytes == plain.cache_bytes == plain.cache.nbytes
    assert int(stopped.cache.tail.cursor) == int(plain.cache.tail.cursor) == 1
    np.testing.assert_array_equal(stopped.cache.counts, plain.cache.counts)
    np.testing.assert_array_equal(stopped.cache.slots.positions, plain.cache.slots.positions)


def test_a_stream_hands_out_nothing_after_a_stop(model, prompts):
    free = ask(model, prompts)
    text = Letters().decode(free.tokens[0])
    rules = {"tokenizer": Letters(), "stop": text[2:4]}
    whole = ask(model, prompts, **rules)
    assert whole.text[0] == text[:2]
    assert whole.tokens[0] == free.tokens[0][:4]
    tokens, log_probs = streamed(model, prompts, **rules)
    assert tokens == whole.tokens
    close(log_probs, whole.log_probs)


@pytest.mark.slow
def test_the_last_compression_of_an_answer_is_made_for_its_cache_alone(model, prompts, monkeypatch):
    """Slow: programs of its own, that count."""
    calls, evict = [], decode.evict

    def counted(*arguments):
        jax.debug.callback(lambda: calls.append(1))
        return evict(*arguments)

    monkeypatch.setattr(decode, "evict", counted)
    rule = Recompress(every=4, budget=41)  # programs of this test's own
    assert [len(row) for row in ask(model, prompts, recompress=rule).tokens] == [NEW] * 2
    jax.effects_barrier()
    assert len(calls) == 2  # before the 6th token and before the 10th
    ask(model, prompts, recompress=rule, return_cache=True)
    jax.effects_barrier()
    assert len(calls) == 2 + 3


@pytest.mark.slow
def test_int8_under_recompression_says_what_it_holds(model, prompts):
    """Slow: a question under a rule is compiled for int8."""
    cache = kvjax.compress_prompt(model, prompts, INT8)
    out = ask(model, QUESTION, cache=cache, recompress=RULE, return_cache=True)
    assert out.cache_bytes == out.cache.nbytes == 2 * 2 * 2 * RULE.budget * (2 * 8 + 2 * 4)
    np.testing.assert_array_equal(out.kept, cache.counts)


@pytest.mark.slow
def test_answers_do_not_count_as_entries_of_the_prompt(model, prompts):
    """Slow: an answer and a question to it, both under a rule."""
    first = ask(model, prompts, recompress=RULE, return_cache=True)
    second = ask(model, QUESTION, cache=first.cache, recompress=RULE, return_cache=True)
    lengths = np.array([64, 41])
    assert first.cache.counts.sum() > second.kept.sum()
    positions = np.asarray(first.cache.slots.positions)
    before = (positions >= 0) & (positions < lengths[:, None])
    assert second.kept.sum((1, 2)).tolist() == before.sum(1).tolist()


# ---------------------------------------------------------------------------- turns
@pytest.mark.parametrize("config", [ADA, RATIO], ids=["ada-snapkv", "prefixkv"])
def test_five_turns_compile_twice_and_hold_no_holes(model, prompts, config):
    rng, cache, used = np.random.default_rng(4), None, 0
    before = kvjax.compilations()
    for turn in range(5):
        texts = prompts if cache is None else rng.integers(3, 80, (2, 3 + turn)).tolist()
        new = {"max_new_tokens": 9, "return_cache": True, "cache": cache}
        out = ask(model, texts, config, **new)
        used += 9 + (0 if cache is None else 3 + turn)
        cache = out.cache
        assert int(cache.tail.cursor) == used
        assert (cache.tail.positions[:, :used] >= 0).all()
        assert cache.tail.positions.shape[1] <= used + BLOCK
    assert kvjax.compilations() <= before + 2


def test_what_a_stream_hands_on_between_chunks(model, prompts):
    """The model's arrays, taken apart once, and the entries without an array of the tail's."""
    parts, again = flat(model), flat(model)
    assert all(a is b for a, b in zip(parts.leaves, jax.tree.leaves(model), strict=True))
    assert parts.structure == again.structure
    assert hash(parts.structure) == hash(again.structure)
    assert jax.tree.structure(whole(parts)) == jax.tree.structure(model)
    other = load_decoder(FIXTURES / "qwen2", progress=False)
    assert parts.structure != flat(other).structure
    cache = kvjax.compress_prompt(model, prompts, ADA)
    entries = with_room(cache, 8).without_tail()
    assert entries.tail.keys == entries.tail.values == ()
    assert entries.slots is cache.slots


def test_tails_grow_by_doubling():
    assert [doubled(slots) for slots in (1, 256, 257, 512, 513, 5000)] == [
        256, 256, 512, 512, 1024, 8192,
    ]  # fmt: skip


def test_a_tail_has_room_for_the_turns_before_it(model, prompts):
    """250 slots are taken: 12 tokens of an answer and 16 slots of a question need a wider tail."""
    cache = with_room(kvjax.compress_prompt(model, prompts, ADA), 384)
    cache = cache.replace(tail=cache.tail.replace(cursor=jnp.int32(250)))
    request = Request.make(model, QUESTION, ADA, Options(max_new_tokens=NEW, cache=cache))
    assert request.tail_slots == request.cache.tail.positions.shape[1] == 512


def test_a_tail_without_holes(model, prompts):
    layers = kvjax.compress_prompt(model, prompts, CompressionConfig.named("full")).layers
    tail = empty_tail(layers, 5)
    filled = jnp.array([[7, -1, 8, -1, -1], [-1, 4, -1, -1, 5]])
    number = jnp.arange(5.0)[None, None, :, None]
    keys = tuple(jnp.broadcast_to(number, x.shape) for x in tail.keys)
    out = compact(tail.replace(positions=filled, keys=keys, cursor=jnp.int32(5)))
    assert out.positions.tolist() == [[7, 8, -1, -1, -1], [4, 5, -1, -1, -1]]
    assert out.keys[1][:, 0, :2, 0].tolist() == [[0, 2], [1, 4]]
    assert int(out.cursor) == 2


# ---------------------------------------------------------------------------- many questions
@pytest.mark.parametrize(
    "config",
    [
        slow(CompressionConfig.named("snapkv", 16, layout="padded"), id="padded"),
        slow(ADA, id="packed"),
        pytest.param(INT8, id="int8"),
        slow(CompressionConfig.named("prefixkv", 0.5, layout="padded"), id="padded-ratio"),
        pytest.param(RATIO, id="ratio"),
    ],
)
def test_questions_of_one_document_share_it(model, prompts, config):
    """Slow: 10 s or more with no program kept: batches and single questions are compiled."""
    cache = kvjax.compress_prompt(model, prompts[:1], config)
    rng = np.random.default_rng(5)
    questions = [rng.integers(3, 80, size).tolist() for size in (5, 3, 16)]
    out = ask(model, questions, cache=cache, return_cache=True)
    assert out.cache_bytes == cache.nbytes == out.cache.nbytes
    assert out.kept.shape == (3, 2, 2)
    turn = ask(model, [[5, 6]] * 3, cache=out.cache)
    for row, question in enumerate(questions):
        alone = ask(model, [question], cache=cache, return_cache=True)
        assert out.tokens[row] == alone.tokens[0]
        close([out.log_probs[row]], alone.log_probs)
        assert turn.tokens[row] == ask(model, [[5, 6]], cache=alone.cache).tokens[0]


def test_two_hundred_questions_hold_one_document(model, prompts):
    cache = kvjax.compress_prompt(model, prompts[:1], ADA)
    questions = [[3 + row % 70, 9, 11] for row in range(200)]
    out = ask(model, questions, cache=cache, max_new_tokens=2, return_cache=True)
    assert out.cache.slots.entries.shape[0] == 1
    assert out.cache_bytes == cache.nbytes
    assert out.full_cache_bytes == 2 * 2 * 2 * 64 * 8 * 4
    assert len(out.tokens) == 200


@pytest.mark.slow
def test_rows_that_share_a_document_are_evicted_apart(model, prompts):
    """Slow: compiled for two rows and for one, under a rule."""
    cache = kvjax.compress_prompt(model, prompts[:1], ADA)
    out = ask(model, QUESTION, cache=cache, recompress=RULE, return_cache=True)
    assert out.cache.slots.entries.shape[0] == 2
    for row in range(2):
        alone = ask(model, QUESTION[row : row + 1], cache=cache, recompress=RULE)
        assert alone.tokens[0] == out.tokens[row]


# ---------------------------------------------------------------------------- seeds
def test_a_row_draws_the_same_alone_and_in_any_batch(model, prompts):
    warm = {"sampling": Sampling(temperature=2.0)}
    both = ask(model, prompts, seed=[5, 6], **warm)
    turned = ask(model, prompts[::-1], seed=[6, 5], **warm)
    assert turned.tokens == both.tokens[::-1]
    assert ask(model, prompts[1:], seed=6, **warm).tokens == both.tokens[1:]
    twice = ask(model, [prompts[0]] * 2, seed=[5, 7], **warm).tokens
    assert twice[0] == both.tokens[0] != twice[1]
    assert ask(model, [prompts[0]] * 2, seed=5, **warm).tokens == [both.tokens[0]] * 2


def test_seeds_of_rows():
    same = row_keys(7, 3)
    assert (jax.random.key_data(row_keys([7] * 3, 3)) == jax.random.key_data(same)).all()
    with pytest.raises(ValueError, match="seed has 2 entries, expected one number or one a row"):
        row_keys([1, 2], 3)


def test_room_is_only_added(model, prompts):
    cache = kvjax.compress_prompt(model, prompts, ADA)
    wide = with_room(cache, 8)
    assert wide.tail.positions.shape == (2, 8)
    assert with_room(wide, 4) is wide
