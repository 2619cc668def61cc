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
      context: the prompt's last tokens (`decode_after`).
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], context: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.context = context
        self.stop = stop
        self.stopped = False
        self.count = 0  # tokens up to the one that completed a stop string, or all so far
        self._tokens: list[int] = []
        self._given = 0

    def add(self, tokens: Sequence[int]) -> str:
        """Take tokens, return the text that has become certain."""
        if self.tokenizer is None or self.stopped:
            return ""
        self._tokens += tokens
        self.count = len(self._tokens)
        text = self._decode()
        self.stopped = first_stop(text, self.stop) is not None
        if self.stopped:
            cut, self.count = cut_at_stop(self._tokens, self.tokenizer, self.stop, self.context)
            return self._give(cut)
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
        return decode_after(self.context, self._tokens, self.tokenizer)

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins, or None."""
    found = [index for index in map(text.find, stop) if index >= 0]
    return min(found, default=None)


def decode_after(context: Sequence[int], tokens: Sequence[int], tokenizer: Any) -> str:
    """The text of `tokens` as it continues the text of `context`, so that the two can be joined.

    Decoded alone, an answer would lose the space that it begins with in many tokenizers.
    """
    before = tokenizer.decode(context, skip_special_tokens=True) if len(context) else ""
    both = tokenizer.decode([*context, *tokens], skip_special_tokens=True) if before else ""
    if before and both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def cut_at_stop(
    tokens: Sequence[int], tokenizer: Any, stop: Sequence[str], context: Sequence[int] = ()
) -> tuple[str, int]:
    """An answer's text before any stop string, and how many of its tokens lead up to that.

    As if looked at after every token: the first token that completes a stop string decides.
    """

    def part(size: int) -> str:
        return decode_after(context, tokens[:size], tokenizer)

    count = len(tokens)
    text = part(count)
    if first_stop(text, stop) is not None:
        count = next(
            size for size in range(1, count + 1) if first_stop(part(size), stop) is not None
        )
        text = part(count)
    return text[: first_stop(text, stop)], count
