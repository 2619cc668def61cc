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
        found = first_stop(text, self.stop)
        self.stopped = found is not None
        if self.stopped:
            return self._give(text[:found])
        safe = len(text.rstrip(INCOMPLETE))
        for stop in self.stop:  # the text may end in the beginning of a stop string
            held = [size for size in range(1, len(stop)) if text[:safe].endswith(stop[:size])]
            safe -= max(held, default=0)
        return self._give(text[:safe])

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
    """An answer's text before any stop string, and how many of its tokens lead up to that."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    found = first_stop(text, stop)
    if found is None:
        return text, len(tokens)

    def stops(count: int) -> bool:
        part = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        return first_stop(part, stop) is not None

    return text[:found], next(count for count in range(1, len(tokens) + 1) if stops(count))
