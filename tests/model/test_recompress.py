"""Generation that compresses while it decodes: the same tokens, in constant memory."""

import re

import numpy as np
import pytest
from flax import nnx

import kvjax
from kvjax import CompressionConfig, Recompress
from kvjax.cache.slot_layers import layer_slots
from kvjax.generation.programs import generate_program
from kvjax.generation.request import Options, Request
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.tiny import load as load_tiny
from kvjax.tiny.questions import questions

NEW, EVERY = 30, 8
FULL = CompressionConfig.named("full")
ADA = CompressionConfig.named("ada-snapkv", 16)
RATIO = CompressionConfig.named("prefixkv", 0.5)
RULES = {
    "window": (ADA, Recompress(every=EVERY, budget=20)),
    "key-diff": (ADA, Recompress(every=EVERY, budget=20, scorer="key-diff", heads="uniform")),
    "global": (CompressionConfig.named("kv-compress", 16), Recompress(every=EVERY, budget=20)),
    "int8": (
        CompressionConfig.named("snapkv", 16, quantize="int8"),
        Recompress(every=EVERY, budget=20),
    ),
    "ratio": (RATIO, Recompress(every=EVERY)),
    "squared-sum": (
        CompressionConfig.named("kv-compress", 16, quantize="int8"),
        Recompress(every=EVERY, budget=20, scorer="squared-sum", layers="global"),
    ),
}


def answer(model, prompts, config, rule=None, new=NEW, **changes):
    call = {"max_new_tokens": new, "eos_ids": (), "recompress": rule} | changes
    return kvjax.generate(model, prompts, config, **call)


def drawn(steps, row):
    return [token for step in steps for token in step.tokens[row]]


@pytest.mark.parametrize(
    "method",
    ["ada-snapkv", *(pytest.param(one, marks=pytest.mark.slow) for one in ("full", "prefixkv"))],
)
def test_where_everything_fits_the_tokens_are_those_without(model, prompts, method):
    config = CompressionConfig.named(method, 0.5, keep_ratio=False) if method != "full" else FULL
    plain = answer(model, prompts, config)
    every = answer(model, prompts, config, Recompress(every=EVERY, budget=64 + NEW))
    assert every.tokens == plain.tokens
    np.testing.assert_allclose(
        np.concatenate(every.log_probs), np.concatenate(plain.log_probs), atol=2e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "int8", "ratio", "squared-sum"])
def test_stream_timed_and_a_row_alone_give_the_same_tokens(model, prompts, name):
    """Slow: each rule is compiled whole, as a stream, timed, and for one row."""
    config, rule = RULES[name]
    whole = answer(model, prompts, config, rule)
    call = {"max_new_tokens": NEW, "eos_ids": (), "recompress": rule}
    steps = list(kvjax.stream(model, prompts, config, **call))
    assert [drawn(steps, row) for row in range(3)] == whole.tokens
    assert answer(model, [prompts[1]], config, rule).tokens == [whole.tokens[1]]
    if name in ("window", "ratio"):
        timed, _ = kvjax.timed_generate(model, prompts, config, **call)
        assert timed.tokens == whole.tokens


@pytest.mark.parametrize(
    ("config", "kept"),
    [(FULL, 50), (ADA, 16), (CompressionConfig.named("ada-snapkv", 64), 50), (RATIO, 25)],
)
def test_a_budget_of_what_is_kept_is_enough(model, prompts, config, kept):
    """Of 50 and 41 tokens in a bucket of 64, whose empty slots nobody needs."""
    rows = [prompts[0][:50], prompts[1]]

    def request(budget, prompts=rows, cache=None):
        rule = Recompress(every=EVERY, budget=budget)
        options = Options(max_new_tokens=NEW, cache=cache, recompress=rule)
        return Request.make(model, prompts, config, options)

    assert request(kept).tokens.shape == (2, 64)
    expected = f"recompress.budget={kept - 1}, expected at least the {kept} entries a head"
    with pytest.raises(ValueError, match=expected):
        request(kept - 1)
    if config is RATIO:
        cache = kvjax.compress_prompt(model, rows, config)
        assert request(kept, [[5]] * 2, cache).new_tokens == NEW
        with pytest.raises(ValueError, match=expected):
            request(kept - 1, [[5]] * 2, cache)


@pytest.mark.slow
def test_what_was_evicted_is_missed(model, prompts):
    """Else the tests above could not fail.

    Slow: two answers are compiled, as in the tests above.
    """
    config, rule = RULES["window"]
    assert answer(model, prompts, config, rule).tokens != answer(model, prompts, config).tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_what_the_cache_holds_after_the_answer(model, prompts, name):
    """Slow: each rule is compiled with two loops, one around the other."""
    config, rule = RULES[name]
    new = 1 + 3 * EVERY  # the first token is the prompt's; the last segment is whole
    out = answer(model, prompts, config, rule, new, return_cache=True)
    cache = out.cache
    counts, fed = np.asarray(cache.slots.counts), new - 1
    lengths = np.array([len(row) for row in prompts])
    assert cache.next_positions.tolist() == (lengths + new).tolist()  # the last one is fed too
    assert (cache.tail.positions >= 0).sum(-1).tolist() == [1, 1, 1]
    if name == "ratio":
        kept = np.asarray(out.kept)
        n = lengths[:, None, None]
        np.testing.assert_array_equal(counts, kept + fed - fed * (n - kept) // n)
    else:
        assert counts.sum((1, 2)).tolist() == [2 * 2 * 20] * 3
        assert cache.nbytes == out.cache_bytes
        entry = 2 * model.config.head_dim
        entry = entry + 2 * 4 if config.quantize == "int8" else entry * 4
        # Whole pages of 16 slots, of which each layer may leave one all but empty.
        assert cache.nbytes == 3 * cache.slots.size * entry
        assert 2 * 2 * 20 <= cache.slots.size < 2 * 2 * 20 + 3 * 16
    for layer in range(2):
        held = layer_slots(cache.slots, layer)
        for row in range(3):
            owned, positions = np.asarray(held.owned[row]), np.asarray(held.positions[row])
            assert owned.sum(-1).tolist() == counts[row, layer].tolist()
            for head in (0, 1):
                mine = positions[owned[head]]
                assert len(set(mine)) == len(mine)
                assert mine.min() >= 0
                # True positions: the last tokens but the newest are held under their own.
                last = lengths[row] + fed - 1
                assert set(range(last - 3, last + 1)) <= set(mine.tolist())


@pytest.mark.slow
def test_continued_saved_and_asked_again(model, prompts, tmp_path):
    """Slow: an answer, questions to it and a stream, with and without the rule."""
    config, rule = RULES["window"]
    first = answer(model, prompts, config, rule, return_cache=True)
    path = kvjax.save_cache(tmp_path / "cache", first.cache, model, config)
    again = kvjax.load_cache(path, model)
    for held in (first.cache, again):
        out = answer(model, [[9, 8, 7]] * 3, config, cache=held, new=5)
        assert out.tokens == answer(model, [[9, 8, 7]] * 3, config, cache=first.cache, new=5).tokens
    # And with compression on again: the same pool, no larger.
    more = answer(model, [[9, 8, 7]] * 3, config, rule, cache=first.cache, return_cache=True)
    assert more.cache.nbytes == first.cache.nbytes
    steps = list(
        kvjax.stream(
            model, [[9, 8, 7]] * 3, config, max_new_tokens=NEW, eos_ids=(), recompress=rule,
            cache=first.cache,
        )
    )  # fmt: skip
    assert [drawn(steps, row) for row in range(3)] == more.tokens


@pytest.mark.slow
def test_rows_that_end_early_are_left_alone(model, prompts):
    """Slow: 10 s or more with no program kept: several answers under a rule are compiled."""
    config, rule = RULES["window"]
    plain = answer(model, prompts, config, rule)
    eos = plain.tokens[0][10]
    out = answer(model, prompts, config, rule, eos_ids=eos)
    for row in range(3):
        tokens = plain.tokens[row]
        end = tokens.index(eos) + 1 if eos in tokens else NEW
        assert out.tokens[row] == tokens[:end]


@pytest.fixture(scope="module")
def long_model():
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=128, hidden_size=32, intermediate_size=64,
        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_position_embeddings=4096,
    )  # fmt: skip
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_two_thousand_tokens_at_a_budget_of_256(long_model):
    """One compilation, the same bytes, and no copy of the pool inside the program.

    Slow: it decodes 2,000 tokens and compiles a text of the program.
    """
    prompt = [np.random.default_rng(3).integers(3, 120, 500).tolist()]
    config, rule = CompressionConfig.named("ada-snapkv", 256), Recompress(every=64, budget=256)
    compiled = kvjax.compilations()
    short = answer(long_model, prompt, config, rule, 2000, return_cache=True)
    assert kvjax.compilations() == compiled + 1
    pool = short.cache.slots
    assert short.cache_bytes == short.cache.nbytes == 2 * 2 * 256 * 2 * 8 * 4
    assert len(short.tokens[0]) == 2000
    assert int(pool.positions.max()) > 2400
    options = Options(max_new_tokens=2000, recompress=rule)
    request = Request.make(long_model, prompt, config, options)
    arrays = request.tokens, request.lengths, request.key, request.rules
    program = generate_program.lower(
        long_model, *arrays, config=request.config, new_tokens=2000,
        tail_slots=request.tail_slots, whole=True, recompress=rule,
    ).compile()  # fmt: skip
    shape = ",".join(map(str, pool.entries.shape))
    assert f"f32[{shape}]" in program.as_text()
    assert not re.findall(rf"= f32\[{shape}\][^=]* copy\(", program.as_text())


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rule", "least"),
    [
        ("ada-kvzip", Recompress(every=64), 7),
        ("ada-kvzip", Recompress(every=64, budget=256, scorer="key-diff"), 6),
    ],
)
def test_a_question_after_four_compressions_is_answered(tiny, method, rule, least):
    """260 tokens of its own after the document; then one of its notes is asked for.

    Slow: eight documents of 512 tokens and 261 tokens of answer each.
    """
    model, _ = tiny
    items = questions("multikey", 512, 8)
    ratio = rule.budget is None
    config = CompressionConfig.named(method, 0.5 if ratio else 200, keep_ratio=ratio)
    documents = [list(item.document) for item in items]
    first = answer(model, documents, config, rule, 261, return_cache=True)
    lengths = np.array(list(map(len, documents)))
    assert first.cache.next_positions.tolist() == (lengths + 261).tolist()
    if not ratio:
        assert first.cache_bytes == first.cache.nbytes
        heads = model.config.num_layers * model.config.num_kv_heads
        assert (first.cache.slots.counts.sum((1, 2)) <= heads * rule.budget).all()
    asked = [list(item.question) for item in items]
    out = answer(model, asked, config, cache=first.cache, new=len(items[0].answer))
    right = [found == list(item.answer) for found, item in zip(out.tokens, items, strict=True)]
    assert sum(right) >= least
