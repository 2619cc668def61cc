"""The engine over HTTP: OpenAI's endpoints, contexts, and what operators read.

POST /v1/completions, /v1/chat/completions    GET /v1/models
POST, GET /v1/contexts, DELETE /v1/contexts/ID
GET /health, /metrics, /pool.json, and / for the live page
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvjax.compression.scorers import SCORERS
from kvjax.config import CompressionConfig
from kvjax.inputs.chat import check_template
from kvjax.serve.answering import Served, answer, as_asked
from kvjax.serve.answers import encoded, error
from kvjax.serve.engine import Engine
from kvjax.serve.guard import Guard, Limits, Refused
from kvjax.serve.metrics import Metrics
from kvjax.serve.protocol import Chat, Completion, Document, complaint, shortened
from kvjax.serve.stats import Context
from kvjax.serve.watched import Gone, watched

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": Chat,
    "/v1/contexts": Document,
}
# Seconds that a health check waits for the engine.
_PATIENCE = 1.0
_PATHS = (*_BODIES, "/v1/models", "/health", "/metrics", "/pool.json", "/")


def make_app(
    engine: Engine,
    tokenizer: Any,
    name: str,
    methods: Mapping[str, CompressionConfig],
    limits: Limits,
) -> Guard:
    """The ASGI application of a server.

    Args:
      engine: answers; whoever made it closes it.
      tokenizer: the engine's own.
      name: of the model, as clients give it.
      methods: the engine's methods by name.
      limits: what clients may do.
    """
    served = Served(
        engine, tokenizer, name, methods, limits, Metrics(engine), int(time.time()),
        ThreadPoolExecutor(1, thread_name_prefix="kvjax-read"),
        ThreadPoolExecutor(1, thread_name_prefix="kvjax-context"),
    )  # fmt: skip
    # Pages of FastAPI's own would load scripts from elsewhere.
    app = FastAPI(title="kvjax", docs_url=None, redoc_url=None)
    _add_answers(app, served)
    _add_contexts(app, served)
    _add_pages(app, served)
    _add_errors(app, served)
    return Guard(app, limits)


def _json(content: Any, status: int = 200) -> Response:
    return Response(encoded(content), status, media_type="application/json")


# ---------------------------------------------------------------------------- answers
def _add_answers(app: FastAPI, served: Served) -> None:
    described: dict[str, Any] = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "kvjax",
        "methods": {
            name: {"budget": config.budget, "question": SCORERS[config.scorer].question}
            for name, config in served.methods.items()
        },
    }

    @app.post("/v1/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        return await answer(served, asked, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: Chat, request: Request) -> Response:
        return await answer(served, asked, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [described]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != served.name:
            raise Refused(404, f"model={shortened(name)}, expected {served.name!r}")
        return _json(described)


# ---------------------------------------------------------------------------- contexts
def _add_contexts(app: FastAPI, served: Served) -> None:
    def told(context: Context) -> dict[str, Any]:
        return {"object": "context"} | dataclasses.asdict(context)

    async def held() -> tuple[Context, ...]:
        return await asyncio.to_thread(served.engine.contexts)

    @app.post("/v1/contexts")
    async def add(asked: Document, request: Request) -> Response:
        served.check_room(1)
        until = asyncio.get_running_loop().time() + served.limits.seconds
        add = partial(
            served.engine.add_context,
            asked.text,
            messages=asked.messages,
            method=asked.method,
            budget=asked.max_cache_tokens,
        )
        try:
            if asked.messages is not None:
                check_template(served.tokenizer, "messages")
            with served.metrics.opened(1):
                name = await _read(served, add, request, until)
        except ValueError as wrong:
            raise as_asked(wrong) from None
        made = next((each for each in await held() if each.id == name), None)
        if made is None:  # another client has given it up, of all ids that it saw
            raise Refused(409, f"context={name!r} was given up, expected it to be held")
        served.metrics.ended("/v1/contexts", "read")
        return _json(told(made) | {"warning": _warning(served.methods[made.method])})

    @app.get("/v1/contexts")
    async def contexts() -> Response:
        return _json({"object": "list", "data": [told(each) for each in await held()]})

    @app.delete("/v1/contexts/{context}")
    async def drop(context: str) -> Response:
        if context not in {each.id for each in await held()}:
            raise Refused(404, f"context={shortened(context)} is not held, expected one that is")
        try:
            await asyncio.to_thread(served.engine.drop_context, context)
        except ValueError as wrong:  # it is in use
            raise Refused(409, str(wrong)) from None
        return _json({"id": context, "object": "context", "deleted": True})


async def _read(served: Served, add: Callable[[], str], request: Request, until: float) -> str:
    """The id of a context; it is given up where nobody waits for it any more.

    Raises:
      Gone, TimeoutError: as `watched`.
      ValueError: what the engine does not take.
    """
    reading = served.contexts.submit(add)

    async def read() -> str:
        return await asyncio.wrap_future(reading)

    def drop(ended: Future[str]) -> None:
        if not ended.cancelled() and ended.exception() is None:
            with contextlib.suppress(ValueError, RuntimeError):  # somebody asks it, or all is over
                served.engine.drop_context(ended.result())

    try:
        return await watched(read(), request.receive, until)
    except (Gone, TimeoutError):
        reading.add_done_callback(drop)
        raise


def _warning(config: CompressionConfig) -> str | None:
    """What a context's method may lack."""
    if not SCORERS[config.scorer].question:
        return None
    return (
        f"method {config.method!r} judges entries by what follows them, which a context does not"
        " have: expected one whose question may come later, such as kvzip or key-diff"
    )


# ---------------------------------------------------------------------------- for operators
def _add_pages(app: FastAPI, served: Served) -> None:
    page = (files("kvjax.serve") / "live" / "live.html").read_bytes()

    @app.get("/health")
    async def health() -> Response:
        try:
            # An engine that reads a long prompt answers late, and is well.
            async with asyncio.timeout(_PATIENCE):
                await asyncio.to_thread(served.engine.stats)
        except TimeoutError:
            pass
        except RuntimeError:
            return _json({"status": "failed"}, 503)
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(await asyncio.to_thread(served.metrics.page), media_type=kind)

    @app.get("/pool.json")
    async def pool() -> Response:
        stats = await asyncio.to_thread(served.engine.stats, pages=True)
        contexts = [
            dataclasses.asdict(each) for each in await asyncio.to_thread(served.engine.contexts)
        ]
        named = {"model": served.name, "now": time.time(), "created": served.created}
        return _json(named | dataclasses.asdict(stats) | {"contexts": contexts})

    @app.get("/")
    async def live() -> Response:
        # Nothing is loaded from elsewhere, whatever the page would ask for.
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
        policy += " connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
        return Response(page, media_type="text/html", headers={"content-security-policy": policy})


# ---------------------------------------------------------------------------- errors
def _add_errors(app: FastAPI, served: Served) -> None:
    """Whatever goes wrong is one sentence in OpenAI's form."""

    def told(request: Request, outcome: str, message: str, status: int, name=None) -> Response:
        served.metrics.ended(_labelled(request.url.path), outcome)
        headers = {"retry-after": "1"} if status == 429 else None
        body = encoded(error(message, status, name))
        return Response(body, status, headers, media_type="application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, wrong: RequestValidationError) -> Response:
        message, name = complaint(wrong.errors()[0], _BODIES[request.url.path])
        return told(request, "refused", message, 400, name)

    @app.exception_handler(Refused)
    async def refused(request: Request, wrong: Refused) -> Response:
        name = str(wrong).partition("=")[0]
        return told(
            request, "refused", str(wrong), wrong.status, name if name.isidentifier() else None
        )

    @app.exception_handler(HTTPException)
    async def other(request: Request, wrong: HTTPException) -> Response:
        path, method = request.url.path, request.method
        message = f"the body cannot be read ({wrong.detail}), expected a JSON object"
        if wrong.status_code == 404:
            message = f"path {path[:60]!r} is not served, expected one of {', '.join(_PATHS)}"
        elif wrong.status_code == 405:
            message = f"method {method} of {path[:60]!r} is not served, expected another"
        return told(request, "refused", message, wrong.status_code)

    @app.exception_handler(TimeoutError)
    async def late(request: Request, _: TimeoutError) -> Response:
        seconds = served.limits.seconds
        return told(request, "late", f"no answer after {seconds:g} s, which is the limit", 504)

    @app.exception_handler(Gone)
    async def gone(request: Request, _: Gone) -> Response:
        return told(request, "gone", "the client has gone away", 499)

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> Response:
        return told(request, "failed", "the server failed on this request", 500)


def _labelled(path: str) -> str:
    """A path as a label of metrics: few of them, whatever clients ask for."""
    return path if path in _PATHS else "other"
