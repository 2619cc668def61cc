"""What a request has to pass before it is read: host, key, size and time.

An ASGI application around another one. Whatever it refuses is answered in OpenAI's form of an
error, and nothing of it reaches the server's own code.
"""

import asyncio
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from kvjax.serve.answers import encoded, error

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Answered without a key: what orchestrators ask, and a page that holds nothing by itself.
_OPEN = "/health", "/"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server lets clients do.

    Attributes:
      api_key: that `Authorization: Bearer` has to give; None for no key.
      loopback: whether only names of this machine are answered to, so that no page of another site
        reaches the server under a name of its own (DNS rebinding).
      body_bytes: most bytes of a request's body.
      body_seconds: until a body has to be here.
      seconds: from a request's body to the end of its answer, waiting included.
      requests: answered or waiting at once.

    Raises:
      ValueError: an empty key, or one that no header can give; a number that is not above 0.
    """

    api_key: str | None = None
    loopback: bool = True
    body_bytes: int = 4 * 2**20
    body_seconds: int | float = 30
    seconds: int | float = 600
    requests: int = 256

    def __post_init__(self):
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                f"api_key of {len(key)} characters, expected at least one, each of visible ASCII"
            )
        for name in ("body_bytes", "body_seconds", "seconds", "requests"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected a number above 0")


class Refused(Exception):
    """A request that is not answered: the status, and one sentence."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Guard:
    """Checks requests before `app` gets them, their bodies already whole."""

    def __init__(self, app: Application, limits: Limits):
        self.app = app
        self.limits = limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            body = await self._body(headers, receive)
        except Refused as refused:
            await _answer(send, refused)
            return
        if body is not None:
            await self.app(scope, _replayed(body, receive), send)

    def _check(self, scope: Mapping[str, Any], headers: Mapping[bytes, str]) -> None:
        host = _hostname(headers.get(b"host", ""))
        if self.limits.loopback and not is_local(host):
            raise Refused(
                403, f"Host {host[:60]!r}, expected localhost or a loopback address of this server"
            )
        if scope["path"] not in _OPEN and not self._has_key(headers.get(b"authorization", "")):
            raise Refused(
                401, "the API key is missing or wrong, expected Authorization: Bearer KEY"
            )
        kind = headers.get(b"content-type", "").split(";")[0].strip().lower()
        # A page of another site can send no JSON without asking first, which is not granted.
        if scope["method"] == "POST" and kind != "application/json":
            raise Refused(415, f"Content-Type {kind[:60]!r}, expected application/json")

    def _has_key(self, given: str) -> bool:
        key = self.limits.api_key
        scheme, _, value = given.partition(" ")
        if key is None:
            return True
        # In constant time: how long a comparison takes says nothing about the key.
        same = secrets.compare_digest(value.strip().encode("latin-1"), key.encode())
        return same and scheme.lower() == "bearer"

    async def _body(self, headers: Mapping[bytes, str], receive: Receive) -> bytes | None:
        """The whole body; None where the client has gone."""
        most, told = self.limits.body_bytes, headers.get(b"content-length", "0")
        if told.isdecimal() and (len(told) > 18 or int(told) > most):
            raise Refused(413, f"the body has {told[:18]} bytes, expected at most {most}")
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > most:
                        raise Refused(413, f"the body has {size} bytes, expected at most {most}")
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            seconds = self.limits.body_seconds
            raise Refused(408, f"no whole body after {seconds:g} s, expected it sooner") from None


def is_local(name: str) -> bool:
    """Whether a host's name is this machine's own, wherever it is asked: localhost, 127.0.0.1."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def _hostname(host: str) -> str:
    """A Host header's name without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read already, and then whatever comes."""
    pending = [body]

    async def again() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return again


async def _answer(send: Send, refused: Refused) -> None:
    body = encoded(error(str(refused), refused.status))
    # What is left of a body that was refused is not read.
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
