"""What a server takes and gives, and what a request has to pass first; no engine."""

import asyncio
import json
import math

import pytest
import served
from pydantic import ValidationError
from turns import tokenizer

from kvjax.serve.answers import DONE, Form, encoded, error, event, token_texts
from kvjax.serve.guard import Guard, Limits
from kvjax.serve.protocol import Chat, Completion, Document, complaint


def wrong(kind, body) -> str:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return complaint(caught.value.errors()[0], kind)[0]


# ---------------------------------------------------------------------------- requests
def test_defaults_are_openais():
    asked = Completion.model_validate({"prompt": "a"})
    assert (asked.prompt, asked.limit, asked.temperature, asked.top_p) == (["a"], 16, 1, 1)
    assert asked.sampling().top_k == 0
    assert not asked.stream
    chat = Chat.model_validate({"messages": [{"role": "user", "content": "a"}]})
    assert chat.limit is None


def test_a_prompt_has_four_forms():
    for given, found in [
        ("a b", ["a b"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ]:
        assert Completion.model_validate({"prompt": given}).prompt == found


def test_null_is_nothing():
    body = {
        "prompt": "a",
        "max_tokens": None,
        "stop": None,
        "n": None,
        "logprobs": None,
        "foo": None,
    }
    assert Completion.model_validate(body) == Completion.model_validate({"prompt": "a"})


def test_parts_of_a_turn_are_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    chat = Chat.model_validate({"messages": [{"role": "user", "content": parts}]})
    assert chat.messages == [{"role": "user", "content": "a b"}]


def test_limits_of_a_chat_have_two_names():
    messages = [{"role": "user", "content": "a"}]
    for name in ("max_tokens", "max_completion_tokens"):
        assert Chat.model_validate({"messages": messages, name: 7}).limit == 7


def test_seeds_are_the_requests_own():
    asked = Completion.model_validate({"prompt": "a", "seed": 3})
    assert asked.drawn_seed() == 3
    other = Completion.model_validate({"prompt": "a"})
    assert len({other.drawn_seed() for _ in range(4)}) > 1


SAID = {"role": "user", "content": "a"}
WRONG = [
    (Completion, [], "the body is [], expected a JSON object"),
    (
        Completion,
        {},
        "prompt is missing, expected a text, token ids, or a list of at most 64 of either, none of"
        " them empty",
    ),
    (Completion, {"prompt": "a", "temperature": 3}, "temperature=3, expected a number from 0 to 2"),
    (
        Completion,
        {"prompt": "a", "temperature": math.nan},
        "temperature=nan, expected a number from 0 to 2",
    ),
    (Completion, {"prompt": "a", "top_p": 0}, "top_p=0, expected a number above 0 and at most 1"),
    (Completion, {"prompt": "a", "n": 2}, "n=2 is not implemented, expected 1"),
    (Completion, {"prompt": "a", "n": True}, "n=True is not implemented, expected 1"),
    (
        Completion,
        {"prompt": "a", "max_tokens": "9"},
        "max_tokens='9', expected an integer from 1 to 2147483647",
    ),
    (
        Completion,
        {"prompt": "a", "logprobs": -1},
        "logprobs=-1, expected an integer from 0 to 2147483647",
    ),
    (
        Completion,
        {"prompt": "a", "logprobs": 0, "echo": True},
        "echo=true beside logprobs, expected one of the two, as log-probabilities of a prompt are"
        " not kept",
    ),
    (
        Completion,
        {"prompt": ["a", "b"], "stream": True},
        "stream=true beside 2 prompts, expected one prompt",
    ),
    (
        Completion,
        {"prompt": "a", "stream_options": {"include_usage": True}},
        "stream_options beside stream=false, expected stream=true",
    ),
    (
        Completion,
        {"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage=1, expected true or false",
    ),
    (Completion, {"prompt": "\ud800"}, "prompt is not valid Unicode (surrogates not allowed)"),
    (Completion, {"prompt": "a", "stop": ""}, "stop='', expected a text that is not empty"),
    (
        Completion,
        {"prompt": "a", "stop": ["a"] * 5},
        "stop=['a', 'a', 'a', 'a', 'a'], expected a text or at most 4 of them",
    ),
    (Chat, {"messages": []}, "messages=[], expected a list of turns, each an object with a role and"
     " a content"),
    (
        Chat,
        {"messages": [SAID, {"role": "user"}]},
        "messages[1]={'role': 'user'}, expected an object with a role and a content",
    ),
    (
        Chat,
        {"messages": [SAID | {"name": "x"}]},
        "messages[0]={'role': 'user', 'content': 'a', 'name': 'x'}, expected an object with a role"
        " and a content",
    ),
    (
        Chat,
        {"messages": [{"role": "robot", "content": "a"}]},
        "messages[0].role='robot', expected one of system, developer, user, assistant, tool",
    ),
    (
        Chat,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "file:///x"}]}]},
        "messages[0].content[0]={'type': 'image_url', 'url': 'file:///x'}, expected a text, or a"
        " list of parts {'type': 'text', 'text': ...}, as texts alone are read",
    ),
    (
        Chat,
        {"messages": [SAID], "max_tokens": 1, "max_completion_tokens": 2},
        "max_tokens=1 beside max_completion_tokens=2, expected one of the two",
    ),
    (
        Chat,
        {"messages": [SAID], "top_logprobs": 2},
        "top_logprobs=2 beside logprobs=false, expected logprobs=true",
    ),
    (Chat, {"messages": [SAID], "tools": [1]}, "tools=[1] is not implemented, expected []"),
    (Document, {}, "the body has neither text nor messages, expected one of the two"),
    (Document, {"text": ""}, "text='', expected a text that is not empty"),
    (
        Document,
        {"text": "a", "max_cache_tokens": 1},
        "max_cache_tokens=1, expected an integer from 2 to 2147483647",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_body_is_one_sentence(kind, body, sentence):
    assert wrong(kind, body) == sentence


def test_an_unknown_field_is_told_the_known_ones():
    said = wrong(Completion, {"prompt": "a", "presence": 1})
    assert said.startswith("presence=1 is not understood, expected one of context, echo, logprobs")
    assert len(wrong(Completion, {"prompt": "a", "x" * 1000: 1})) < 400


# ---------------------------------------------------------------------------- answers
def test_token_texts_join_to_the_text():
    made = tokenizer(None)
    tokens = made("ab c é")["input_ids"]
    assert "".join(token_texts(tokens[:4], made)) == "ab c "
    assert token_texts(tokens[-2:], made) == ["�", "�"]  # each is half of a letter


def test_logprobs_of_a_completion_say_where_each_text_begins():
    form = Form(False, "m", tokenizer(None))
    tokens = tokenizer(None)("ab c")["input_ids"]
    found = form.logprobs(tokens, [-1.0, -2.0, -3.0], [], offset=5)
    assert found["tokens"] == ["ab", " ", "c"]
    assert found["text_offset"] == [5, 7, 8]
    assert form.logprobs([], [], [])["text_offset"] == []


def test_logprobs_of_a_chat_have_bytes():
    form = Form(True, "m", tokenizer(None))
    tokens = tokenizer(None)("ab")["input_ids"]
    assert form.logprobs(tokens, [-1.0], []) == {
        "content": [{"token": "ab", "logprob": -1.0, "bytes": [97, 98], "top_logprobs": []}]
    }
    half = tokenizer(None)("é")["input_ids"][:1]
    assert form.logprobs(half, [-1.0], [])["content"][0]["bytes"] is None


def test_likeliest_tokens_have_their_texts():
    made = tokenizer(None)
    a, b = made("ab c")["input_ids"][0], made("z")["input_ids"][0]
    top = [{a: -1.0, b: -2.0}]
    assert Form(False, "m", made).logprobs([a], [-1.0], top)["top_logprobs"] == [
        {"ab": -1.0, "z": -2.0}
    ]
    (told,) = Form(True, "m", made).logprobs([a], [-1.0], top)["content"]
    assert [one["token"] for one in told["top_logprobs"]] == ["ab", "z"]


def test_answers_are_ascii_and_one_line():
    assert json.loads(encoded(error("a\nb \ud800", 400))) == {
        "error": {
            "message": "a b \ud800",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    }
    assert event({"a": "\n"}) == b'data: {"a":"\\n"}\n\n'
    assert DONE == b"data: [DONE]\n\n"


# ---------------------------------------------------------------------------- the guard
async def echo(scope, receive, send):
    """Answers with the body that it gets."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def guarded(method="POST", path="/v1/completions", body=b"{}", limits=None, **settings):
    return served.call(Guard(echo, limits or Limits()), method, path, body, **settings)


def test_a_body_passes_whole():
    pieces = (b"a", b"b", b"c")
    parts = [{"type": "http.request", "body": one, "more_body": one != b"c"} for one in pieces]
    assert guarded(messages=parts).body == b"abc"


def test_a_large_body_is_refused():
    limits = Limits(body_bytes=4)
    assert guarded(body=b"1234", limits=limits).status == 200
    told = guarded(body=b"12345", limits=limits, headers={"content-length": "5"})
    assert (told.status, told.sentence) == (413, "the body has 5 bytes, expected at most 4")
    assert told.headers["connection"] == "close"
    endless = guarded(limits=limits, headers={"content-length": "9" * 30})
    assert endless.status == 413
    parts = [{"type": "http.request", "body": b"123", "more_body": True}] * 3
    assert guarded(messages=parts, limits=limits).sentence == (
        "the body has 6 bytes, expected at most 4"
    )


def test_a_slow_body_is_refused():
    parts = [{"type": "http.request", "body": b"1", "more_body": True}]
    told = guarded(messages=parts, limits=Limits(body_seconds=0.01))
    assert (told.status, told.sentence) == (408, "no whole body after 0.01 s, expected it sooner")


def test_a_client_that_goes_away_with_half_a_body_gets_nothing():
    parts = [{"type": "http.request", "body": b"1", "more_body": True}]
    assert guarded(messages=parts, then=0).status == 0


def test_a_key_is_asked_for():
    limits = Limits(api_key="secret")
    for given in ("", "secret", "Bearer secre", "Basic secret", "Bearer sécret"):
        told = guarded(limits=limits, headers={"authorization": given})
        assert (told.status, told.headers["www-authenticate"]) == (401, "Bearer")
        assert told.sentence == (
            "the API key is missing or wrong, expected Authorization: Bearer KEY"
        )
    for scheme in ("Bearer", "bearer"):
        headers = {"authorization": f"{scheme} secret"}
        assert guarded(limits=limits, headers=headers).status == 200
    for path, status in {"/health": 200, "/": 200, "/metrics": 401, "/pool.json": 401}.items():
        assert guarded("GET", path, limits=limits).status == status


def test_other_names_of_a_loopback_server_are_refused():
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"):
        assert guarded(headers={"host": host}).status == 200
    for host in ("example.com", "localhost.example.com", "", "[::2]"):
        told = guarded(headers={"host": host})
        assert told.status == 403
        assert "expected localhost or a loopback address" in told.sentence
    assert guarded(headers={"host": "example.com"}, limits=Limits(loopback=False)).status == 200


def test_a_form_of_another_site_is_refused():
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert guarded(headers={"content-type": kind}).status == 415
    assert guarded(headers={"content-type": "application/json; charset=utf-8"}).status == 200


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"api_key": ""}, "api_key of 0 characters, expected at least one, each of visible ASCII"),
        ({"api_key": "a b"}, "api_key of 3 characters, expected at least one"),
        ({"seconds": 0.0}, "seconds=0.0, expected a number above 0"),
        ({"body_bytes": -1}, "body_bytes=-1, expected a number above 0"),
    ],
)
def test_limits_are_checked(limits, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        Limits(**limits)


def test_other_protocols_pass():
    async def run():
        passed = []

        async def app(scope, receive, send):
            passed.append(scope["type"])

        await Guard(app, Limits())({"type": "lifespan"}, None, None)
        return passed

    assert asyncio.run(run()) == ["lifespan"]
