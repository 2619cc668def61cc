"""Contexts of a server: what is kept of each, and which ones leave where they are to take less."""

import secrets
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kvjax.cache.history import History
from kvjax.serve.pages import Lease


class Kept(NamedTuple):
    """A context: what the device has of it, and what is said of it.

    Attributes:
      lease: its pages; None until it is read.
      method: name of it.
      history: what it has read.
      tokens: how many these are.
      pages: promised to it.
      rope_length: as of `kvjax.Cache`.
      used: when it was made or asked last, in seconds since 1970.
    """

    lease: Lease | None
    method: str
    history: tuple[History, ...]
    tokens: int
    pages: int
    rope_length: int
    used: float = 0.0


def new_id() -> str:
    """An id that no context has, whatever lies on disk."""
    return f"context-{secrets.token_hex(8)}"


class InUse(ValueError):
    """What cannot be had now, but once requests have been answered."""


def leaving(
    contexts: Mapping[str, Kept], pages: int, page_bytes: int, most: int | None,
    users: Callable[[str], int],
) -> list[str]:  # fmt: skip
    """Contexts that are to be dropped before another one comes, least recently used first.

    Args:
      contexts: by id, least recently used first.
      pages: of the one that comes.
      page_bytes: bytes of a page.
      most: bytes of all contexts together, or None for any number.
      users: requests that ask a context, which then stays.

    Raises:
      ValueError: one that can never fit; `InUse` where too many are being asked.
    """
    if most is None:
        return []
    if pages * page_bytes > most:
        raise ValueError(
            f"the context needs {pages * page_bytes} bytes, expected at most {most} (context_bytes)"
        )
    over = (sum(kept.pages for kept in contexts.values()) + pages) * page_bytes - most
    found: list[str] = []
    for name, kept in contexts.items():
        if over > 0 and not users(name):
            found.append(name)
            over -= kept.pages * page_bytes
    if over > 0:
        raise InUse(
            f"the context needs {over} bytes more than those leave that are being asked, expected"
            f" room for it within {most} (context_bytes)"
        )
    return found
