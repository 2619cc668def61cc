"""The tokenizer of a GGUF file, from its metadata (`tokenizer.ggml.*`) as llama.cpp reads them.

Source: github.com/ggml-org/llama.cpp, `src/llama-vocab.cpp`: names of pre-tokenizers, defaults of
each, tokens that end an answer. Two kinds of vocabulary are read: "gpt2" (byte-level BPE: tokens,
merges and the name of a pre-tokenizer) and "llama" (SentencePiece: tokens with scores).
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from kvjax.inputs.tokenizer import quiet_transformers

_KEY = "tokenizer.ggml."
# llama.cpp's numbers of token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_TYPES = range(7)
_LONGEST = 512  # characters of a token; finding merges takes time by its square
# Texts of tokens that end an answer whatever the metadata say (llama.cpp's list for chat models) ..
_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
    "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",  # noqa: RUF001
}  # fmt: skip
# .. and those that do where they are control tokens, as they may be plain text elsewhere.
_CONTROL_ENDS = {"</s>", "<eos>", "[EOS]", "[EOT]"}

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGITS = (r"\p{N}", *_GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2, "[0-9][0-9][0-9]")
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LLAMA3 = (_WORDS + r"\p{N}{1,3}" + _AFTER_DIGITS,)
_QWEN2 = (_WORDS + r"\p{N}" + _AFTER_DIGITS,)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = (_CASED + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",)


@dataclasses.dataclass(frozen=True)
class _Pre:
    """A pre-tokenizer: patterns, each of which splits what the ones before it left.

    `whole` is whether a word that is a token is taken without merging; `bos` is whether a text
    begins with BOS where the metadata do not say.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False


_PRES = (
    dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat"), _Pre(_GPT2))
    | dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone"), _Pre(_DIGITS))
    | dict.fromkeys(("command-r", "minerva-7b"), _Pre(_DIGITS))
    | dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"),
        _Pre(_LLAMA3, whole=True, bos=True),
    )
    | dict.fromkeys(("dbrx", "smaug-bpe"), _Pre(_LLAMA3))
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2"), _Pre(_QWEN2))
    | {
        "default": _Pre(_DEFAULT),
        "falcon": _Pre(_FALCON),
        "tekken": _Pre(_TEKKEN, whole=True, bos=True),
    }
)


def special_tokens(metadata: Mapping[str, Any]) -> tuple[int | None, list[int]]:
    """BOS, or None, and every token that ends an answer, the metadata's EOS first.

    The latter are EOS, end of turn and end of message by their ids, and the tokens that llama.cpp
    takes for these by their text, such as `<|im_end|>`. Without a vocabulary there are the ids.

    Raises:
      ValueError: an id that is not in the vocabulary, or a vocabulary that is damaged.
    """
    vocabulary = _vocabulary(metadata)
    found = {name: _token_id(metadata, name, vocabulary) for name in ("bos", "eos", "eot", "eom")}
    ends = [found[name] for name in ("eos", "eot", "eom")]
    if vocabulary is not None:
        ends += [token for token, piece in enumerate(vocabulary.pieces) if vocabulary.ends(token)]
    return found["bos"], list(dict.fromkeys(token for token in ends if token is not None))


def gguf_tokenizer(metadata: Mapping[str, Any], length: int) -> Any:
    """A transformers tokenizer, or None where the file has none.

    Args:
      metadata: of the file.
      length: tokens that the model reads at most, for `model_max_length`.

    Raises:
      ValueError: a kind of vocabulary or a pre-tokenizer that is not known here, by name, or a
        vocabulary that is damaged.
    """
    parts = tokenizer_parts(metadata, length)
    if parts is None:
        return None
    tokenizer, settings = parts
    with quiet_transformers() as transformers:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def tokenizer_parts(
    metadata: Mapping[str, Any], length: int
) -> tuple[Tokenizer, dict[str, Any]] | None:
    """What `tokenizer.json` and `tokenizer_config.json` hold; arguments as of `gguf_tokenizer`."""
    vocabulary = _vocabulary(metadata)
    if vocabulary is None:
        return None
    try:
        build = _byte_level if vocabulary.kind == "gpt2" else _sentence_pieces
        tokenizer = build(metadata, vocabulary)
    except ValueError:
        raise
    except Exception as error:  # `tokenizers` raises bare ones
        reason = " ".join(str(error).split())
        raise ValueError(f"{_KEY}tokens is not a vocabulary ({reason})") from None
    settings: dict[str, Any] = {"model_max_length": length, "clean_up_tokenization_spaces": False}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = _token_id(metadata, name, vocabulary)
        if token is not None:
            settings[f"{role}_token"] = vocabulary.pieces[token]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise ValueError(f"tokenizer.chat_template must be a text, got {template!r}")
        settings["chat_template"] = template
    return tokenizer, settings


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """Tokens by id: their texts and llama.cpp's types; `kind` is "gpt2" or "llama"."""

    kind: str
    pieces: list[str]
    types: Sequence[int]
    pre: _Pre

    def ends(self, token: int) -> bool:
        """Whether the text of a token says that it ends an answer."""
        piece = self.pieces[token]
        return piece in _ENDS or (piece in _CONTROL_ENDS and self.types[token] == _CONTROL)

    def added(self) -> list[AddedToken]:
        """Tokens that are found in a text before it is split, in the order of their ids."""
        found = []
        for token, (piece, kind) in enumerate(zip(self.pieces, self.types, strict=True)):
            special = kind in (_UNKNOWN, _CONTROL) or self.ends(token)
            if special or kind == _USER_DEFINED:
                found.append(AddedToken(piece, special=special, normalized=False))
        return found


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary | None:
    """The vocabulary, checked; None where the metadata say that there is none."""
    kind = metadata.get(f"{_KEY}model", "none")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama", "none", "no_vocab"):
        raise ValueError(f"{_KEY}model must be 'gpt2' or 'llama', got {_short(kind)}")
    if kind in ("none", "no_vocab"):
        return None
    pieces = metadata.get(f"{_KEY}tokens")
    if not isinstance(pieces, list) or not pieces:
        raise ValueError(f"{_KEY}tokens must be a list of texts, got {_short(pieces)}")
    # llama.cpp gives a token without a text one of its own, too.
    pieces = [piece or f"[EMPTY_{token}]" for token, piece in enumerate(pieces)]
    longest = max(pieces, key=len)
    if len(longest) > _LONGEST:
        raise ValueError(
            f"{_KEY}tokens has {_short(longest)}, expected at most {_LONGEST} characters"
        )
    if len(set(pieces)) < len(pieces):
        twice = collections.Counter(pieces).most_common(1)[0][0]
        raise ValueError(f"{_KEY}tokens has {twice!r} twice")
    types = metadata.get(f"{_KEY}token_type")
    if types is None:
        types = np.full(len(pieces), _NORMAL)
    types = _numbers(f"{_KEY}token_type", types, len(pieces), "iu").tolist()
    for value in set(types) - set(_TYPES):
        raise ValueError(f"{_KEY}token_type has {value}, expected 0 to {_TYPES[-1]}")
    pre = metadata.get(f"{_KEY}pre", "default")
    if kind == "llama":
        return _Vocabulary(kind, pieces, types, _Pre((), bos=True))
    if not isinstance(pre, str) or pre not in _PRES:
        raise ValueError(f"{_KEY}pre must be one of {', '.join(sorted(_PRES))}, got {_short(pre)}")
    return _Vocabulary(kind, pieces, types, _PRES[pre])


def _numbers(name: str, value: Any, count: int, kinds: str) -> np.ndarray:
    """The value, an array of `count` numbers of these kinds (NumPy's letters)."""
    known = isinstance(value, np.ndarray) and value.dtype.kind in kinds and len(value) == count
    if not known:
        raise ValueError(
            f"{name} must have a number for each of {count} tokens, got {_short(value)}"
        )
    return value


def _token_id(metadata: Mapping[str, Any], role: str, vocabulary: _Vocabulary | None) -> int | None:
    key = f"{_KEY}{role}_token_id"
    defaults = {"bos": 1, "eos": 2, "unknown": 0}  # llama.cpp's of SentencePiece vocabularies
    sentence = vocabulary is not None and vocabulary.kind == "llama"
    token = metadata.get(key, defaults.get(role) if sentence else None)
    if token is None:
        return None
    most = len(vocabulary.pieces) if vocabulary is not None else 2**31
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < most:
        raise ValueError(f"{key} must be a token id (0 to {most - 1}), got {token!r}")
    return token


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"{_KEY}{name}", default)
    if not isinstance(value, bool):
        raise ValueError(f"{_KEY}{name} must be true or false, got {value!r}")
    return value


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Tokenizer:
    """Byte-level BPE with the pre-tokenizer that the metadata name."""
    ids = {piece: token for token, piece in enumerate(vocabulary.pieces)}
    listed = metadata.get(f"{_KEY}merges")
    if not isinstance(listed, list):
        raise ValueError(f"{_KEY}merges must be a list of texts, got {_short(listed)}")
    merges = []
    for merge in listed:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= ids.keys():
            raise ValueError(f"{_KEY}merges has {_short(merge)}, expected two tokens that make one")
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=vocabulary.pre.whole))
    splits: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in vocabulary.pre.patterns
    ]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer, metadata, vocabulary)


def _sentence_pieces(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece's BPE by scores, with bytes for characters that are no token."""
    ids = {piece: token for token, piece in enumerate(vocabulary.pieces)}
    unknown = _token_id(metadata, "unknown", vocabulary)
    tokenizer = Tokenizer(
        BPE(
            ids,
            _merges(metadata, vocabulary),
            unk_token=None if unknown is None else vocabulary.pieces[unknown],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    prefix = _flag(metadata, "add_space_prefix", True)
    put_first = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*put_first, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return _with_special(tokenizer, metadata, vocabulary)


def _merges(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The merges, best first, that make BPE join neighbours as SentencePiece does.

    It joins the two whose joint piece scores best, the leftmost of equals. So a pair's rank is the
    score of what it makes; of equals (runs of spaces have one score) the longer one comes first, as
    the leftmost run then grows until it cannot.
    """
    pieces, types = vocabulary.pieces, vocabulary.types
    scores = metadata.get(f"{_KEY}scores")
    scores = _numbers(f"{_KEY}scores", scores, len(pieces), "iuf").tolist()
    if any(score != score for score in scores):
        raise ValueError(f"{_KEY}scores must be numbers, got nan")
    made = {
        piece: score
        for piece, kind, score in zip(pieces, types, scores, strict=True)
        if kind not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    ranked = sorted(made, key=lambda piece: (-made[piece], -len(piece)))
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in made and piece[cut:] in made
    ]


def _with_special(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], vocabulary: _Vocabulary
) -> Tokenizer:
    """Tokens that are never split, and those that are put around a text."""
    tokenizer.add_tokens(vocabulary.added())
    around: dict[str, list[tuple[str, int]]] = {"bos": [], "eos": []}
    for role, default in (("bos", vocabulary.pre.bos), ("eos", False)):
        if _flag(metadata, f"add_{role}_token", default):
            token = _token_id(metadata, role, vocabulary)
            if token is None:
                raise ValueError(
                    f"{_KEY}{role}_token_id is missing, expected as it is put to texts"
                )
            around[role] = [(vocabulary.pieces[token], token)]
    if around["bos"] or around["eos"]:
        first, last = ([piece for piece, _ in around[role]] for role in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B", *last],
            special_tokens=around["bos"] + around["eos"],
        )
    return tokenizer


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
