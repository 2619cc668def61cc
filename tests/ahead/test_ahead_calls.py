"""What public calls compile, compiled for chips that are not here, at a question of 128 tokens.

N T = 2,048 rows meet 2,048 slots: more than a kernel for decoding alone could hold. Stages that
several calls share are compiled once a kind of cache. Chips' compilers are slow: about a minute
in all on two idle cores.
"""

import jax
import jax.numpy as jnp
import pytest

from kvjax import CompressionConfig, Recompress
from kvjax.cache.state import with_room
from kvjax.compile_for import TPUS, compile_for, missing
from kvjax.generation import decode
from kvjax.generation.programs import (
    answer_program,
    ask_program,
    decode_program,
    generate_program,
    prefill_compress_program,
)
from kvjax.likelihood import _score_program
from kvjax.plan.question_matrix import asking, cache_of, layer_bytes, small_model

PROMPT, TOKENS, NEW = 1024, 128, 16


def named(name, **settings):
    return CompressionConfig.named(name, 512, **settings)


@pytest.fixture(scope="module")
def model():
    return small_model(layers=1, heads=16, kv_heads=4)


def rows(tokens):
    array = jax.ShapeDtypeStruct
    return array((1, tokens), jnp.int32), array((1,), jnp.int32)


def generate(model):
    def run(model, tokens, lengths):
        rules = jax.random.key(0), decode.greedy_rules()
        sizes = {"new_tokens": NEW, "tail_slots": 32, "whole": True}
        return generate_program(model, tokens, lengths, *rules, config=named("ada-snapkv"), **sizes)

    return run, (model, *rows(PROMPT))


def answer(config, recompress=None):
    """A question to a cache, with its answer."""

    def call(model):
        def run(model, cache, tokens, lengths):
            rules = jax.random.key(0), decode.greedy_rules()
            sizes = {"new_tokens": NEW, "tail_slots": TOKENS + NEW, "whole": False}
            sizes["recompress"] = recompress
            return answer_program(model, cache, tokens, lengths, *rules, **sizes)

        return run, (model, cache_of(model, config, 1, PROMPT), *rows(TOKENS))

    return call


def ask(config, tail=0):
    """A question alone, after `tail` tokens of earlier turns."""

    def call(model):
        cache = cache_of(model, config, 1, PROMPT)
        cache = jax.eval_shape(lambda cache: with_room(cache, tail), cache)

        def run(*call):
            return ask_program(*call, tail_slots=tail + TOKENS + NEW)

        return run, (model, cache, *rows(TOKENS))

    return call


def decoding(model):
    cache = cache_of(model, named("snapkv"), 1, PROMPT)
    roomy = jax.eval_shape(lambda cache: with_room(cache, TOKENS + NEW), cache)
    rules = decode.greedy_rules()

    def start(tokens, lengths):
        logits = jnp.zeros((1, model.config.vocab_size))
        return decode.start_answer(logits, tokens, lengths, jax.random.key(0), rules, NEW)

    def run(model, cache, tail, answer):
        return decode_program(model, cache, tail, answer, rules, steps=8)

    return run, (model, cache, roomy.tail, jax.eval_shape(start, *rows(TOKENS)))


def score(model):
    def run(model, prompt, lengths, after, counts):
        call = model, prompt, lengths, after, counts, jax.random.key(0)
        return _score_program(*call, config=named("ada-snapkv"), positions=False)

    return run, (model, *rows(PROMPT), *rows(2 * TOKENS))


def repeat(model):
    """The prompt read once more, for KVzip's scores."""

    def run(model, tokens, lengths):
        key = jax.random.key(0)
        return prefill_compress_program(model, tokens, lengths, key, config=named("kvzip"))

    return run, (model, *rows(PROMPT))


CALLS = {
    "generate": generate,
    "generate from a cache": answer(named("snapkv")),
    "recompress": answer(named("snapkv"), Recompress(budget=512, every=8)),
    "one threshold": answer(
        named("kv-compress", sums=True),
        Recompress(budget=512, every=8, scorer="squared-sum", layers="global"),
    ),
    "score": score,
    "stream's question": ask(named("snapkv")),
    "stream's answer": decoding,
    "a second turn": ask(named("ada-snapkv"), tail=TOKENS + NEW),
    "int8": ask(named("snapkv", quantize="int8")),
    "evicted ranges": ask(named("prefixkv")),
    "the full cache": ask(CompressionConfig.named("full")),
    "kvzip": repeat,
}
# No attention to a packed pool.
PREFILL = ("kvzip", "the full cache")


@pytest.mark.parametrize("target", ["v5e", "v6e", "h200"])
@pytest.mark.parametrize("name", CALLS)
def test_public_calls_compile(model, name, target):
    if (reason := missing(target)) is not None:
        pytest.skip(reason)
    function, arguments = CALLS[name](model)
    text = compile_for(target, function, *arguments).as_text()
    if name not in PREFILL:
        assert ("tpu_custom_call" if target in TPUS else "triton_kernel_call") in text


@pytest.mark.parametrize("target", ["v5e", "h200"])
def test_a_question_needs_no_scores_over_a_layer(target):
    """The rest of the matrix is in docs/compile_matrix.md."""
    if (reason := missing(target)) is not None:
        pytest.skip(reason)
    few, many = (asking(target, 1000, budget, 1, layers=1) for budget in (1024, 8192))
    assert few["result"] == many["result"] == "compiled"
    assert many["temporaries"] - few["temporaries"] < 0.1 * layer_bytes(8192)
    full = asking(target, 1000, None, 1, layers=1)
    assert full["temporaries"] < 0.1 * layer_bytes(None)


def test_questions_of_a_batch_need_no_more_of_a_larger_budget():
    """16 rows on a v6e, where compilers kept more copies of the outputs for a larger budget."""
    if (reason := missing("v6e")) is not None:
        pytest.skip(reason)
    few, many = (asking("v6e", 1000, budget, 16) for budget in (1024, 8192))
    assert many["temporaries"] - few["temporaries"] < 0.1 * 16 * layer_bytes(8192)
