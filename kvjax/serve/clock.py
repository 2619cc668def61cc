"""How a device spends its time: reading prompts, and decoding so many rows at once.

A device does one thing after the other, and nothing here waits for it: a dispatch began when it was
queued or when the one before it was done, whichever is later, and is done when its tokens arrive.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """Dispatches that began with the same number of rows.

    Attributes:
      rows: that had tokens left to draw.
      dispatches: how many.
      tokens: that were drawn in them.
      seconds: that they took, what empties tails included.
    """

    rows: int
    dispatches: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Spent:
    """The device's time so far.

    Attributes:
      prompts: that were read and admitted; questions about contexts count.
      reading: seconds of that, first tokens included.
      decoding: of all other tokens, by rows, fewest first.
    """

    prompts: int
    reading: float
    decoding: tuple[Decoding, ...]


class Clock:
    """Adds up when dispatches were done, in the order in which they were queued."""

    def __init__(self) -> None:
        self._done = 0.0
        self._prompts, self._reading = 0, 0.0
        self._decoding: dict[int, Decoding] = {}

    def note_prompt(self, queued: float, done: float) -> None:
        """A prompt was read; seconds of `time.perf_counter`."""
        self._prompts += 1
        self._reading += self._took(queued, done)

    def note_tokens(self, queued: float, done: float, rows: int, tokens: int) -> None:
        """So many rows have drawn so many tokens."""
        before = self._decoding.get(rows, Decoding(rows, 0, 0, 0.0))
        self._decoding[rows] = Decoding(
            rows=rows,
            dispatches=before.dispatches + 1,
            tokens=before.tokens + tokens,
            seconds=before.seconds + self._took(queued, done),
        )

    def _took(self, queued: float, done: float) -> float:
        began, self._done = max(queued, self._done), done
        return done - began

    def spent(self) -> Spent:
        """The sums up to now."""
        decoding = tuple(self._decoding[rows] for rows in sorted(self._decoding))
        return Spent(self._prompts, self._reading, decoding)
