"""Text of a growing answer: pieces that are certain, and stop strings."""

from collections.abc import Sequence
from typing import Any

# What a tokenizer writes for bytes that are not (yet) a whole character.
INCOMPLETE = "\ufffd"


class RunningText:
    """One row's text, handed out in pieces that later tokens cannot change.

    Args:
      tokenizer: a Hugging Face tokenizer, or None (every piece is "").
      stop: strings that end the row; neither they nor what follows is handed out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokenizer = tokenizer
        self.stop = stop
        self.stopped = False
        self._tokens: list[int] = []
        self._given = 0

    def add(self, tokens: Sequence[int]) -> str:
        """Take tokens, return the text that has become certain."""
        if self.tokenizer is None or self.stopped:
            return ""
        self._tokens += tokens
        text = self._decode()
        self.stopped = first_stop(text, self.stop) is not None
        if self.stopped:
            return self._give(cut_at_stop(self._tokens, self.tokenizer, self.stop)[0])
        text = text.rstrip(INCOMPLETE)
        # It may end in the beginning of a stop string.
        starts = [stop[:size] for stop in self.stop for size in range(1, len(stop))]
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        return self._give(text[: len(text) - held])

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        if self.tokenizer is None or self.stopped:
            return ""
        return self._give(self._decode())

    def _decode(self) -> str:
        return self.tokenizer.decode(self._tokens, skip_special_tokens=True)

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins, or None."""
    found = [index for index in map(text.find, stop) if index >= 0]
    return min(found, default=None)


def cut_at_stop(tokens: Sequence[int], tokenizer: Any, stop: Sequence[str]) -> tuple[str, int]:
    """An answer's text before any stop string, and how many of its tokens lead up to that.

    As if looked at after every token: the first token that completes a stop string decides.
    """

    def part(size: int) -> str:
        return tokenizer.decode(tokens[:size], skip_special_tokens=True)

    count = len(tokens)
    text = part(count)
    if first_stop(text, stop) is not None:
        count = next(
            size for size in range(1, count + 1) if first_stop(part(size), stop) is not None
        )
        text = part(count)
    return text[: first_stop(text, stop)], count
