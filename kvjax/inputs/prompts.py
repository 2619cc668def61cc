"""Turn prompts (text, token ids, padded arrays) into one right-padded batch.

B batch, T tokens.
"""

import operator
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvjax.model_interface import Images, Rotary

Row = Sequence[int | np.integer] | np.ndarray | jax.Array
Prompts = str | Sequence[str] | Row | Sequence[Row]
Ends = int | np.integer | Row | Set[int]


@dataclass(frozen=True)
class ModelInputs:
    """Prompts with a token for each feature, and what the tower reads.

    Attributes:
      rows: token ids of each prompt.
      pixels: of all images, as the model's `encode_images` reads them; None without images.
      token: that stands for a feature.
      shapes: rows and columns of patches of each image, as far as each has a token.
      rotary: rotary positions of rows padded to a width, and the shift after them (M-RoPE).
      given: the rows with one token for each image.
      turns: all turns of each row's conversation; None where the prompts are no turns.
    """

    rows: list[list[int]]
    pixels: Any = None
    token: int = -1
    shapes: Sequence[tuple[int, int]] = ()
    rotary: Callable[[list[list[int]], int], tuple[np.ndarray, np.ndarray]] | None = None
    given: list[list[int]] = field(default_factory=list)
    turns: list[list[Any]] | None = None

    def images(self, tokens: Int[np.ndarray, "B T"]) -> Images | None:
        """What stands where in the rows as they are padded; None without images."""
        if self.pixels is None:
            return None
        lengths = np.array([len(row) for row in self.rows])
        mine_BT = (tokens == self.token) & (np.arange(tokens.shape[1]) < lengths[:, None])
        count_BT = np.cumsum(mine_BT.reshape(-1), dtype=np.int32).reshape(tokens.shape)
        places_BT = np.where(mine_BT, count_BT - 1, -1).astype(np.int32)
        rotary = None
        if self.rotary is not None:
            positions_BT3, shift_B = self.rotary(self.rows, tokens.shape[1])
            rotary = Rotary(jnp.asarray(positions_BT3), jnp.asarray(shift_B))
        return Images(jax.tree.map(jnp.asarray, self.pixels), jnp.asarray(places_BT), rotary)


def bucket(tokens: int) -> int:
    """The padded length of a prompt: at most 12.5 % above it, or 15 tokens.

    Eight buckets an octave, so the number of compilations is bounded: 16, 32, ... 128, 144,
    160, ... 256, 288, ...
    """
    step = max(16, 2 ** (max(tokens - 1, 1).bit_length() - 1) // 8)
    return -(-tokens // step) * step


def is_one(prompts: Prompts) -> bool:
    """Whether this is one prompt: a text, or token ids (a list or an array of one axis)."""
    if isinstance(prompts, str):
        return True
    if (axes := getattr(prompts, "ndim", None)) is not None:
        return axes == 1 and len(prompts) > 0
    # An entry of a list may be a number, or an array without axes.
    first = prompts[0] if len(prompts) else ()
    return isinstance(first, int) or getattr(first, "ndim", None) == 0


def as_rows(
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    attention_mask: np.ndarray | None = None,
    vocab_size: int,
    special: bool = True,
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
      prompts: a text, texts, token ids, rows of token ids, or a `[B, T]` array.
      tokenizer: a Hugging Face tokenizer, needed for texts.
      attention_mask: 1 for the real tokens of an array padded on either side.
      vocab_size: ids are 0 .. vocab_size - 1.
      special: let the tokenizer add its special tokens (BOS), where the text does not begin with
        BOS already, as a rendered chat template does; False for a later turn.

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
    rows = [_row(prompt, tokenizer, special) for prompt in prompts]
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


def _row(prompt: Any, tokenizer: Any, special: bool) -> list[int]:
    if not isinstance(prompt, str):
        return [operator.index(token) for token in np.asarray(prompt).tolist()]
    if tokenizer is None:
        raise ValueError("prompts are text but tokenizer=None, expected a tokenizer or token ids")
    if not prompt:
        return []
    return encoded(prompt, tokenizer, special=special)


def encoded(text: str, tokenizer: Any, *, special: bool = True, **settings: Any) -> list[int]:
    """Token ids of a text, which never begin with BOS twice.

    Args:
      text: may begin with BOS as a text (a chat template that is rendered already).
      tokenizer: a Hugging Face tokenizer.
      special: let it add its special tokens.
      settings: passed on to the tokenizer.
    """
    ids = list(tokenizer(text, add_special_tokens=special, **settings)["input_ids"])
    if special and ids[1:2] == ids[:1]:
        # What it puts before a text: a tokenizer.json by itself does not say which token is BOS.
        added = list(tokenizer("", add_special_tokens=True)["input_ids"])
        if ids[:1] == added[:1]:
            return ids[1:]
    return ids


def eos_tokens(eos_ids: Ends | None, own: Sequence[int], vocab_size: int) -> list[int]:
    """The tokens that end a row.

    Args:
      eos_ids: an id, several in a sequence, a set or an array, () for none, None for the model's.
      own: the model's own; models with a cut vocabulary may have ids outside it.
      vocab_size: ids that are given are 0 .. vocab_size - 1.

    Raises:
      ValueError: no token ids, or ids outside the vocabulary.
    """
    if eos_ids is None:
        return list(own)
    expected = f"expected token ids of 0 to {vocab_size - 1}"
    given = sorted(eos_ids) if isinstance(eos_ids, Set) else eos_ids
    try:
        ids = np.atleast_1d(np.asarray(given))
    except ValueError:  # lists of several lengths
        raise ValueError(f"eos_ids={eos_ids!r}, {expected}") from None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"eos_ids={eos_ids!r}, {expected}")
    for token in ids.tolist():
        if not 0 <= token < vocab_size:
            raise ValueError(f"eos_ids has {token}, {expected}")
    return ids.tolist()


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
