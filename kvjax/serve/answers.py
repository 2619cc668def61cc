"""What a server answers: OpenAI's objects, whole or in chunks.

Shapes follow OpenAI's API reference.
"""

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from kvjax.generation.detokenize import INCOMPLETE, decode_after

DONE = b"data: [DONE]\n\n"


def encoded(content: Any) -> bytes:
    """JSON in ASCII: what a client sent may be no valid Unicode, and is quoted in errors."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + encoded(content) + b"\n\n"


def error(message: str, status: int, argument: str | None = None) -> dict[str, Any]:
    """An error's body, its message in one line."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = {401: "invalid_api_key", 404: "not_found", 429: "queue_full"}.get(status)
    line = " ".join(message.split())
    return {"error": {"message": line, "type": kind, "param": argument, "code": told}}


def usage(read: int, drawn: int) -> dict[str, int]:
    """Tokens of a prompt and of its answer."""
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


def token_texts(tokens: Sequence[int], tokenizer: Any, before: Sequence[int] = ()) -> list[str]:
    """The text of each token as it follows the one before; special tokens are shown."""
    pairs = zip(_last(tokens, before), tokens, strict=True)
    return [decode_after(last, [token], tokenizer, special=True) for last, token in pairs]


def _last(tokens: Sequence[int], before: Sequence[int]) -> list[Sequence[int]]:
    """The token before each of these, or none."""
    return [before[-1:], *([token] for token in tokens)][: len(tokens)]


@dataclass(frozen=True)
class Form:
    """One answer's object: of a chat, or of a completion.

    Attributes:
      chat: which of the two.
      model: the served model's name.
      tokenizer: makes texts of single tokens, for log-probabilities.
    """

    chat: bool
    model: str
    tokenizer: Any
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Iterable[dict[str, Any]], counted: dict[str, int]) -> dict[str, Any]:
        """The answer as one object."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, list(choices)) | {"usage": counted}

    def choice(
        self, index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """One prompt's answer in an answer that is whole."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def chunk(
        self, text: str, finish: str | None, logprobs: dict[str, Any] | None, first: bool
    ) -> dict[str, Any]:
        """A piece of an answer; a chat's first one says whose turn it is."""
        role = {"role": "assistant"} if first else {}
        said = {"delta": role | {"content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}
        return self._object(self._chunk, [choice])

    def count(self, counted: dict[str, int]) -> dict[str, Any]:
        """The chunk that counts tokens, after all others."""
        return self._object(self._chunk, []) | {"usage": counted}

    def logprobs(
        self,
        tokens: Sequence[int],
        log_probs: Sequence[float],
        top: Sequence[Mapping[int, float]],
        before: Sequence[int] = (),
        offset: int = 0,
    ) -> dict[str, Any]:
        """Log-probabilities of drawn tokens and of the likeliest ones, with the text of each.

        Args:
          tokens, log_probs: one of each.
          top: the likeliest tokens at each place, with their log-probabilities; () for none.
          before: tokens of the answer that came before.
          offset: characters of these.
        """
        texts = token_texts(tokens, self.tokenizer, before)
        others = [
            [(token_texts([token], self.tokenizer, last)[0], each[token]) for token in each]
            for each, last in zip(top, _last(tokens, before), strict=False)
        ]
        if self.chat:
            told = [_token(text, value) for text, value in zip(texts, log_probs, strict=True)]
            for token, likeliest in zip(told, others, strict=False):
                token["top_logprobs"] = [_plain_token(*pair) for pair in likeliest]
            return {"content": told}
        return {
            "tokens": texts,
            "token_logprobs": list(log_probs),
            # Of tokens with the same text, parts of characters, the likeliest one is told.
            "top_logprobs": [dict(each[::-1]) for each in others] if any(others) else None,
            "text_offset": [*accumulate(map(len, texts), initial=offset)][:-1],
        }

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        named = ("chatcmpl-" if self.chat else "cmpl-") + self.id
        return {
            "id": named,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _token(text: str, log_prob: float) -> dict[str, Any]:
    return _plain_token(text, log_prob) | {"top_logprobs": []}


def _plain_token(text: str, log_prob: float) -> dict[str, Any]:
    """A token of a chat; a part of a character has no bytes that could be told."""
    told = None if INCOMPLETE in text else list(text.encode())
    return {"token": text, "logprob": log_prob, "bytes": told}
