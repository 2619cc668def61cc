"""What a server says of itself."""

from dataclasses import dataclass

from kvjax.serve.clock import Spent


@dataclass(frozen=True)
class Holder:
    """A row that is answered now.

    Attributes:
      row: its place.
      request: number of the request.
      method: its name.
      prompt_tokens, drawn: tokens before the answer, and of it.
      pages: of each layer, in order; None where they were not asked for.
    """

    row: int
    request: int
    method: str
    prompt_tokens: int
    drawn: int
    pages: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Context:
    """A text that was compressed once, for many requests.

    Attributes:
      id: of it.
      method: its name.
      tokens: of the text.
      pages: promised to it.
      bytes: of these pages.
      users: requests that hold its pages or wait for them.
      used: when it was made or asked last, in seconds since 1970.
      saved: whether the server has it on disk too; in no pages then once others took its place.
    """

    id: str
    method: str
    tokens: int
    pages: int
    bytes: int
    users: int
    used: float
    saved: bool = False


@dataclass
class Counts:
    """What has happened so far; fields as of `Stats`."""

    evictions: int = 0
    forced_evictions: int = 0
    swaps: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    finished: int = 0
    aborted: int = 0
    contexts_dropped: int = 0


@dataclass(frozen=True)
class Stats:
    """A server at one moment.

    Attributes:
      queued, running: requests that wait, and that have a row.
      rows: answered at once at most.
      pages: of the pool; `free_pages` are promised to nobody, `held_pages` to rows, and
        `shared_pages` to contexts.
      page_slots: slots of a page.
      evictions: compressions while decoding, one a row.
      forced_evictions: those of them by which a row keeps less than its rule says, as pages ran
        short.
      swaps: rows taken out of the pool.
      tokens_in, tokens_out: of prompts that were read, and of answers that were handed out.
      finished, aborted: requests answered to their end, and given up by their clients.
      contexts_dropped: contexts that others took the place of (`context_bytes`).
      holders: of the rows.
      spent: seconds of the device.
    """

    queued: int
    running: int
    rows: int
    pages: int
    free_pages: int
    held_pages: int
    shared_pages: int
    page_slots: int
    evictions: int
    forced_evictions: int
    swaps: int
    tokens_in: int
    tokens_out: int
    finished: int
    aborted: int
    contexts_dropped: int
    holders: tuple[Holder, ...]
    spent: Spent
