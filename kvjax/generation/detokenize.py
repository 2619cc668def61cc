"""Turn a growing answer into text: pieces that can no longer change, and stop strings."""

import re
from collections.abc import Sequence
from typing import Any

# What a tokenizer writes for bytes that are not (yet) a whole character.
INCOMPLETE = "\ufffd"
# Tokens whose text may still change are decoded again with every new one. From this many on the
# older ones are left behind, all but those beside which the others are decoded.
WINDOW = 64
# How sentencepiece names a byte of a character that it has no token for.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class RunningText:
    """One row's text, handed out in pieces that later tokens cannot change.

    Args:
      tokenizer: a Hugging Face tokenizer, or None (every piece is "").
      stop: strings that end the row; neither they nor what follows is handed out. One that
        contains a special token, which no text shows, ends the row where that token is drawn.
      context: the prompt's last tokens (`decode_after`).

    Attributes:
      stopped: whether a stop string is complete.
      taken: tokens so far; once stopped those up to the one that completed the stop string.
      cut: characters before the stop string, None until stopped.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], context: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.stopped = False
        self.taken = 0
        self.cut: int | None = None
        self._special = _special_tokens(tokenizer)
        self._unseen = _with_special(stop, self._special)
        # The text is what is left behind, `_left` characters, and then that of `_recent`, which
        # holds the last characters that a stop string may begin in and all that is not given yet.
        self._context = list(context)
        self._recent: list[int] = []
        self._left = self._given = 0
        self._next_look = WINDOW

    def add(self, tokens: Sequence[int]) -> str:
        """Take tokens, return the text that has become certain."""
        if self.tokenizer is None or self.stopped:
            return ""
        before = len(self._recent)
        self._recent += [token for token in tokens if self._counts(token)]
        text = self._text()
        if self._stop_in(text, self._recent) is not None:
            return self._end(before, tokens)
        self.taken += len(tokens)
        certain = text.rstrip(INCOMPLETE)
        # It may end in the beginning of a stop string.
        starts = [stop[:size] for stop in self.stop for size in range(1, len(stop))]
        held = max((len(start) for start in starts if certain.endswith(start)), default=0)
        piece = self._give(certain[: len(certain) - held])
        if len(self._recent) >= self._next_look:
            self._leave_behind(text)
        return piece

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        if self.tokenizer is None or self.stopped:
            return ""
        return self._give(self._text())

    def _counts(self, token: int) -> bool:
        """Whether a token can change the text, or complete a stop string."""
        return bool(self._unseen) or token not in self._special

    def _text(self, count: int | None = None) -> str:
        return decode_after(self._context, self._recent[:count], self.tokenizer)

    def _stop_in(self, text: str, tokens: Sequence[int]) -> int | None:
        """Where in the text of recent tokens the first stop string begins, or None."""
        found = [] if (first := first_stop(text, self.stop)) is None else [first]
        if self._unseen and any(token in self._special for token in tokens):
            seen = decode_after(self._context, tokens, self.tokenizer, special=True)
            for stop, (start, count) in self._unseen.items():
                places = [i for i, token in enumerate(tokens) if token in self._special]
                if stop in seen and len(places) >= count:
                    head = self._text(places[-count])
                    found.append(len(head.removesuffix(start)))
        return min(found, default=None)

    def _end(self, before: int, tokens: Sequence[int]) -> str:
        """The row ends with the first of the new tokens that completes a stop string."""
        del self._recent[before:]
        for token in tokens:
            self.taken += 1
            self._recent += [token] * self._counts(token)
            text = self._text()
            if (cut := self._stop_in(text, self._recent)) is not None:
                self.stopped, self.cut = True, self._left + cut
                break
        return self._give(text[:cut])

    def _give(self, text: str) -> str:
        piece = text[self._given - self._left :]
        self._given = max(self._given, self._left + len(text))
        return piece

    def _leave_behind(self, text: str) -> None:
        """Make older recent tokens the context, at a place where the text falls apart in two."""
        half, longest = len(self._recent) // 2, max(map(len, self.stop), default=0)
        certain = min(self._given - self._left, len(text) - longest)
        for place in range(half, half // 2, -1):
            older, newer = self._recent[:place], self._recent[place:]
            if any(map(self._is_part, (older[-1], newer[0]))):
                continue
            head = self._text(place)
            if not head or head.endswith(INCOMPLETE) or len(head) > certain:
                continue
            if head + decode_after(older, newer, self.tokenizer) == text:
                self._context, self._recent = older, newer
                self._left += len(head)
                break
        self._next_look = max(WINDOW, len(self._recent) + WINDOW // 4)

    def _is_part(self, token: int) -> bool:
        """Whether a token's text may depend on those beside it: a byte, or one that is not seen."""
        name = getattr(self.tokenizer, "convert_ids_to_tokens", lambda ids: [""])([token])[0]
        return token in self._special or bool(_BYTE.fullmatch(name or ""))


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins, or None."""
    found = [index for index in map(text.find, stop) if index >= 0]
    return min(found, default=None)


def decode_after(
    context: Sequence[int], tokens: Sequence[int], tokenizer: Any, *, special: bool = False
) -> str:
    """The text of `tokens` as it continues the text of `context`, so that the two can be joined.

    Decoded alone, an answer would lose the space that it begins with in many tokenizers. Special
    tokens are seen where `special` says so.
    """
    hide = {"skip_special_tokens": not special}
    before = tokenizer.decode(context, **hide) if len(context) else ""
    both = tokenizer.decode([*context, *tokens], **hide) if before else ""
    if before and both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(tokens, **hide)


def cut_at_stop(
    tokens: Sequence[int], tokenizer: Any, stop: Sequence[str], context: Sequence[int] = ()
) -> tuple[str, int]:
    """An answer's text before any stop string, and how many of its tokens lead up to that.

    As if looked at after every token: the first token that completes a stop string decides.
    """
    if stop:
        running = RunningText(tokenizer, stop, context)
        for token in tokens:
            running.add([token])
            if running.stopped:
                tokens = tokens[: running.taken]
                break
        return decode_after(context, tokens, tokenizer)[: running.cut], len(tokens)
    return decode_after(context, tokens, tokenizer), len(tokens)


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that no text shows, by their ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {token: str(one) for token, one in added.items() if one.special}
    ids = getattr(tokenizer, "all_special_ids", [])
    names = tokenizer.convert_ids_to_tokens(ids) if ids else []
    return found | dict(zip(ids, names, strict=True))


def _with_special(stop: Sequence[str], special: dict[int, str]) -> dict[str, tuple[str, int]]:
    """Stop strings that contain special tokens: what stands before them, and how many there are."""
    names = sorted(filter(None, special.values()), key=len, reverse=True)
    found = {}
    for text in stop:
        pieces = re.split("|".join(map(re.escape, names)), text) if names else [text]
        if len(pieces) > 1:
            found[text] = pieces[0], len(pieces) - 1
    return found
