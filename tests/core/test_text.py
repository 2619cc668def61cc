"""The text of a growing answer: what is decoded at a step is bounded, and nothing changes by it."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvjax.generation.detokenize import WINDOW, RunningText, cut_at_stop, decode_after, first_stop

WORDS = ["▁the", "▁", "▁end", "s", ".", "\n", "▁a", "END", "EN", "D", "é", "▁€"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Words with a space before them, and every byte, as Llama 1 and 2 decode them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    made = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    replace = decoders.Replace("▁", " ")
    parts = [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return with_special(made, "<s>", "</s>")


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, as GPT-2, Llama 3 and Qwen write them, and words of several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġthe", "END", "EN", "ĠD", "Ċ", "Ġâ", "Ĥ¬"]
    pieces = [*letters, *(word for word in words if word not in letters)]
    made = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="!"))
    made.decoder = decoders.ByteLevel()
    return with_special(made, "<|im_start|>", "<|im_end|>")


def with_special(made: Tokenizer, bos: str, eos: str) -> PreTrainedTokenizerFast:
    made.add_special_tokens([AddedToken(bos, special=True), AddedToken(eos, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


TOKENIZERS = {"sentencepiece": sentencepiece(), "bytes": byte_level()}


class Whole:
    """What the pieces have to be: the whole answer decoded at every step."""

    def __init__(self, tokenizer, stop, context):
        self.rest = tokenizer, stop, context
        self.tokens, self.given, self.stopped = [], 0, False

    def add(self, tokens):
        tokenizer, stop, context = self.rest
        if self.stopped:
            return ""
        self.tokens += tokens
        text = decode_after(context, self.tokens, tokenizer)
        if first_stop(text, stop) is not None:
            self.stopped = True
            return self.give(self.cut()[0])
        text = text.rstrip("\ufffd")
        starts = [one[:size] for one in stop for size in range(1, len(one))]
        return self.give(
            text[: len(text) - max((len(s) for s in starts if text.endswith(s)), default=0)]
        )

    def cut(self):
        tokenizer, stop, context = self.rest
        for size in range(len(self.tokens) + 1):
            text = decode_after(context, self.tokens[:size], tokenizer)
            if first_stop(text, stop) is not None:
                return text[: first_stop(text, stop)], size
        return text, size

    def flush(self):
        tokenizer, _, context = self.rest
        text = decode_after(context, self.tokens, tokenizer)
        return "" if self.stopped else self.give(text)

    def give(self, text):
        piece, self.given = text[self.given :], max(self.given, len(text))
        return piece


def spelled(text, tokenizer) -> list[int]:
    """A text byte by byte."""
    if tokenizer is TOKENIZERS["sentencepiece"]:
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    [(letters, _)] = level.pre_tokenize_str(text)
    return tokenizer.convert_tokens_to_ids(list(letters))


def stream(rng, tokenizer) -> list[int]:
    """Random tokens: mostly words, runs of bytes whole and broken, special tokens now and then."""
    size, tokens = len(tokenizer), []
    while len(tokens) < 5 * WINDOW:
        kind = rng.integers(4)
        if kind == 0:
            tokens += rng.integers(0, size, rng.integers(1, 9)).tolist()
        elif kind == 1:
            tokens += spelled(rng.choice(["é€😀", "文字", "a"]), tokenizer)
        else:
            tokens += rng.integers(max(0, size - 16), size, rng.integers(1, 24)).tolist()
    return tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stop", [(), ("END END",), ("the\n", "D", "zz")], ids=repr)
def test_pieces_are_those_of_the_whole_answer(name, seed, stop):
    """Whatever tokens come, one by one and eight at a time."""
    tokenizer, rng = TOKENIZERS[name], np.random.default_rng(seed)
    tokens, context = stream(rng, tokenizer), stream(rng, tokenizer)[:8]
    for size in (1, 8):
        ours, theirs = RunningText(tokenizer, stop, context), Whole(tokenizer, stop, context)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            assert ours.add(part) == theirs.add(part)
            assert ours.stopped == theirs.stopped
        assert ours.flush() == theirs.flush()
    theirs.tokens = tokens
    assert cut_at_stop(tokens, tokenizer, stop, context) == theirs.cut()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_step_decodes_no_more_of_a_long_answer(name):
    """Tokens decoded at a step are counted, and do not grow with the answer."""
    tokenizer, counted = TOKENIZERS[name], []

    class Counting:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        all_special_ids = tokenizer.all_special_ids
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def decode(self, tokens, **settings):
            counted.append(len(tokens))
            return tokenizer.decode(tokens, **settings)

    tokens = np.random.default_rng(0).integers(len(tokenizer) - 9, len(tokenizer), 2000).tolist()
    text = RunningText(Counting(), ("zz",))
    pieces = [text.add([token]) for token in tokens]
    assert "".join([*pieces, text.flush()]) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert max(counted) <= 4 * WINDOW
    assert sum(counted) < 2000 * 8 * WINDOW


# --------------------------------------------------------------------------- special tokens
def ids(text: str) -> list[int]:
    return [TOKENIZERS["bytes"].convert_tokens_to_ids(piece) for piece in text.split(" ")]


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "count"),
    [
        ("a b <|im_end|> c d", "<|im_end|>", "ab", 3),
        ("a b . <|im_end|> c", ".<|im_end|>", "ab", 4),
        ("a <|im_end|> Ċ c", "<|im_end|>\n", "a", 3),
        ("a <|im_end|> b Ċ c", "<|im_end|>\n", "ab\nc", 5),
        ("a <|im_end|> <|im_start|> b", "<|im_end|><|im_start|>", "a", 3),
        ("<|im_end|> c", "<|im_end|>", "", 1),
        # Not what they stop at: a part of its name, a text beside it, another special token.
        ("a <|im_end|> c", "im_end", "ac", 3),
        ("a <|im_end|> c", "<|", "ac", 3),
        ("a <|im_start|> c", "<|im_end|>", "ac", 3),
        ("E N <|im_end|> D c", "END", "", 4),
        # Spelled out by plain tokens it is text like any other.
        ("a < | i m _ e n d | > c", "<|im_end|>", "a", 11),
    ],
)
def test_a_special_token_stops_an_answer(tokens, stop, text, count):
    tokenizer, given = TOKENIZERS["bytes"], ids(tokens)
    assert cut_at_stop(given, tokenizer, (stop,)) == (text, count)
    for size in (1, 2, 9):
        running = RunningText(tokenizer, (stop,))
        pieces = [running.add(given[i : i + size]) for i in range(0, len(given), size)]
        assert "".join([*pieces, running.flush()]) == text
        assert running.stopped == (count < len(given) or running.cut is not None)
        assert running.taken == count


def test_a_special_token_stops_a_long_answer():
    """Behind what is decoded no more."""
    tokenizer = TOKENIZERS["bytes"]
    tokens = ids(" ".join(["a b Ċ"] * 200)) + ids(". <|im_end|> c")
    running = RunningText(tokenizer, (".<|im_end|>",))
    pieces = [running.add([token]) for token in tokens]
    assert "".join(pieces) == "ab\n" * 200
    assert (running.stopped, running.taken) == (True, 602)
    assert cut_at_stop(tokens, tokenizer, (".<|im_end|>",)) == ("ab\n" * 200, 602)
