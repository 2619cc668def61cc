"""A trained model: the text that llama2.c's own test expects, and kvpress's kept positions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CompressionConfig
from kvjax.cache.state import with_room
from kvjax.generation import prefill

STEPS = 200


@pytest.fixture(scope="module")
def golden(shared_data):
    return (shared_data / "stories260K" / "golden_200_steps.txt").read_bytes()


def test_generate_writes_the_golden_text(stories, golden):
    model, tokenizer, _ = stories
    out = kvjax.generate(model, [[1]], max_new_tokens=STEPS, tokenizer=tokenizer)
    assert len(out.tokens[0]) == STEPS
    assert out.text[0].encode() == golden


def test_prefill_and_decode_write_the_golden_text(stories, golden):
    model, tokenizer, _ = stories
    config = CompressionConfig.named("full")
    prompt = jnp.ones((1, 1), jnp.int32)
    logits, cache = jax.jit(prefill.prefill_compress, static_argnames="config")(
        model, prompt, jnp.ones((1,), jnp.int32), jax.random.key(0), config=config
    )

    @jax.jit
    def greedy(cache, logits):
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        x, cache = model.extend(token[:, None], jnp.ones((1,), jnp.int32), cache)
        return cache, model.logits(x[:, 0]), token

    cache, tokens = with_room(cache, STEPS), []
    for _ in range(STEPS):
        cache, logits, token = greedy(cache, logits)
        tokens.append(int(token[0]))
    assert tokenizer.decode(tokens, skip_special_tokens=True).encode() == golden


def test_streamed_text_is_the_golden_text(stories, golden):
    model, tokenizer, _ = stories
    steps = kvjax.stream(model, [[1]], max_new_tokens=STEPS, tokenizer=tokenizer)
    assert "".join(step.text[0] for step in steps).encode() == golden


@pytest.mark.slow
def test_a_stop_string_cuts_the_text(stories, golden):
    """Slow: a trained model writes its text three times, twice in steps that the host looks at."""
    model, tokenizer, _ = stories
    text = golden.decode()
    stop = ["a big, red", "never said"]
    arguments = {"max_new_tokens": STEPS, "tokenizer": tokenizer, "stop": stop}
    out = kvjax.generate(model, [[1]], **arguments)
    assert out.text[0] == text[: text.index(stop[0])]
    assert stop[0] in tokenizer.decode(out.tokens[0])
    assert stop[0] not in tokenizer.decode(out.tokens[0][:-1])
    assert "".join(step.text[0] for step in kvjax.stream(model, [[1]], **arguments)) == out.text[0]
    held = kvjax.generate(model, [[1]], **arguments, return_cache=True)
    assert held.text == out.text
    assert int(held.cache.next_positions[0]) == 1 + len(out.tokens[0])


def test_an_answer_joins_its_prompt(stories):
    model, tokenizer, _ = stories
    for prompt in ("Once upon a time there was a", "Lily went to the par"):
        whole = kvjax.generate(model, prompt, max_new_tokens=12, tokenizer=tokenizer)
        ids = tokenizer(prompt)["input_ids"] + whole.tokens[0]
        assert prompt + whole.text[0] == tokenizer.decode(ids, skip_special_tokens=True)
        steps = kvjax.stream(model, prompt, max_new_tokens=12, tokenizer=tokenizer)
        assert "".join(step.text[0] for step in steps) == whole.text[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dumped"), [("snapkv", "snapkv"), ("streaming-llm", "streaming"), ("h2o", "h2o_sum")]
)
def test_the_same_entries_as_kvpress(stories, shared_data, method, dumped):
    """Slow: five documents are scored by each method, with a program for each."""
    model, _, _ = stories
    folder = shared_data / "fidelity"
    documents = json.loads((folder / "docs_stories260K.json").read_text())[:5]
    theirs = np.load(folder / "kept_stories260K.npz")
    results = json.loads((folder / "results_stories260K.json").read_text())["methods"]
    config = CompressionConfig.named(method, 64, window=8, pooling="average", kernel=5)
    scores = kvjax.score(
        model, [d["ids"] for d in documents], [d["prompt"] for d in documents], config,
        positions=True,
    )  # fmt: skip
    for index, scored in enumerate(scores):
        for layer, heads in zip(theirs[f"{dumped}/64/{index}"], scored.positions, strict=True):
            assert [head[head >= 0].tolist() for head in layer] == heads
        assert scored.kept == 64 * 5 * 4
        expected = results[dumped]["64"]["per_doc_nll"][index]
        assert sum(scored.nll) == pytest.approx(expected, abs=1e-2)
