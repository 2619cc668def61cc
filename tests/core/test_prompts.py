"""Prompts in every form, padding, and the text of a growing answer."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvjax.eval.questions import as_tokens
from kvjax.eval.tasks import Ask, Document
from kvjax.eval.tasks.lengths import prompt_tokens
from kvjax.generation.detokenize import RunningText, cut_at_stop, first_stop
from kvjax.inputs.prompts import as_rows, bucket, check_context, encoded, eos_tokens, pad

VOCABULARY = 300
BOS, SPECIAL = 256, 257


class Bytes:
    """A tokenizer of UTF-8 bytes, and of whole strings by the ids that they are given here."""

    def __init__(self, *strings: str):
        self.pieces = {258 + index: text.encode() for index, text in enumerate(strings)}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BOS] * add_special_tokens + list(text.encode())}

    def decode(self, tokens, skip_special_tokens: bool = False) -> str:
        special = b"" if skip_special_tokens else b"<special>"
        known = {BOS: special, SPECIAL: special} | self.pieces
        data = b"".join(known.get(token) or bytes([token] * (token < 256)) for token in tokens)
        return data.decode(errors="replace")


def rows_of(prompts, **settings) -> list[list[int]]:
    return as_rows(prompts, **({"vocab_size": VOCABULARY} | settings))


# --------------------------------------------------------------------------- buckets
def test_buckets_by_hand():
    lengths = [1, 16, 17, 128, 129, 144, 145, 256, 257, 512, 513, 1024, 1025, 100_000]
    expected = [16, 16, 32, 128, 144, 144, 160, 256, 288, 512, 576, 1024, 1152, 106_496]
    assert [bucket(tokens) for tokens in lengths] == expected


def test_buckets_are_near_monotone_and_few():
    sizes = [bucket(tokens) for tokens in range(1, 40_000)]
    for tokens, size in enumerate(sizes, start=1):
        assert 0 <= size - tokens <= max(15, tokens / 8)
        assert size % 16 == 0
        assert bucket(size) == size
    assert all(a <= b for a, b in itertools.pairwise(sizes))
    assert len({size for size in sizes if 1024 < size <= 2048}) == 8
    assert len({size for size in sizes if 16384 < size <= 32768}) == 8


# --------------------------------------------------------------------------- input forms
@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([5, 6, 7], [[5, 6, 7]]),
        ((5, 6, 7), [[5, 6, 7]]),
        (np.array([5, 6, 7]), [[5, 6, 7]]),
        ([np.int64(5), np.int64(6)], [[5, 6]]),
        ([[5, 6, 7], [8]], [[5, 6, 7], [8]]),
        ([(5, 6), np.array([8], np.uint8)], [[5, 6], [8]]),
        (np.array([[5, 6], [7, 8]], np.int32), [[5, 6], [7, 8]]),
        ([0, VOCABULARY - 1], [[0, VOCABULARY - 1]]),
        (jnp.array([5, 6, 7]), [[5, 6, 7]]),
        ([jnp.array([5, 6]), jnp.array([7])], [[5, 6], [7]]),
        (list(jnp.array([5, 6])), [[5, 6]]),
        (jnp.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
    ],
)
def test_token_ids_in_any_form(prompts, expected):
    rows = rows_of(prompts)
    assert rows == expected
    assert all(type(token) is int for row in rows for token in row)


def test_text():
    assert rows_of("ab", tokenizer=Bytes()) == [[BOS, 97, 98]]
    assert rows_of(["ab", "é"], tokenizer=Bytes()) == [[BOS, 97, 98], [BOS, 0xC3, 0xA9]]
    assert rows_of(("a",), tokenizer=Bytes(), special=False) == [[97]]
    assert rows_of(["a", [5]], tokenizer=Bytes()) == [[BOS, 97], [5]]


@pytest.mark.parametrize("named", [True, False])
def test_a_rendered_template_has_one_beginning(named):
    """Handed over as text it begins with BOS; a tokenizer.json alone does not name that token."""
    vocabulary = {"<s>": 0, "hi": 1, "?": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<s>"])
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    roles = {"bos_token": "<s>"} if named else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **roles)
    for text, expected in (("<s>hi", [0, 1]), ("hi", [0, 1]), ("hi hi", [0, 1, 1]), ("<s>", [0])):
        assert rows_of(text, tokenizer=tokenizer) == [expected]
        assert encoded(text, tokenizer, verbose=False) == expected
        assert prompt_tokens(tokenizer, text, "") == len(expected)
        ask = Ask(id="q", question="", answers=("hi",), new_tokens=1, metric="perplexity")
        document = Document(id="d", task="t", context=text, asks=(ask,))
        assert as_tokens(document, ask, tokenizer, False)[0] == tuple(expected)
    assert rows_of("<s>hi", tokenizer=tokenizer, special=False) == [[0, 1]]


# --------------------------------------------------------------------------- ends
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [2, 999]),
        ((), []),
        (5, [5]),
        (np.int64(5), [5]),
        (np.array([5, 6]), [5, 6]),
        (jnp.array(5), [5]),
        ([np.int32(5), 6], [5, 6]),
        ({6, 5}, [5, 6]),
    ],
)
def test_ends_in_any_form(given, expected):
    found = eos_tokens(given, (2, 999), 300)
    assert found == expected
    assert all(type(token) is int for token in found)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", [300, -1, [5, 300], np.int64(300), "</s>", 1.5, [[5], [6, 7]]])
def test_ends_that_are_no_tokens_are_named(given):
    with pytest.raises(ValueError, match=r"^eos_ids.*expected token ids of 0 to 299$"):
        eos_tokens(given, (2,), 300)


def test_padded_arrays():
    tokens = np.array([[9, 9, 5, 6], [9, 7, 8, 9], [1, 2, 3, 4]])
    left, right = [[0, 0, 1, 1], [0, 1, 1, 1]], [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert rows_of(tokens[:2], attention_mask=np.array(left)) == [[5, 6], [7, 8, 9]]
    assert rows_of(tokens[:2], attention_mask=np.array(right)) == [[9, 9], [9]]
    mask = np.array([*left, [1, 1, 1, 1]], bool)
    assert rows_of(tokens.tolist(), attention_mask=mask) == [[5, 6], [7, 8, 9], [1, 2, 3, 4]]
    assert rows_of([9, 5], attention_mask=np.array([[0, 1]])) == [[5]]
    # What the mask hides need not be a token.
    assert rows_of(np.array([[-100, 5]]), attention_mask=np.array([[0, 1]])) == [[5]]


# --------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "prompts is empty, expected at least one prompt"),
        (np.zeros((0, 4), int), {}, "prompts is empty, expected at least one prompt"),
        ([[5], []], {}, "prompt 1 is empty, expected at least one token"),
        ("", {"tokenizer": Bytes()}, "prompt 0 is empty, expected at least one token"),
        (
            np.array([[5, 6], [7, 8]]),
            {"attention_mask": np.array([[1, 1], [0, 0]])},
            "prompt 1 is empty, expected at least one token",
        ),
        (
            [[5], [6, 300]],
            {},
            "token id 300 in prompt 1 is outside the vocabulary, expected 0 to 299",
        ),
        ([-1, 5], {}, "token id -1 in prompt 0 is outside the vocabulary, expected 0 to 299"),
        (
            "ab",
            {},
            "prompts are text but tokenizer=None, expected a tokenizer or token ids",
        ),
        (
            np.array([[5, 6], [7, 8]]),
            {"attention_mask": np.array([1, 1])},
            "attention_mask has shape (2,), expected the prompts' (2, 2)",
        ),
        (
            [[5, 6], [7]],
            {"attention_mask": np.array([[1, 1], [1, 0]])},
            "prompts have 1 to 2 tokens, expected rows of one length beside an attention_mask",
        ),
        (
            ["ab"],
            {"tokenizer": Bytes(), "attention_mask": np.array([1])},
            "prompts are text, expected token ids beside an attention_mask",
        ),
    ],
)
def test_refusals(prompts, settings, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        rows_of(prompts, **settings)
    assert str(caught.value) == message


# --------------------------------------------------------------------------- padding
def test_pad():
    tokens, lengths = pad([[5, 6, 7], list(range(17)), [8]])
    assert tokens.shape == (3, 32)
    assert (tokens.dtype, lengths.dtype) == (np.int32, np.int32)
    assert lengths.tolist() == [3, 17, 1]
    for row, expected in zip(tokens, [[5, 6, 7], list(range(17)), [8]], strict=True):
        assert row.tolist() == expected + [0] * (32 - len(expected))
    assert pad(np.array([[1, 2]]))[0].tolist() == [[1, 2] + [0] * 14]


def test_context():
    rows = [[1] * 20, [1] * 30]
    check_context(rows, used=[10] * len(rows), new_tokens=60, context=100)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_context(rows, used=[11] * len(rows), new_tokens=60, context=100)
    assert str(caught.value) == (
        "prompt of 41 tokens + max_new_tokens=60 exceeds the model's context,"
        " expected at most 100 in all"
    )


# --------------------------------------------------------------------------- running text
def streamed(tokenizer, tokens, stop=(), size=1) -> tuple[list[str], RunningText]:
    """The pieces of tokens that come `size` at a time, the flushed rest last."""
    text = RunningText(tokenizer, stop)
    pieces = [text.add(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return [*pieces, text.flush()], text


def test_characters_are_handed_out_whole():
    pieces, text = streamed(Bytes(), list("aé€😀b".encode()))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert not text.stopped
    pieces, _ = streamed(Bytes(), list("é€".encode())[:-1])
    assert pieces == ["", "é", "", "", "\ufffd"]  # cut short: flushed as it is
    pieces, _ = streamed(Bytes(), [97, 0xC3, 98, 99])
    assert pieces == ["a", "", "\ufffdb", "c", ""]  # never completed: certain once passed


def test_special_tokens_are_left_out():
    assert streamed(Bytes(), [BOS, 97, SPECIAL, 98])[0] == ["", "a", "", "b", ""]
    assert cut_at_stop([BOS, 97, SPECIAL, 98], Bytes(), ()) == ("ab", 4)


def test_no_tokenizer_no_text():
    pieces, text = streamed(None, [97, 98], stop=())
    assert pieces == ["", "", ""]
    assert not text.stopped


def test_stop_string_over_several_tokens():
    pieces, text = streamed(Bytes(), list(b"one ENough END two"), stop=["END"])
    # "E" and "EN" may be its beginning; "ENo" is not.
    assert pieces == [*"one ", "", "", "ENo", *"ugh ", "", "", "", "", "", "", "", ""]
    assert text.stopped
    assert text.add(list(b"more")) == ""
    assert text.flush() == ""


def test_stop_string_inside_a_token():
    tokenizer = Bytes("b.\n\nUser", "!")
    pieces, text = streamed(tokenizer, [97, 258, 259], stop=["\n\n"])
    assert "".join(pieces) == "ab."
    assert text.stopped
    assert cut_at_stop([97, 258, 259], tokenizer, ["\n\n"]) == ("ab.", 2)


def test_a_beginning_of_a_stop_string_is_flushed():
    pieces, text = streamed(Bytes(), list(b"ab\nUs"), stop=["\nUser", "zz"])
    assert pieces == ["a", "b", "", "", "", "\nUs"]
    assert not text.stopped


def test_beginnings_of_several_stop_strings():
    # Only the longest beginning at the end is held: "x" and "xy" before it are certain.
    assert streamed(Bytes(), list(b"xyab"), stop=["abc", "xyz"])[0] == ["", "", "xy", "", "ab"]
    assert streamed(Bytes(), list(b"ab"), stop=["bc", "abd"])[0] == ["", "", "ab"]


def test_stop_string_with_a_split_character():
    pieces, text = streamed(Bytes(), list("né à".encode()), stop=["né!"])
    assert pieces == ["", "", "", "né ", "", "à", ""]
    assert not text.stopped
    pieces, text = streamed(Bytes(), list("a né!".encode()), stop=["né!"])
    assert "".join(pieces) == "a "
    assert text.stopped


STOPS = [(), ("END",), ("cd", "abcdef"), ("b", "ab", "abc"), ("\n\n", "é!"), ("aab",)]
TEXTS = ["one END two END", "abcdef", "xxabcd", "aaab", "aé€é!\n", "a\n\nb", "EN", "né"]


@pytest.mark.parametrize("stop", STOPS, ids=repr)
@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_streams_end_where_whole_answers_do(text, stop):
    # By bytes and by larger tokens, one by one and in chunks.
    tokenizer = Bytes(*(text[i : i + 3] for i in range(0, len(text), 3)))
    larger = [258 + i for i in range(len(tokenizer.pieces))]
    for tokens in (list(text.encode()), larger):
        expected, count = cut_at_stop(tokens, tokenizer, stop)
        for size in (1, 2, 3, 100):
            pieces, running = streamed(tokenizer, tokens, stop, size)
            assert "".join(pieces) == expected
            assert running.stopped == any(s in text for s in stop)
        # As many tokens as complete a stop string, and not one more.
        prefix = tokenizer.decode(tokens[:count])
        if running.stopped:
            assert first_stop(prefix, stop) == len(expected)
            assert first_stop(tokenizer.decode(tokens[: count - 1]), stop) is None
        else:
            assert (expected, count) == (text, len(tokens))


def test_the_first_stop_string_to_be_completed_decides():
    # "cd" is complete after the second token, before "abcdef" could be.
    tokenizer = Bytes("ab", "cd", "ef")
    assert cut_at_stop([258, 259, 260], tokenizer, ["abcdef", "cd"]) == ("ab", 2)
    assert cut_at_stop(list(b"abcdef"), Bytes(), ["abcdef", "cd"]) == ("ab", 4)
    # Of those that one token completes, the earliest.
    assert cut_at_stop([258], Bytes("abcdef"), ["cd", "bcd"]) == ("a", 1)


def test_first_stop():
    assert first_stop("abcabc", ["ca", "b"]) == 1
    assert first_stop("abc", ["d"]) is None
    assert first_stop("abc", []) is None
    assert cut_at_stop([], Bytes(), ["a"]) == ("", 0)
