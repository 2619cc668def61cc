"""A server over HTTP: clients of others' making, bodies that are wrong, clients that go away."""

import asyncio
import dataclasses
import http.client
import json
import re
import signal
import socket
import threading
import time
import urllib.request

import numpy as np
import pytest
import served
import uvicorn

from kvjax import Sampling
from kvjax.cli import serve as cli

openai = pytest.importorskip("openai", reason="needs the openai package")


@pytest.fixture(scope="module")
def engine():
    with served.engine() as made:
        yield made


@pytest.fixture(scope="module")
def app(engine):
    return served.app(engine)


@pytest.fixture(scope="module")
def address(app):
    with served.listening(app) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as made:
        yield made


def idle(engine):
    """Wait until no request is left, and every page has been given back."""

    def quiet():
        stats = engine.stats()
        return not (stats.running or stats.queued or stats.held_pages)

    served.until(quiet)


def expected(engine, prompt=None, count=20, **asked):
    """What the engine answers to Python, greedily; its own tests compare that with `generate`."""
    (answer,) = engine.generate(prompt, max_new_tokens=count, **asked)
    return answer


COUNT = 27


def said(role, content):
    return {"role": role, "content": content}


PROMPT = " ".join(f"w{10 + number * number % 70}" for number in range(COUNT))
GREEDY = {"model": served.NAME, "temperature": 0}


# ---------------------------------------------------------------------------- openai's client
def test_a_completion_is_what_generate_says(client, engine):
    out = expected(engine, PROMPT, 12)
    answer = client.completions.create(prompt=PROMPT, max_tokens=12, logprobs=0, **GREEDY)
    choice = answer.choices[0]
    assert choice.text == out.text
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.tokens) == 12
    assert choice.logprobs.token_logprobs == pytest.approx(out.log_probs, abs=1e-6)
    assert choice.logprobs.top_logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (COUNT, 12)
    assert answer.model == served.NAME


def test_a_stream_has_the_same_text(client):
    whole = client.completions.create(prompt=PROMPT, max_tokens=20, logprobs=0, **GREEDY)
    chunks = list(
        client.completions.create(
            prompt=PROMPT, max_tokens=20, logprobs=0, stream=True,
            stream_options={"include_usage": True}, **GREEDY,
        )
    )  # fmt: skip
    *pieces, last = chunks
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert len(pieces) > 2
    assert (last.choices, last.usage) == ([], whole.usage)
    assert any(len(piece.choices[0].logprobs.tokens) > 1 for piece in pieces)
    for name in ("tokens", "token_logprobs", "text_offset"):
        parts = [value for piece in pieces for value in getattr(piece.choices[0].logprobs, name)]
        assert parts == getattr(whole.choices[0].logprobs, name)


def test_a_chat(client, engine):
    messages = [said("system", "w11 w12"), said("user", "w40 why")]
    out = expected(engine, messages=messages, method="full")
    asked = {"messages": messages, "max_completion_tokens": 20, "logprobs": True, **GREEDY}
    answer = client.chat.completions.create(extra_body={"method": "full"}, **asked)
    choice = answer.choices[0]
    assert choice.message.content == out.text
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(stream=True, extra_body={"method": "full"}, **asked)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[1].choices[0].delta.role is None
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == out.text
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_the_likeliest_tokens_are_told(client, app):
    asked = {"max_tokens": 4, **GREEDY}
    told = client.completions.create(prompt=PROMPT, logprobs=2, **asked).choices[0].logprobs
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 2
        assert top[token] == max(top.values())
        assert top[token] == pytest.approx(value, abs=1e-5)
    messages = [said("user", PROMPT)]
    answer = client.chat.completions.create(
        messages=messages, logprobs=True, top_logprobs=3, **asked
    )
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
    body = {"messages": messages, "logprobs": True, "top_logprobs": 4}
    refused = served.call(app, "POST", "/v1/chat/completions", body)
    assert refused.sentence == "top_logprobs=4, expected an integer from 0 to 3"


def test_a_stop_string_ends_an_answer(client, engine):
    whole = expected(engine, PROMPT).text
    stop = whole.split()[5]
    answer = client.completions.create(prompt=PROMPT, max_tokens=20, stop=[stop], **GREEDY)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_seeds_repeat(client):
    asked = {"model": served.NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 2}
    one, same, other = (
        client.completions.create(seed=seed, **asked).choices[0].text for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_several_prompts_get_a_choice_each(client, engine):
    prompts = [PROMPT, f"{PROMPT} so"]
    answer = client.completions.create(prompt=prompts, max_tokens=6, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1]
    texts = [expected(engine, prompt, 6).text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == texts
    ids = [engine.tokenizer(prompt)["input_ids"] for prompt in prompts]
    again = client.completions.create(prompt=ids, max_tokens=6, **GREEDY)
    assert [choice.text for choice in again.choices] == texts
    assert answer.usage.completion_tokens == 12


def test_equal_prompts_are_samples(client):
    """Each draws for itself, with a seed too; the first one as it would alone."""
    asked = {"model": served.NAME, "max_tokens": 12, "temperature": 2}
    for seed in ({}, {"seed": 3}):
        answer = client.completions.create(prompt=[PROMPT] * 3, **seed, **asked)
        assert len({choice.text for choice in answer.choices}) == 3
    alone = client.completions.create(prompt=PROMPT, seed=3, **asked)
    assert answer.choices[0].text == alone.choices[0].text


def test_an_answer_without_a_limit_ends_with_the_context(app, engine, monkeypatch):
    """What the server would allow by itself is no argument of the client's."""
    shape = engine.model.config
    monkeypatch.setattr(engine.model, "config", dataclasses.replace(shape, max_context=COUNT + 30))
    body = {"messages": [said("user", PROMPT)], "temperature": 0, "method": "full"}
    told = served.call(app, "POST", "/v1/chat/completions", body).json
    read = told["usage"]["prompt_tokens"]
    assert told["usage"]["completion_tokens"] <= COUNT + 30 - read < 64
    asked = served.call(app, "POST", "/v1/chat/completions", body | {"max_tokens": 60})
    assert asked.status == 400
    assert "+ max_tokens=60 exceeds" in asked.sentence


def test_echo_begins_with_the_prompt(client):
    plain = client.completions.create(prompt=PROMPT, max_tokens=6, **GREEDY).choices[0].text
    asked = {"prompt": PROMPT, "max_tokens": 6, "echo": True, **GREEDY}
    assert client.completions.create(**asked).choices[0].text == PROMPT + plain
    pieces = [chunk.choices[0].text for chunk in client.completions.create(stream=True, **asked)]
    assert "".join(pieces) == PROMPT + plain


def test_a_smaller_cache_answers_otherwise(client):
    asked = {"prompt": PROMPT, "max_tokens": 12, **GREEDY}
    small = client.completions.create(extra_body={"max_cache_tokens": 4}, **asked)
    assert small.choices[0].text != client.completions.create(**asked).choices[0].text
    with pytest.raises(openai.BadRequestError, match="max_cache_tokens=30 is 27 entries"):
        client.completions.create(extra_body={"max_cache_tokens": 30}, **asked)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [served.NAME]
    assert client.models.retrieve(served.NAME).methods["key-diff"]["budget"] == 24
    with pytest.raises(openai.NotFoundError, match="model='other', expected 'small'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="model='other', expected 'small'"):
        client.completions.create(model="other", prompt="a")


def test_a_client_that_leaves_a_stream_gives_its_pages_back(client, engine, monkeypatch):
    served.slow_down(engine, monkeypatch)
    before = engine.stats().aborted
    with client.completions.create(prompt=PROMPT, max_tokens=64, stream=True, **GREEDY) as chunks:
        next(iter(chunks))
    idle(engine)
    assert engine.stats().aborted == before + 1


def test_a_client_that_waits_for_a_whole_answer_and_leaves(address, engine, monkeypatch):
    served.slow_down(engine, monkeypatch)
    before = engine.stats().aborted
    body = json.dumps({"prompt": PROMPT, "max_tokens": 64, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as line:
        line.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        served.until(lambda: engine.stats().running)
    idle(engine)
    assert engine.stats().aborted == before + 1


def test_a_repetition_penalty_as_of_generate(app, engine):
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "repetition_penalty": 1.8}
    answer = served.call(app, "POST", "/v1/completions", asked).json
    out = expected(engine, PROMPT, 12, sampling=Sampling(repetition_penalty=1.8))
    assert answer["choices"][0]["text"] == out.text
    wrong = served.call(app, "POST", "/v1/completions", asked | {"repetition_penalty": 0})
    assert wrong.status == 400
    assert wrong.sentence == "repetition_penalty=0, expected a number above 0 and at most 10"


# ---------------------------------------------------------------------------- contexts
def test_a_context_is_read_once_and_asked_often(app, engine):
    made = served.call(app, "POST", "/v1/contexts", {"text": PROMPT, "method": "full"}).json
    assert made["object"] == "context"
    assert (made["method"], made["tokens"], made["warning"]) == ("full", COUNT, None)
    assert served.call(app, "GET", "/v1/contexts").json["data"][0]["id"] == made["id"]
    assert engine.stats().shared_pages == made["pages"]
    asked = {"prompt": "so why", "context": made["id"], "temperature": 0, "max_tokens": 8}
    answer = served.call(app, "POST", "/v1/completions", asked).json
    out = expected(engine, f"{PROMPT} so why", 8, method="full")
    assert answer["choices"][0]["text"] == out.text
    assert answer["usage"]["prompt_tokens"] == COUNT + 2
    path = f"/v1/contexts/{made['id']}"
    assert served.call(app, "DELETE", path).json["deleted"]
    again = served.call(app, "DELETE", path)
    assert (again.status, again.json["error"]["param"]) == (404, "context")
    late = served.call(app, "POST", "/v1/completions", asked)
    assert (late.status, late.sentence) == (404, f"context='{made['id']}', expected one of []")
    assert engine.stats().shared_pages == 0


def test_a_context_that_is_given_up_meanwhile_is_one_sentence(app, engine, monkeypatch):
    name, submit = engine.add_context("w40 w50", method="full"), engine.submit

    def too_late(*prompt, **asked):
        steps = submit(*prompt, **asked)
        engine.drop_context(name)
        return steps

    monkeypatch.setattr(engine, "submit", too_late)
    body = {"prompt": "so", "context": name}
    told = served.call(app, "POST", "/v1/completions", body)
    assert (told.status, told.sentence) == (404, f"context={name!r}, expected one of []")


@pytest.fixture
def slow_contexts(engine, monkeypatch):
    """Two events: a context is being read; it may be read to its end."""
    add, begun, go_on = engine.add_context, threading.Event(), threading.Event()

    def slow(*text, **asked):
        begun.set()
        go_on.wait(60)
        return add(*text, **asked)

    monkeypatch.setattr(engine, "add_context", slow)
    yield begun, go_on
    go_on.set()


CONTEXT = {"text": "w40 w50", "method": "full"}


@pytest.mark.parametrize(
    ("limits", "then", "status"), [({"seconds": 0.2}, None, 504), ({}, 0.2, 499)]
)
def test_a_context_that_nobody_waits_for_is_given_up(engine, slow_contexts, limits, then, status):
    app, read = served.app(engine, **limits), engine.stats().tokens_in
    assert served.call(app, "POST", "/v1/contexts", CONTEXT, then=then).status == status
    slow_contexts[1].set()
    served.until(lambda: engine.stats().tokens_in > read and not engine.contexts())
    assert engine.stats().shared_pages == 0


def test_contexts_count_among_what_is_taken_at_once(engine, slow_contexts):
    app, (begun, go_on) = served.app(engine, requests=1), slow_contexts

    async def both():
        first = asyncio.create_task(served.exchange(app, "POST", "/v1/contexts", CONTEXT))
        await asyncio.to_thread(begun.wait, 60)
        second = await served.exchange(app, "POST", "/v1/contexts", CONTEXT)
        go_on.set()
        return await first, second

    made, refused = asyncio.run(both())
    assert (made.status, refused.status) == (200, 429)
    engine.drop_context(made.json["id"])


def test_a_client_that_does_not_read_holds_nothing(engine, monkeypatch):
    """Its time is up while the server waits to send: the next one is not told to try again."""
    monkeypatch.setattr("kvjax.serve.watched._LAST", 0.1)
    app, statuses = served.app(engine, seconds=1, requests=1), []
    expected(engine, PROMPT, 64)  # all that it needs is compiled before its time runs

    async def deaf(message):
        statuses.append(message.get("status"))
        if statuses == [200, None]:
            await asyncio.sleep(3600)

    body = {"prompt": PROMPT, "max_tokens": 64, "stream": True}
    asyncio.run(served.exchange(app, "POST", "/v1/completions", body, send=deaf))
    after = served.call(app, "POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
    assert after.status != 429
    idle(engine)


def test_a_chat_goes_on_after_a_context(app, engine):
    document = [said("user", "w40 w50 w60")]
    made = served.call(app, "POST", "/v1/contexts", {"messages": document, "method": "full"}).json
    following = [said("user", "so why")]
    asked = {"context": made["id"], "temperature": 0, "max_tokens": 8}
    path = "/v1/chat/completions"
    answer = served.call(app, "POST", path, asked | {"messages": following}).json
    whole = served.call(app, "POST", path, asked | {"messages": document + following}).json
    assert answer["choices"] == whole["choices"]
    alone = served.call(
        app, "POST", path,
        {"messages": document + following, "method": "full", "temperature": 0, "max_tokens": 8},
    ).json  # fmt: skip
    assert answer["choices"] == alone["choices"]
    assert answer["usage"] == alone["usage"]
    served.call(app, "DELETE", f"/v1/contexts/{made['id']}")
    assert engine.stats().shared_pages == 0


# ---------------------------------------------------------------------------- what is refused
def test_a_tokenizer_without_a_template_has_no_chats():
    with served.engine(template=None) as plain:
        body = {"messages": [said("user", "why")]}
        for path in ("/v1/chat/completions", "/v1/contexts"):
            told = served.call(served.app(plain), "POST", path, body)
            assert told.status == 400
            assert told.sentence == "messages, expected a tokenizer with a chat template"


REFUSED = [
    ({"prompt": "a", "max_tokens": 65}, "max_tokens=65, expected an integer from 1 to 64"),
    ({"prompt": "a", "method": "snapkv"}, "method='snapkv', expected one of key-diff, full"),
    ({"prompt": "w10 " * 65}, "prompt of 65 tokens, expected at most 64"),
    ({"prompt": [10**6]}, "token id 1000000 in prompt 0 is outside the vocabulary"),
    ({"prompt": [2**70], "echo": True}, f"token id {2**70} in prompt 0 is outside"),
    (
        {"prompt": "a", "method": "full", "max_cache_tokens": 8},
        "max_cache_tokens=8 with method 'full', expected None",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_the_engine_does_not_take_is_one_sentence(app, body, sentence):
    for stream in (False, True):
        told = served.call(app, "POST", "/v1/completions", body | {"stream": stream})
        assert told.status == 400
        assert told.sentence.startswith(sentence)


def test_other_paths_and_methods_are_one_sentence(app):
    told = served.call(app, "GET", "/v1/nothing")
    assert told.status == 404
    assert told.sentence.startswith("path '/v1/nothing' is not served, expected one of /v1/compl")
    told = served.call(app, "GET", "/v1/completions")
    assert told.status == 405
    assert told.sentence == "method GET of '/v1/completions' is not served, expected another"


VALID = [
    ("/v1/completions", {"prompt": "a", "max_tokens": 2, "stop": ["b"], "seed": 1, "top_p": 0.5}),
    ("/v1/chat/completions", {"messages": [said("user", "a")], "logprobs": True, "n": 1}),
    ("/v1/contexts", {"text": "a", "max_cache_tokens": 8, "method": "key-diff"}),
]
NONSENSE = [
    -1, 2**64, 1e400, -0.5, "\ud800", "", "x" * 999, [], [[]], [None], {}, {"a": {}}, [1, "a"],
    [True], [{"role": "user"}], [{"type": "text"}], "../../etc/passwd",
]  # fmt: skip


def malformed(rng: np.random.Generator) -> tuple[str, bytes]:
    """A path, and a body that it cannot take."""
    path, body = VALID[rng.integers(len(VALID))]
    whole = json.dumps(body).encode()
    kind = rng.integers(5)
    if kind == 0:  # cut short
        return path, whole[: rng.integers(len(whole))]
    if kind == 1:  # bytes
        return path, b"\xff" + rng.bytes(rng.integers(1, 60))
    if kind == 2:  # deep
        return path, b"[" * int(rng.integers(1, 200_000))
    if kind == 3:  # a field that there is not
        name = "".join(chr(c) for c in rng.integers(0xD800, 0xE100, 8))
        return path, json.dumps(body | {name: NONSENSE[rng.integers(len(NONSENSE))]}).encode()
    name = list(body)[rng.integers(len(body))]
    value = NONSENSE[rng.integers(len(NONSENSE))]
    if name in ("prompt", "text", "stop") and (value in ("x" * 999, "../../etc/passwd", [])):
        value = [0.5]  # those would be texts, and no stop strings
    return path, json.dumps(body | {name: value}).encode()


def test_malformed_bodies_are_one_sentence_each(app, engine):
    rng = np.random.default_rng(0)
    sentences = set()
    for _ in range(200):
        path, body = malformed(rng)
        told = served.call(app, "POST", path, body)
        assert 400 <= told.status < 500, (path, body[:200])
        sentences.add(told.sentence)
    assert len(sentences) > 40
    assert engine.stats().queued == 0


def test_too_many_requests_are_told_to_come_back(engine):
    few = served.app(engine, requests=2)

    async def together(stream):
        body = {"prompt": PROMPT, "max_tokens": 8, "stream": stream}
        calls = (served.exchange(few, "POST", "/v1/completions", body) for _ in range(5))
        return await asyncio.gather(*calls)

    for stream in (False, True):  # twice: those that are over are counted no more
        replies = asyncio.run(together(stream))
        assert [reply.status for reply in replies] == [200, 200, 429, 429, 429]
        assert replies[-1].headers["retry-after"] == "1"
        assert replies[-1].sentence == ("2 answers are awaited, and 2 the limit: try again later")
    idle(engine)


def test_what_takes_too_long_is_given_up(engine):
    hurried = served.app(engine, seconds=1e-4)
    body = {"prompt": PROMPT, "max_tokens": 64, "temperature": 0}
    told = served.call(hurried, "POST", "/v1/completions", body)
    assert (told.status, told.sentence) == (504, "no answer after 0.0001 s, which is the limit")
    idle(engine)


# ---------------------------------------------------------------------------- for operators
def metric(page: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics_count(app):
    name = 'kvjax_requests_total{outcome="length",path="/v1/completions"}'

    def page():
        return served.call(app, "GET", "/metrics").body.decode()

    before = page()
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    served.call(app, "POST", "/v1/completions", body)
    after = page()
    for counted, more in {
        name: 1,
        "kvjax_tokens_in_total": COUNT,
        "kvjax_tokens_out_total": 12,
        "kvjax_time_to_first_token_seconds_count": 1,
        "kvjax_inter_token_seconds_count": 11,
        "kvjax_request_seconds_count": 1,
    }.items():
        assert metric(after, counted) - metric(before, counted) == more, counted
    states = {
        state: metric(after, f'kvjax_pages{{state="{state}"}}')
        for state in ("free", "held", "shared")
    }
    assert states["held"] == states["shared"] == 0 < states["free"]
    served.call(app, "GET", "/" + "x" * 50)
    assert 'path="other"' in page()
    assert "xxx" not in page()


def test_the_pool_is_shown(app, address, engine, monkeypatch):
    served.slow_down(engine, monkeypatch)
    with urllib.request.urlopen(f"{address}/") as page:
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert b"http://" not in page.read().replace(b"http://www.w3.org", b"")
    body = {"prompt": PROMPT, "max_tokens": 64, "stream": True, "temperature": 0}
    port = int(address.rpartition(":")[2])
    line = http.client.HTTPConnection("127.0.0.1", port)
    line.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    served.until(lambda: engine.stats().running)
    pool = served.call(app, "GET", "/pool.json").json
    line.getresponse().read()
    line.close()
    assert pool["model"] == served.NAME
    (holder,) = pool["holders"]
    assert (holder["prompt_tokens"], holder["method"]) == (COUNT, "key-diff")
    assert len(holder["pages"]) == engine.model.config.num_layers
    pages = [page for layer in holder["pages"] for page in layer]
    assert len(set(pages)) == len(pages) <= pool["held_pages"]


def test_health_is_of_the_engine():
    with served.engine() as short:
        app = served.app(short)
        assert served.call(app, "GET", "/health").json == {"status": "ok"}
    ended = served.call(app, "GET", "/health")
    assert (ended.status, ended.json) == (503, {"status": "failed"})


def test_a_key_is_needed_where_there_is_one(engine):
    guarded = served.app(engine, api_key="secret")
    with served.listening(guarded) as address:
        for key, wrong in (("secret", False), ("other", True)):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
                if wrong:
                    with pytest.raises(openai.AuthenticationError, match="the API key is missing"):
                        client.models.list()
                else:
                    assert client.models.list().data


def test_a_signal_before_the_first_request_ends_a_server(app, monkeypatch):
    """SIGTERM between the line that says where it is and the server's own handler of it."""
    run, before, late = uvicorn.Server.run, signal.getsignal(signal.SIGTERM), []

    def at_once(server, sockets):
        signal.raise_signal(signal.SIGTERM)
        timer = threading.Timer(30, by_hand, [server])
        timer.start()
        run(server, sockets)
        timer.cancel()

    def by_hand(server):
        late.append(server)
        server.should_exit = True

    monkeypatch.setattr(uvicorn.Server, "run", at_once)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        try:
            cli._serve(app, listener, 1)
        finally:
            signal.signal(signal.SIGTERM, before)
    assert not late


def test_many_clients_of_whom_a_third_leave(address, engine):
    """Who stays is answered, and nothing is left behind."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 16, "stream": True})
    port = int(address.rpartition(":")[2])
    ends: list[str] = []

    def one(number: int) -> None:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        line.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        if number % 3 == 0:
            time.sleep(0.01 * (number % 7))
            line.close()
            return
        ends.append(line.getresponse().read().decode()[-len("data: [DONE]\n\n") :])
        line.close()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == ["data: [DONE]\n\n"] * 16
    idle(engine)
