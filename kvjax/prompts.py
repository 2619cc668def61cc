"""From what users hand over (text, token ids, padded arrays) to one right-padded batch."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

Row = Sequence[int | np.integer] | np.ndarray
Prompts = str | Sequence[str] | Row | Sequence[Row]


def bucket(tokens: int) -> int:
    """The padded length of a prompt: at most 12.5 % above it, or 15 tokens.

    Eight buckets an octave, so the number of compilations is bounded: 16, 32, ... 128, 144,
    160, ... 256, 288, ...
    """
    step = max(16, 2 ** (max(tokens - 1, 1).bit_length() - 1) // 8)
    return -(-tokens // step) * step


def is_one(prompts: Prompts) -> bool:
    """Whether this is one prompt: a text, or token ids."""
    return isinstance(prompts, str) or (
        len(prompts) > 0 and isinstance(prompts[0], int | np.integer)
    )


def as_rows(
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    attention_mask: np.ndarray | None = None,
    vocab_size: int,
    chat: bool = False,
    special: bool = True,
    images: Sequence[int] | None = None,
    placeholder: str = "",
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
      prompts: a text, texts, token ids, rows of token ids, or a `[B, T]` array.
      tokenizer: a Hugging Face tokenizer, needed for texts.
      attention_mask: 1 for the real tokens of an array padded on either side.
      vocab_size: ids are 0 .. vocab_size - 1.
      chat: put each text into the tokenizer's chat template as the user's turn.
      special: let the tokenizer add its special tokens (BOS); False for a later turn.
      images: how many each prompt has, and
      placeholder: what stands for one in a text: a chat template is told of them.

    Raises:
      ValueError: no prompt, an empty one, an id outside the vocabulary, no tokenizer for text, a
        mask of another shape than the prompts'.
    """
    if is_one(prompts):
        prompts = [prompts]  # type: ignore[assignment,list-item]
    if attention_mask is not None:
        prompts = _unpadded(prompts, np.asarray(attention_mask))
    if not len(prompts):
        raise ValueError("prompts is empty, expected at least one prompt")
    counts = [0] * len(prompts) if images is None else images
    rows = [
        _row(prompt, tokenizer, chat, special, count, placeholder)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {index} is empty, expected at least one token")
        for token in row:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token id {token} in prompt {index} is outside the vocabulary,"
                    f" expected 0 to {vocab_size - 1}"
                )
    return rows


def _unpadded(prompts: Any, attention_mask: np.ndarray) -> list[np.ndarray]:
    if any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts are text, expected token ids beside an attention_mask")
    widths = sorted({len(row) for row in prompts})
    if len(widths) > 1:
        raise ValueError(
            f"prompts have {widths[0]} to {widths[-1]} tokens,"
            " expected rows of one length beside an attention_mask"
        )
    tokens = np.asarray(prompts)
    if attention_mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask has shape {attention_mask.shape}, expected the prompts' {tokens.shape}"
        )
    return [row[mask > 0] for row, mask in zip(tokens, attention_mask, strict=True)]


def _row(
    prompt: Any, tokenizer: Any, chat: bool, special: bool, images: int, placeholder: str
) -> list[int]:
    if not isinstance(prompt, str):
        return [operator.index(token) for token in np.asarray(prompt).tolist()]
    if tokenizer is None:
        raise ValueError("prompts are text but tokenizer=None, expected a tokenizer or token ids")
    if not prompt:
        return []
    if chat:
        text = chat_text(prompt, tokenizer, images, placeholder)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt, add_special_tokens=special)["input_ids"])


def chat_text(prompt: str, tokenizer: Any, images: int = 0, placeholder: str = "") -> str:
    """The prompt as the user's turn, with its images where the text has a placeholder, or first."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat=True, expected a tokenizer with a chat template")

    def turn(content: Any) -> str:
        turns = [{"role": "user", "content": content}]
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the chat template does not take this prompt ({error})") from None

    if not images:
        return turn(prompt)
    if placeholder not in prompt:
        prompt = placeholder * images + prompt
    parts: list[dict[str, str]] = []
    for index, text in enumerate(prompt.split(placeholder)):
        parts += [{"type": "image"}] * (index > 0)
        parts += [{"type": "text", "text": text}] * bool(text)
    rendered = turn(parts)
    # A template for text alone would write such a list as it is, or leave images out.
    return rendered if rendered.count(placeholder) == prompt.count(placeholder) else turn(prompt)


def pad(rows: Sequence[Row] | np.ndarray, at_least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one `[B, bucket]` int32 array padded on the right with 0, and their lengths.

    The bucket is that of the longest row, or of `at_least` tokens.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), bucket(max(int(lengths.max()), at_least))), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, lengths


def check_context(rows: Sequence[Row], used: Sequence[int], new_tokens: int, context: int):
    """Raise ValueError where what came before (`used`), a row and its answer exceed the context."""
    for row, before in zip(rows, used, strict=True):
        length = before + len(row)
        if length + new_tokens > context:
            raise ValueError(
                f"prompt of {length} tokens + max_new_tokens={new_tokens} exceeds the model's"
                f" context, expected at most {context} in all"
            )
