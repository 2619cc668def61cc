"""Servers of a small model in this process: called as an ASGI application, or on a port."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kvjax
from kvjax.models.checkpoints.weights import load_decoder
from kvjax.serve.engine import Engine
from kvjax.serve.guard import Limits
from kvjax.serve.http import make_app

WEIGHTS = Path(__file__).parent / "fixtures" / "hf" / "llama2-gqa"
NAME = "small"
METHODS = {
    "key-diff": kvjax.CompressionConfig.named("key-diff", budget=24),
    "full": kvjax.CompressionConfig.named("full"),
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' end ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def words(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of the small model's 80 tokens, a word each: the last 70 are w10 to w79."""
    names = ["<unk>", "<s>", "</s>", "system", "user", "assistant", "end", "why", "so", "and"]
    names += [f"w{number}" for number in range(10, 80)]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    found.chat_template = template
    return found


@contextmanager
def engine(template: str | None = TEMPLATE, **settings: Any) -> Iterator[Engine]:
    """A model of random weights and a tokenizer of words; programs are compiled when needed."""
    model = load_decoder(WEIGHTS, progress=False)
    settings = {
        "cache_bytes": 2**20, "rows": 4, "top_logprobs": 3,
        "buckets": (64,), "question_buckets": (32,), "max_new_tokens": 64,
        "decode_steps": 8, "warm_up": False,
    } | settings  # fmt: skip
    with Engine(model, words(template), METHODS, **settings) as made:
        yield made


def app(made: Engine, **limits: Any) -> Any:
    """The application around an engine."""
    return make_app(made, made.tokenizer, NAME, METHODS, Limits(**limits))


# ---------------------------------------------------------------------------- without a network
@dataclass(frozen=True)
class Reply:
    """What an application answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def sentence(self) -> str:
        """The message of an error, which is one line."""
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        assert isinstance(found["message"], str)
        assert found["message"].strip()
        assert "\n" not in found["message"]
        return found["message"]


def call(made: Any, method: str, path: str, body: Any = None, **settings: Any) -> Reply:
    """One request; arguments as of `exchange`."""
    return asyncio.run(exchange(made, method, path, body, **settings))


async def exchange(
    made: Any,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    messages: Sequence[dict[str, Any]] | None = None,
    then: float | None = None,
    send: Callable[[Any], Awaitable[None]] | None = None,
) -> Reply:
    """One request.

    Args:
      body: bytes, or what becomes JSON.
      headers: in place of, or beside, those of a client that does as it should.
      messages: of ASGI in place of the body.
      then: seconds after these until the client goes away; None for a client that stays.
      send: in place of a client that takes whatever comes.
    """
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"host": "localhost:8000", "content-type": "application/json"} | (headers or {})
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "scheme": "http", "client": ("127.0.0.1", 1),
        "server": ("localhost", 8000),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
    }  # fmt: skip
    coming = [{"type": "http.request", "body": data}] if messages is None else list(messages)
    sent: list[Any] = []

    async def receive() -> Any:
        if coming:
            return coming.pop(0)
        await asyncio.sleep(3600 if then is None else then)
        return {"type": "http.disconnect"}

    async def take(message: Any) -> None:
        sent.append(message)

    await made(scope, receive, send or take)
    if not sent:
        return Reply(0, {}, b"")
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], told, b"".join(message["body"] for message in sent[1:]))


# ---------------------------------------------------------------------------- on a port
@contextmanager
def listening(made: Any) -> Iterator[str]:
    """The address of a server in a thread of its own, which takes any free port."""
    config = uvicorn.Config(
        made, port=0, log_level="critical", access_log=False, lifespan="off", ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def slow_down(made: Engine, monkeypatch: Any, seconds: float = 0.1) -> None:
    """Let every dispatch take so long at least: answers last until a test has done its part."""
    device = made._loop._device
    decode = device.decode
    monkeypatch.setattr(device, "decode", lambda: (time.sleep(seconds), decode())[1])


def until(true: Any, seconds: float = 60) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
