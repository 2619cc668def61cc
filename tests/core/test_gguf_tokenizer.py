"""Tokenizers of GGUF files: llama.cpp's token ids, and what metadata say of BOS and ends."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_cases import TOKENS, VOCABULARY

from kvjax.inputs.gguf_tokenizer import gguf_tokenizer, special_tokens

LLAMA_CPP = json.loads((Path(__file__).parents[1] / "fixtures" / "gguf_tokens.json").read_text())


def metadata(**change: Any) -> dict[str, Any]:
    """The tiny vocabulary's, with other values or (None) without some, as a file has them."""
    keys = VOCABULARY | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    for name in ("token_type", "scores"):
        value = keys.get(f"tokenizer.ggml.{name}")
        keys[f"tokenizer.ggml.{name}"] = None if value is None else np.array(value)
    return {name: value for name, value in keys.items() if value is not None}


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("name", LLAMA_CPP["ids"])
def test_token_ids_are_those_of_llama_cpp(name):
    if "space" in name:
        keys = LLAMA_CPP["sentence_pieces"] | {"pre": None, "merges": None}
        keys |= {"add_space_prefix": name == "space", "bos_token_id": None, "eos_token_id": None}
    else:
        keys = LLAMA_CPP["byte_level"] | {"pre": name}
    tokenizer = gguf_tokenizer(metadata(**keys, add_bos_token=None), 128)
    for text, ids in zip(LLAMA_CPP["texts"], LLAMA_CPP["ids"][name], strict=True):
        assert tokenizer(text)["input_ids"] == ids, text
        if "<" not in text:
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_and_words():
    for pre, expected in (
        ("smollm", ["hello", "Ġwor", "1", "2"]),
        ("gpt-2", ["hello", "Ġwor", "12"]),
        ("qwen2", ["hello", "Ġwor", "1", "2"]),
    ):
        assert pieces(gguf_tokenizer(metadata(pre=pre), 128), "hello wor12") == expected, pre


def test_bos_is_put_where_the_metadata_say_so_and_nowhere_else():
    assert pieces(gguf_tokenizer(metadata(pre="llama-bpe"), 128), "hello") == ["hello"]
    unsaid = gguf_tokenizer(metadata(pre="llama-bpe", add_bos_token=None), 128)
    assert pieces(unsaid, "hello") == ["<|im_start|>", "hello"]
    both = gguf_tokenizer(metadata(add_bos_token=True, add_eos_token=True), 128)
    assert pieces(both, "hello") == ["<|im_start|>", "hello", "<|im_end|>"]
    assert pieces(both, "") == ["<|im_start|>", "<|im_end|>"]
    rendered = both.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert rendered == "<|im_start|>a"
    with pytest.raises(ValueError, match=r"ggml\.bos_token_id is missing, expected"):
        gguf_tokenizer(metadata(add_bos_token=True, bos_token_id=None), 128)


def test_tokens_that_end_an_answer():
    # <|im_end|> by its id, <|endoftext|> by its text.
    assert special_tokens(metadata()) == (1, [2, 0])
    tokenizer = gguf_tokenizer(metadata(), 128)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    # Marked as plain text, as some conversions have it: still one token, and still an end.
    plain = metadata(token_type=[1] * len(TOKENS), eos_token_id=0, eot_token_id=5)
    assert special_tokens(plain) == (1, [0, 5, 2])
    tokenizer = gguf_tokenizer(plain, 128)
    assert pieces(tokenizer, "hello<|im_end|>") == ["hello", "<|im_end|>"]
    ids = tokenizer("hello<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    # "</s>" ends where it is a control token, and may be text elsewhere.
    tokens = [*TOKENS, "</s>"]
    for kind, ends in ((3, [2, 0, len(TOKENS)]), (1, [2, 0])):
        types = [*VOCABULARY["tokenizer.ggml.token_type"], kind]
        assert special_tokens(metadata(tokens=tokens, token_type=types))[1] == ends


def test_no_tokenizer_and_ids_alone():
    ids = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.bos_token_id": 5}
    assert gguf_tokenizer(ids, 128) is None
    assert special_tokens(ids) == (5, [7])
    assert special_tokens({"tokenizer.ggml.model": "none"}) == (None, [])
    with pytest.raises(ValueError, match=r"chat_template must be a text, got 3"):
        gguf_tokenizer(metadata() | {"tokenizer.chat_template": 3}, 128)
    scores = LLAMA_CPP["sentence_pieces"] | {"scores": None, "pre": None, "merges": None}
    with pytest.raises(
        ValueError, match=r"scores must have a number for each of \d+ tokens, got N"
    ):
        gguf_tokenizer(metadata(**scores), 128)
