"""Work for a client that may go away, or for which time runs out.

What a client no longer waits for is cancelled, and its pages go to others.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import ExitStack
from typing import Any

from starlette.responses import Response

from kvjax.serve.guard import Message, Receive, Send

# Seconds in which a client has to take the end of a stream.
_LAST = 5.0


class Gone(Exception):
    """The client has gone away."""


async def watched[Result](
    work: Coroutine[Any, Any, Result], receive: Receive, until: float
) -> Result:
    """What `work` comes to; it is cancelled where it takes too long or nobody waits for it.

    Args:
      receive: of the request, whose body was read.
      until: the loop's time at which the time is up.

    Raises:
      Gone: the client has gone away.
      TimeoutError: the time is up.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        async with asyncio.timeout_at(until):
            await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Gone
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


class Streamed(Response):
    """Server-sent events as they come.

    Args:
      first: the first event, which was waited for already.
      events: those after it, each whole; closed at the end, whatever the end.
      until: the loop's time at which the time is up.
      ended: told the outcome where it is not the answer's own: gone, late or failed.
      last: the event after which a stream stops whose time is up or that fails.
      held: closed at the end too.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes],
        until: float,
        ended: Callable[[str], None],
        last: Callable[[str], bytes],
        held: ExitStack,
    ):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events, self._until = first, events, until
        self._ended, self._last, self._held = ended, last, held

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:  # type: ignore[override]
        """Send the events; a client that goes away closes them."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        why, failure = None, None
        try:
            await send(start)
            await watched(self._send(send), receive, self._until)
        except Gone:
            self._ended("gone")
            return
        except TimeoutError:
            self._ended("late")
            why = "the time for this request is up"
        except Exception as error:
            self._ended("failed")
            why, failure = "the server failed on this request", error
        finally:  # before anything more is sent: a client that does not read holds nothing
            with self._held:
                await self._events.aclose()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST):
                if why is not None:
                    await _body(send, self._last(why))
                await _body(send, b"", more=False)
        if failure is not None:
            raise failure

    async def _send(self, send: Send) -> None:
        await _body(send, self._first)
        async for event in self._events:
            await _body(send, event)


async def _body(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
