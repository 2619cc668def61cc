"""RULER's tasks: prompts, lengths, and answers that the context holds."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
from tasks_data import ESSAY, NAMES, NEW, UUID, Bytes, whole, write_ruler
from tasks_data import make_ruler as make

from kvjax.config import ConfigError
from kvjax.eval.tasks import TASKS, TaskSettings
from kvjax.eval.tasks.haystack import NOISE
from kvjax.eval.tasks.lengths import largest, prompt_tokens
from kvjax.eval.tasks.ruler_needles import needle_prompt
from kvjax.eval.tasks.words import ADJECTIVES, NOUNS, PLAIN, VERBS, pairs
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.tiny import WEIGHTS


@pytest.fixture(scope="module", params=["bundled", "bytes"])
def tokenizer(request):
    return Bytes() if request.param == "bytes" else load_tokenizer(WEIGHTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_ruler(tmp_path_factory.mktemp("ruler"))


# ---------------------------------------------------------------------------- all tasks
@pytest.mark.parametrize("name", NAMES)
def test_documents_keep_to_the_length_and_fill_it(name, tokenizer, data):
    for length in (2048, 8192):
        made = make(name, data, tokenizer=tokenizer, length=length, reserve=20)
        assert [document.id for document in made] == [f"ruler/{name}/{i}" for i in range(3)]
        for document in made:
            (ask,) = document.asks
            assert ask.id == f"{document.id}/0"
            assert document.task == f"ruler/{name}"
            assert ask.new_tokens == NEW[name.split("_")[0]]
            assert ask.metric == ("match-part" if "qa" in name else "match-all")
            tokens = prompt_tokens(tokenizer, document.context, ask.question + ask.lead)
            used = tokens + ask.new_tokens + 20
            assert length - 350 < used <= length  # a unit more would be too much


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_a_document_and_no_other_document_changes_it(name, data):
    made = make(name, data, tokenizer=Bytes(), count=3)
    assert made == make(name, data, tokenizer=Bytes(), count=3)
    assert made[:2] == make(name, data, tokenizer=Bytes(), count=2)
    other = make(name, data, tokenizer=Bytes(), count=3, seed=1)
    assert len({document.context for document in made + other}) == 6


DIGESTS = {
    "niah_single_1": "a727e21d42c8",
    "niah_single_2": "f0bf5f657103",
    "niah_single_3": "47a21b2644d9",
    "niah_multikey_1": "45523e165b14",
    "niah_multikey_2": "3ba977b79905",
    "niah_multikey_3": "ac3300504a74",
    "niah_multivalue": "3519e8d3319b",
    "niah_multiquery": "2a0c2601b517",
    "vt": "db38ada10df8",
    "cwe": "15813bce64f2",
    "fwe": "6281298b30b1",
    "qa_1": "63034a61afce",
    "qa_2": "45f7b549f5a4",
}


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_the_same_for_ever(name, data):
    text = "\0".join(map(whole, make(name, data, tokenizer=Bytes(), count=2)))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == DIGESTS[name]


def test_benchmark_is_complete():
    assert [name for name in TASKS if name.startswith("ruler/")] == [f"ruler/{n}" for n in NAMES]
    for name in NAMES:
        task = TASKS[f"ruler/{name}"]
        assert task.name == f"ruler/{name}"
        assert task.count == 500
        assert task.needs[:2] == ("tokenizer", "length")
        assert ("data" in task.needs) == name.startswith("qa")


# ---------------------------------------------------------------------------- needles
def test_prompt_is_rulers():
    (document,) = make("niah_single_1", tokenizer=Bytes(), length=660, count=1)
    (ask,) = document.asks
    assert document.context == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I"
        " will quiz you about the number afterwards.\n"
        "One of the special magic numbers for frosty-flower is: 3449184.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    assert ask.question == (
        "\nWhat is the special magic number for frosty-flower mentioned in the provided text?"
    )
    assert ask.lead == (
        " The special magic number for frosty-flower mentioned in the provided text is"
    )
    assert ask.answers == ("3449184",)


def test_prompts_of_several_values_are_rulers():
    before, question, lead = needle_prompt("numbers", ["a-b", "c-d", "e-f"], 1)
    assert before == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it."
        " I will quiz you about the numbers afterwards.\n"
    )
    assert question == (
        "\nWhat are all the special magic numbers for a-b, c-d, and e-f mentioned in the provided"
        " text?"
    )
    assert lead == (
        " The special magic numbers for a-b, c-d, and e-f mentioned in the provided text are"
    )
    assert "numbers for a-b mentioned" in needle_prompt("numbers", ["a-b"], 4)[1]


@pytest.mark.parametrize(
    ("name", "key", "value", "keys", "answers"),
    [
        ("niah_single_1", "words", "numbers", 1, 1),
        ("niah_single_2", "words", "numbers", 1, 1),
        ("niah_single_3", "words", "uuids", 1, 1),
        ("niah_multikey_1", "words", "numbers", 4, 1),
        ("niah_multikey_2", "words", "numbers", 0, 1),
        ("niah_multikey_3", "uuids", "uuids", 0, 1),
        ("niah_multivalue", "words", "numbers", 1, 4),
        ("niah_multiquery", "words", "numbers", 4, 4),
    ],
)
def test_the_context_says_the_values_of_the_keys(name, key, value, keys, answers, data):
    forms = {"words": "[a-z]+-[a-z]+", "numbers": "[1-9][0-9]{6}", "uuids": UUID}
    said = rf"One of the special magic {value} for ({forms[key]}) is: ({forms[value]})\."
    for document in make(name, data, tokenizer=Bytes(), count=8):
        (ask,) = document.asks
        asked = re.findall(forms[key], ask.question)
        assert asked == re.findall(forms[key], ask.lead)
        assert len(ask.answers) == answers
        told = re.findall(said, document.context)
        assert sorted(ask.answers) == sorted(v for k in asked for k2, v in told if k2 == k)
        assert len({k for k, _ in told}) == keys or (keys == 0 and len(told) > 12)
        hay = "essay" if name in ("niah_single_2", "niah_single_3") else "noise"
        hay = "essay" if name in ("niah_multikey_1", "niah_multivalue", "niah_multiquery") else hay
        hay = "needle" if keys == 0 else hay
        assert ask.facts == {"haystack": hay}
        assert ("Sentence 1 has" in document.context) == (hay == "essay")
        assert (NOISE in document.context) == (hay == "noise")


def test_needles_lie_anywhere_and_essays_stay_in_order(data):
    made = make("niah_multikey_1", data, tokenizer=Bytes(), count=40, length=4096)
    places = []
    for document in made:
        hay = document.context.split("\n", 1)[1]
        found = [match.start() / len(hay) for match in re.finditer("One of the special", hay)]
        assert len(found) == 4
        places += found
        rest = re.sub(r"One of the special magic numbers for \S+ is: \d+\. ?", "", hay)
        words = rest.split()
        assert words == (ESSAY.split() * 3)[: len(words)]  # it starts anew where it is too short
    counts, _ = np.histogram(places, 5, (0, 1))
    assert counts.min() > 15


def test_without_an_essay_there_is_noise():
    (document,) = make("niah_single_3", tokenizer=Bytes(), count=1)
    assert document.asks[0].facts == {"haystack": "noise"}
    assert document.context.count(NOISE) > 5


def test_an_essay_may_be_rulers_json(tmp_path, data):
    (tmp_path / "essays.json").write_text(json.dumps({"text": ESSAY}))
    settings = {"tokenizer": Bytes(), "count": 1}
    texts = make("niah_single_2", haystack=data / "essay.txt", **settings)
    assert make("niah_single_2", haystack=tmp_path / "essays.json", **settings) == texts
    (tmp_path / "essays.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"haystack .*essays.json is \[1\], expected {\"text\""):
        make("niah_single_2", haystack=tmp_path / "essays.json", **settings)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"haystack .*empty.txt has no words, expected a text"):
        make("niah_single_2", haystack=tmp_path / "empty.txt", **settings)


def test_words_are_different():
    assert len({*ADJECTIVES}) == len(ADJECTIVES)
    assert len({*NOUNS}) == len(NOUNS)
    assert len(PLAIN) == len({*ADJECTIVES, *NOUNS, *VERBS}) > 1400
    keys = pairs(np.random.default_rng(0))
    drawn = [next(keys) for _ in range(5000)]
    assert len({*drawn}) == 5000


# ---------------------------------------------------------------------------- variables
def test_variables_are_those_of_the_asked_value(tokenizer):
    for document in make("vt", tokenizer=tokenizer, count=10):
        (ask,) = document.asks
        example, context = document.context.split("\n\nMemorize", 1)
        names, value = chain(context)
        assert len(names) == 5
        assert ask.answers == tuple(names)
        assert ask.question == (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        )
        assert ask.lead == (
            " Answer: According to the chain(s) of variable assignment in the text above, 5"
            f" variables are assigned the value {value}, they are: "
        )
        shown, other = chain(example)
        assert example.endswith(f" the value {other}, they are:  {' '.join(shown)}")
        assert {len(name) for name in names} == {5}
        assert {len(name) for name in shown} == {3}


def chain(text):
    """Names in the order of their assignments, and the value that the first one has."""
    (first,) = re.findall(r"VAR ([A-Z]+) = (\d{5})\n", text + "\n")
    names = [first[0]]
    for name, of in re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+) ", text):
        assert of == names[-1]
        names.append(name)
    return names, first[1]


def test_example_of_variables_has_rulers_500_tokens():
    (document,) = make("vt", tokenizer=Bytes(), count=1, length=16384)
    short = document.context.index("Memorize", 10)
    assert short < 1400  # RULER's limit of 500 tokens is below the smallest chain in bytes
    (document,) = make("vt", tokenizer=load_tokenizer(WEIGHTS), count=1, length=16384)
    example = document.context[: document.context.index("Memorize", 10)]
    assert 480 < len(example.split()) <= 500


# ---------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("length", "often", "seldom", "shown"), [(2048, 6, 1, (3, 1)), (8192, 30, 3, (10, 3))]
)
def test_common_words_are_the_most_common(length, often, seldom, shown, tokenizer):
    for document in make("cwe", tokenizer=tokenizer, length=length):
        (ask,) = document.asks
        begin = (
            "Below is a numbered list of words. In these words, some appear more often than others."
            " Memorize the ones that appear most often.\n"
        )
        _, example, listed = document.context.split(begin)
        counts = check_numbers(listed)
        assert {word for word, count in counts.items() if count == often} == {*ask.answers}
        assert {*counts.values()} == {often, seldom}
        assert len(ask.answers) == 10
        told, solved = example.split(ask.question + ask.lead + " ")
        counts = check_numbers(told)
        assert {*counts.values()} == {*shown}
        right = {word for word, count in counts.items() if count == shown[0]}
        assert {*check_numbers(solved.rstrip("\n"))} == right
        assert ask.question == "\nQuestion: What are the 10 most common words in the above list?"
        assert ask.lead == " Answer: The top 10 words that appear most often in the list are:"


def check_numbers(text):
    """Words of "1. word 2. word", counted."""
    pieces = text.split(" ")
    assert pieces[::2] == [f"{i + 1}." for i in range(len(pieces) // 2)]
    return Counter(pieces[1::2])


def test_frequent_words_follow_zipf(tokenizer):
    for length in (1536, 8192):
        for document in make("fwe", tokenizer=tokenizer, length=length):
            (ask,) = document.asks
            begin = (
                "Read the following coded text and track the frequency of each coded word. Find the"
                " three most frequently appeared coded words. "
            )
            assert document.context.startswith(begin)
            counts = Counter(document.context.removeprefix(begin).split(" ")).most_common()
            assert counts[0][0] == "..."
            assert {word for word, _ in counts[1:4]} == {*ask.answers}
            assert counts[3][1] > counts[4][1]
            assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])
            total = counts[0][1]
            for rank in (1, 2, 3):
                assert abs(counts[rank][1] - total / (rank + 1) ** 2) < 2
            assert ask.lead.endswith("the three most frequently appeared words are:")


# ---------------------------------------------------------------------------- settings
def test_what_a_task_needs_is_said():
    with pytest.raises(ConfigError, match="tokenizer=None, expected a Hugging Face tokenizer to"):
        make("vt")
    with pytest.raises(ConfigError, match="length=None, expected a number of tokens for task rul"):
        make("vt", tokenizer=Bytes(), length=None)
    with pytest.raises(ConfigError, match="data=None, expected the task's file, or a folder"):
        make("qa_1", tokenizer=Bytes())
    with pytest.raises(
        ConfigError, match=r"length=900, expected at least 1... tokens for task rul"
    ):
        make("vt", tokenizer=Bytes(), length=900)
    with pytest.raises(ConfigError, match="length=100, expected more than the answer's 120 and"):
        make("cwe", tokenizer=Bytes(), length=100)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("length", 0), ("count", 0), ("seed", -1), ("reserve", -1)),
        *(("questions", 0), ("continuation", 0), ("length", True)),
    ],
)
def test_numbers_out_of_range_are_one_sentence(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value!r}, expected an integer of at least"):
        TaskSettings(**{field: value})


def test_depths_and_lengths_out_of_range_are_one_sentence():
    with pytest.raises(ConfigError, match=r"depths has 1.5, expected numbers from 0 to 1"):
        TaskSettings(depths=(0.5, 1.5))
    with pytest.raises(ConfigError, match=r"lengths has 0, expected integers of at least 1"):
        TaskSettings(lengths=(64, 0))


def test_largest_is_found_from_any_guess():
    for limit in range(0, 60):
        for guess in (None, 0, 3, 7, 100, 10**6):
            found = largest(lambda n: 3 * n + 5, limit, 3, 15, guess)
            wanted = min((limit - 5) // 3, 15)
            assert found == (wanted if wanted >= 3 else None)
