"""Answer one question about one document, from the full cache and from a part of it.

The document is compressed before the question is known. See `kvjax demo`.

L layers, K KV heads, T tokens of the document.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

import kvjax
from kvjax.config import CompressionConfig
from kvjax.eval.report.inspect import pieces
from kvjax.figures import text_lines
from kvjax.inputs.chat import opening
from kvjax.inputs.prompts import Ends
from kvjax.model_interface import Model
from kvjax.tiny.questions import questions
from kvjax.tiny.vocabulary import text

ARTICLE = Path(__file__).parent / "article.txt"
QUESTION = "From which city came the letter with the drawing of a wheel?"
# Tokens that a question is reckoned with where rotary frequencies depend on the length.
_QUESTION = 64
_SHADES = " .:-=+*#%@"
_LEVELS = len(_SHADES) - 1


@dataclass(frozen=True)
class Side:
    """A document as one config kept it, and what it answered.

    Attributes:
      answer: to the question.
      kept: `[L, K, T]` which tokens each head kept.
      cache_bytes: of keys and values that are held of the document.
      read_seconds: to read and compress it, compilation apart.
      answer_seconds: to read the question and write the answer, compilation apart.
      tokens: drawn in that time.
    """

    answer: str
    kept: Bool[np.ndarray, "L K T"]
    cache_bytes: int
    read_seconds: float
    answer_seconds: float
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """Both sides of a demo, and the pieces of text that the document's tokens are."""

    full: Side
    compressed: Side
    pieces: list[str]


def bundled_document() -> tuple[str, str]:
    """A document of 512 tokens in the bundled model's language, and a question about it."""
    [item] = questions("multikey", 512, 1)
    return text(item.document[1:]), text(item.question)  # its tokenizer begins a text by itself


def compare(
    model: Model,
    tokenizer: Any,
    document: str,
    question: str,
    config: CompressionConfig,
    *,
    max_new_tokens: int,
    eos_ids: Ends | None = None,
) -> Comparison:
    """Read a document with the full cache and with `config`, and ask both the same.

    A tokenizer with a chat template gets document and question as turns of the user's, another one
    as a text that goes on. Everything runs once to be compiled, and a second time to be timed.
    `eos_ids` end an answer, the model's own by default.

    Raises:
      ValueError: a document or a question that the model cannot take.
    """
    chat = bool(getattr(tokenizer, "chat_template", None))
    read: dict[str, Any] = {"prompts": document}
    asked: dict[str, Any] = {"prompts": question}
    if chat:
        read = {"messages": opening(None, document, tokenizer)}
        asked = {"messages": [{"role": "user", "content": question}]}
    asked |= {"tokenizer": tokenizer, "max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
    following = _QUESTION + max_new_tokens
    sides: list[Side] = []
    ids: Sequence[int] = ()
    for each in (CompressionConfig.named("full"), config):
        for _ in range(2):
            began = time.perf_counter()
            cache = kvjax.compress_prompt(
                model, config=each, tokenizer=tokenizer, max_new_tokens=following, **read
            )
            cache.next_positions.block_until_ready()
            read_seconds = time.perf_counter() - began
        for _ in range(2):
            began = time.perf_counter()
            out = kvjax.generate(model, cache=cache, **asked)
            answer_seconds = time.perf_counter() - began
        assert out.text is not None
        assert cache.history is not None
        ids = cache.history[0].tokens
        mask_LKT = np.asarray(cache.kept_mask(len(ids))[0])
        times = read_seconds, answer_seconds
        answer = out.text[0].strip()
        sides.append(Side(answer, mask_LKT, cache.nbytes, *times, len(out.tokens[0])))
    full, compressed = sides
    return Comparison(full, compressed, pieces(ids, tokenizer))


# ---------------------------------------------------------------------------- in a terminal
def shares(kept: Bool[np.ndarray, "L K T"]) -> Float[np.ndarray, " T"]:
    """The share of all heads that kept each token."""
    return kept.mean((0, 1))


def layer_map(kept: Bool[np.ndarray, "L K T"], width: int = 64) -> list[str]:
    """A line a layer: the darker a sign, the more of these positions its heads kept."""
    layers, _, tokens = kept.shape
    columns = min(width, tokens)
    edges = np.linspace(0, tokens, columns + 1).astype(int)
    cells_LC = np.add.reduceat(kept.mean(1), edges[:-1], axis=1) / np.diff(edges)
    darkest = cells_LC.max() or 1
    signs = np.ceil(cells_LC / darkest * _LEVELS).astype(int)
    return [
        f"layer {layer:2} |" + "".join(_SHADES[sign] for sign in row) + f"| {each:.0%}"
        for layer, row, each in zip(range(layers), signs, kept.mean((1, 2)), strict=True)
    ]


def marked_text(
    words: Sequence[str],
    share: Float[np.ndarray, " T"],
    *,
    marks: tuple[str, str] = ("[", "]"),
    width: int = 96,
    most: int = 24,
) -> list[str]:
    """The document's text with marks around tokens that at least twice the mean share kept.

    Args:
      words: T pieces of text.
      share: of heads that kept each of them.
      marks: before and behind what is marked.
      width: signs a line.
      most: lines; of a longer text those in a row of which most was kept.
    """
    lines = text_lines(words, width)
    if len(lines) > most:
        weights = [sum(share[token] for token, _ in line) for line in lines]
        first = int(np.convolve(weights, np.ones(most), mode="valid").argmax())
        lines = lines[first : first + most]
    mark_T = share >= 2 * share.mean()
    return [_marked(line, mark_T, marks) for line in lines]


def _marked(line: Sequence[tuple[int, str]], mark_T, marks: tuple[str, str]) -> str:
    shown, inside = "", False
    for token, piece in line:
        if mark_T[token] and not inside:  # a space before a word stays outside of its marks
            word = piece.lstrip()
            shown, piece = shown + piece[: len(piece) - len(word)] + marks[0], word
        elif inside and not mark_T[token]:
            shown += marks[1]
        shown, inside = shown + piece, bool(mark_T[token])
    return shown + (marks[1] if inside else "")


def report(found: Comparison, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison as numbers and texts, for JSON."""
    names = "answer", "cache_bytes", "read_seconds", "answer_seconds", "tokens"
    sides = {
        name: {key: getattr(side, key) for key in names} | {"kept": float(side.kept.sum(-1).mean())}
        for name, side in (("full", found.full), ("compressed", found.compressed))
    }
    return dict(facts) | {"document_tokens": len(found.pieces)} | sides
