"""Conversations through a model: turns alone or all of them, compressed, streamed, saved."""

import json
import shutil

import numpy as np
import pytest
from turns import LLAMA, QWEN, SMOL, said, tokenizer

import kvjax
from kvjax import CompressionConfig, tiny
from kvjax.cli import chat
from kvjax.inputs.chat import turn_tokens
from kvjax.models.checkpoints.weights import load_decoder

FULL = CompressionConfig.named("full")
SNAP = CompressionConfig.named("snapkv", 16)
DOCUMENT = [said("system", "Be brief."), said("user", "The note of Ann is 42. " * 2)]
QUESTION = said("user", "Which note has Ann?")
NEW = 6


@pytest.fixture(scope="module")
def model():
    return kvjax.load(tiny.WEIGHTS, progress=False)[0]


@pytest.fixture(scope="module")
def made():
    return tokenizer(SMOL)


@pytest.fixture(scope="module")
def cache(model, made):
    return kvjax.compress_prompt(model, None, SNAP, messages=DOCUMENT, tokenizer=made)


def test_a_talk_without_a_document_is_read_for_the_whole_context(made, tmp_path, capsys):
    """Where rotary frequencies depend on the length: not for the first question alone."""
    config = json.loads((tiny.WEIGHTS / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny.WEIGHTS / "model.safetensors", tmp_path)
    model = load_decoder(tmp_path, progress=False)
    call = {"max_new_tokens": NEW, "eos_ids": ()}
    talk = chat.Talk((), None)
    for question in ("Which note has Ann?", "And Bob?"):
        talk = chat._answered(chat.Setting(model, made, FULL, {}, call), talk, question)
        assert talk.cache.rope_length.tolist() == [model.config.context]
    first = turn_tokens(talk.turns[:1], made, add_generation_prompt=True)
    assert list(talk.cache.history[0].tokens[: len(first)]) == first
    assert len(talk.turns) == 4
    assert capsys.readouterr().err == ""


def ask(model, made, **call):
    return kvjax.generate(
        model, **{"max_new_tokens": NEW, "eos_ids": (), "tokenizer": made, "config": SNAP} | call
    )


def positions(cache) -> list[int]:
    return cache.next_positions.tolist()


def test_a_question_alone_is_the_whole_conversation(model, made, cache):
    read = turn_tokens(DOCUMENT, made)
    assert cache.history[0].tokens == tuple(read)
    assert positions(cache) == [len(read)]
    alone = ask(model, made, messages=[QUESTION], cache=cache, return_cache=True)
    whole = ask(model, made, messages=[*DOCUMENT, QUESTION], cache=cache)
    chat = ask(model, made, prompts=QUESTION["content"], chat=True, cache=cache)
    assert alone.tokens == whole.tokens == chat.tokens
    rendered = turn_tokens([*DOCUMENT, QUESTION], made, add_generation_prompt=True)
    ids = ask(model, made, prompts=rendered[len(read) :], cache=cache)
    assert ids.tokens == alone.tokens
    [history] = alone.cache.history
    assert history.tokens == (*rendered, *alone.tokens[0])
    assert history.turns == (*DOCUMENT, QUESTION, said("assistant", alone.text[0]))
    assert positions(alone.cache) == [len(history.tokens)]


def test_turns_stay_one_conversation(model, made):
    """Without compression three turns to a cache are what one prompt of all of them is."""
    full = CompressionConfig.named("full")
    cache = kvjax.compress_prompt(model, config=full, messages=DOCUMENT, tokenizer=made)
    turns, out = [*DOCUMENT], None
    for question in ("Who?", "And why?", "When?"):
        turns.append(said("user", question))
        # Given alone, and with all turns before.
        given = turns if question == "And why?" else turns[-1:]
        out = ask(model, made, messages=given, cache=cache, return_cache=True)
        cache = out.cache
        turns.append(said("assistant", out.text[0]))
    assert list(cache.history[0].turns) == turns
    [tokens] = [one.tokens for one in cache.history]
    assert positions(cache) == [len(tokens)]
    again = ask(model, made, config=full, prompts=list(tokens[: -len(out.tokens[0])]))
    assert again.tokens == out.tokens
    np.testing.assert_allclose(again.log_probs, out.log_probs, atol=1e-4)


def test_a_batch_of_conversations(model, made, cache):
    questions = [[QUESTION], [said("user", "Who is Ann?")]]
    out = ask(model, made, messages=questions, cache=cache, return_cache=True)
    assert out.tokens[0] == ask(model, made, messages=questions[0], cache=cache).tokens[0]
    assert [one.turns[2] for one in out.cache.history] == [each[0] for each in questions]
    lengths = [len(one.tokens) for one in out.cache.history]
    assert positions(out.cache) == lengths
    assert lengths[0] != lengths[1]


def test_a_stream_hands_its_cache_back(model, made, cache):
    call = {"messages": [QUESTION], "cache": cache}
    out = ask(model, made, return_cache=True, **call)
    steps = list(
        kvjax.stream(
            model, max_new_tokens=NEW, eos_ids=(), tokenizer=made, return_cache=True, **call
        )
    )
    assert [step.cache for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].tokens == [[]]
    assert "".join(step.text[0] for step in steps) == out.text[0]
    found = steps[-1].cache
    assert found.history == out.cache.history
    assert found.history[0].turns == out.cache.history[0].turns
    assert positions(found) == positions(out.cache)
    second = {"messages": [said("user", "Sure?")]}
    again = ask(model, made, cache=found, **second)
    assert again.tokens == ask(model, made, cache=out.cache, **second).tokens


def test_a_saved_cache_goes_on(model, made, cache, tmp_path):
    """Its document need not be at hand any more."""
    path = kvjax.save_cache(tmp_path / "cache", cache, model)
    loaded = kvjax.load_cache(path, model)
    assert loaded.history == cache.history
    found = [ask(model, made, cache=one, messages=[QUESTION]).tokens for one in (loaded, cache)]
    assert found[0] == found[1]


def test_text_between_turns_ends_the_turns(model, made, cache):
    out = ask(model, made, prompts="and", cache=cache, return_cache=True)
    [history] = out.cache.history
    assert history.turns is None
    assert len(history.tokens) == positions(out.cache)[0]
    with pytest.raises(ValueError, match=r"^messages do not begin with what the cache has read"):
        ask(model, made, messages=[QUESTION], cache=out.cache)


@pytest.mark.parametrize("template", [LLAMA, QWEN], ids=["llama", "qwen"])
def test_a_rewritten_answer_is_named(model, cache, template):
    """What the model has drawn stays in the cache, and the next question follows it."""
    made = tokenizer(template)
    cache = kvjax.compress_prompt(model, None, SNAP, messages=DOCUMENT, tokenizer=made)
    first = ask(model, made, messages=[QUESTION], cache=cache, return_cache=True)
    [history] = first.cache.history
    answer = " <think>no</think>\n yes "
    turns = (*history.turns[:-1], said("assistant", answer))
    drawn = tuple(made(answer)["input_ids"])
    changed = history.__class__((*history.tokens[:-NEW], *drawn), turns)
    again = first.cache.replace(history=(changed,))
    with pytest.warns(UserWarning, match=r"turn 3 \(assistant\) otherwise"):
        ask(model, made, messages=[said("user", "Sure?")], cache=again)


def test_exactly_one_of_prompts_and_messages(model, made):
    message = "prompts .or chat=True. and messages: {} given, expected one of them"
    for call in (kvjax.generate, kvjax.stream, kvjax.timed_generate):
        with pytest.raises(ValueError, match=message.format("neither")):
            call(model, max_new_tokens=1)
        with pytest.raises(ValueError, match=message.format("both")):
            call(model, "hi", max_new_tokens=1, messages=DOCUMENT, tokenizer=made)
    with pytest.raises(ValueError, match=message.format("neither")):
        kvjax.compress_prompt(model)
    with pytest.raises(ValueError, match=message.format("both")):
        kvjax.generate(model, chat=True, messages=DOCUMENT, max_new_tokens=1, tokenizer=made)


def test_what_turns_need(model, made):
    call = {"messages": DOCUMENT, "max_new_tokens": 1}
    with pytest.raises(ValueError, match=r"^messages are given but tokenizer=None, expected a tok"):
        kvjax.generate(model, **call)
    with pytest.raises(ValueError, match=r"^messages are given, expected a tokenizer with a chat"):
        kvjax.generate(model, tokenizer=tokenizer(None), **call)
    wrong = {"template_args": {"x": 1}, "max_new_tokens": 1}
    with pytest.raises(ValueError, match=r"^template_args=\{'x': 1\}, expected messages or chat=T"):
        kvjax.generate(model, [5, 6], **wrong)


def test_template_arguments_reach_the_template(model):
    made, call = tokenizer(QWEN), {"messages": DOCUMENT, "max_new_tokens": 1, "return_cache": True}
    args = {"enable_thinking": False}
    out = kvjax.generate(model, tokenizer=made, template_args=args, **call)
    assert made.decode(out.cache.history[0].tokens[:-1]).endswith("<think>\n\n</think>\n\n")
