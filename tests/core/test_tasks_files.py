"""Lines, key-value pairs, needles, texts and the bundled model's words, drawn and from files."""

import gzip
import json
import re

import pytest
from tasks_data import NAMES, UUID, Bytes, make, used, write

from kvjax.config import ConfigError
from kvjax.eval.tasks import METRICS, TASKS
from kvjax.eval.tasks.lengths import prompt_tokens, tokens_of
from kvjax.eval.tasks.longbench_prompts import PROMPTS
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.tiny import WEIGHTS
from kvjax.tiny.questions import QUESTIONS, questions


@pytest.fixture(scope="module")
def bundled():
    return load_tokenizer(WEIGHTS)


@pytest.fixture(scope="module", params=["bundled", "bytes"])
def tokenizer(request, bundled):
    return Bytes() if request.param == "bytes" else bundled


def test_the_table_has_every_task():
    assert [*TASKS] == [
        *(f"ruler/{name}" for name in NAMES),
        *(f"longbench/{name}" for name in PROMPTS),
        *("longeval/lines", "lost-in-the-middle/kv", "needle"),
        *(f"tiny/{name}" for name in QUESTIONS),
        *("perplexity", "rouge", "vision/perplexity", "vision/rouge"),
    ]
    assert all(task.name == name and task.source for name, task in TASKS.items())
    with pytest.raises(TypeError):
        TASKS["new"] = TASKS["needle"]


# ---------------------------------------------------------------------------- LongEval
def test_lines_are_longevals(tokenizer):
    made = make("longeval/lines", tokenizer=tokenizer, length=2048, count=12, seed=3)
    assert made == make("longeval/lines", tokenizer=tokenizer, length=2048, count=12, seed=3)
    places = set()
    for document in made:
        assert 1950 < used(tokenizer, document) <= 2048
        (ask,) = document.asks
        begin, record = document.context.split("\n\n")
        assert begin.startswith("Below is a record of lines I want you to remember. Each line begi")
        lines = record.splitlines()
        told = {}
        for line in lines:
            key, value = re.fullmatch(r"line (\S+): REGISTER_CONTENT is <(\d+)>", line).groups()
            told[key] = value
        assert len(told) == len(lines)
        key = re.search(r"in line (\S+)\?", ask.question)[1]
        assert ask.answers == (told[key],)
        assert ask.facts == {"lines": len(lines), "position": [*told].index(key)}
        assert ask.question == (
            "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line"
            f" {key}? I need the number."
        )
        assert (ask.new_tokens, ask.metric) == (100, "last-number")
        places.add(ask.facts["position"])
    assert len(places) > 6


def test_real_rows_of_longeval(shared_data):
    for lines in (200, 600):
        path = shared_data / "longeval" / f"{lines}_lines.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        made = make("longeval/lines", data=path)
        assert len(made) == 20
        for index, (source, document) in enumerate(zip(rows, made, strict=True)):
            (ask,) = document.asks
            assert document.id == f"longeval/lines/{index}"
            assert document.context + ask.question == source["prompt"]
            assert source["correct_line"] in document.context
            assert ask.answers == (str(source["expected_number"]),)
            assert ask.facts == {"lines": lines}
            assert METRICS[ask.metric](source["correct_line"], ask.answers) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"prompt": "x", "expected_number": 1},
            r'line 1: "prompt" has no .*, expected a prompt of',
        ),
        (
            {"prompt": "x\nNow the record is over."},
            r'line 1: "expected_number" is None, expected a',
        ),
        ({"expected_number": 1}, r'line 1: "prompt" is None, expected a text'),
    ],
)
def test_a_broken_row_of_longeval_is_one_sentence(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"rows.jsonl {message}"):
        make("longeval/lines", data=write(tmp_path / "rows.jsonl", line))


# ---------------------------------------------------------------------------- pairs
def test_pairs_are_json(tokenizer):
    depths = (0.0, 0.25, 1.0)
    name = "lost-in-the-middle/kv"
    made = make(name, tokenizer=tokenizer, length=2048, count=6, depths=depths)
    for index, document in enumerate(made):
        assert 1940 < used(tokenizer, document) <= 2048
        (ask,) = document.asks
        told = check_pairs(document, ask)
        assert ask.facts["position"] == int(depths[index % 3] * (len(told) - 1))
    free = make(name, tokenizer=tokenizer, length=2048, count=8)
    assert len({document.asks[0].facts["position"] for document in free}) > 3


def check_pairs(document, ask):
    begin, told = document.context.split("\n\nJSON data:\n")
    assert begin == "Extract the value corresponding to the specified key in the JSON object below."
    pairs = json.loads(told)
    key = re.fullmatch(rf'\n\nKey: "({UUID})"\nCorresponding value:', ask.question)[1]
    assert ask.answers == (pairs[key],)
    assert re.fullmatch(UUID, pairs[key])
    assert ask.facts == {"keys": len(pairs), "position": [*pairs].index(key)}
    assert (ask.new_tokens, ask.metric) == (100, "substring")
    return pairs


def test_real_rows_of_pairs(shared_data, tmp_path):
    path = shared_data / "lost_in_the_middle" / "kv_retrieval_75_keys.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    made = make("lost-in-the-middle/kv", data=path)
    (tmp_path / "kv.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert make("lost-in-the-middle/kv", data=tmp_path) == made
    assert len(made) == 50
    for source, document in zip(rows, made, strict=True):
        (ask,) = document.asks
        told = check_pairs(document, ask)
        assert [[key, value] for key, value in told.items()] == source["ordered_kv_records"]
        assert ask.answers == (source["value"],)
    moved = make("lost-in-the-middle/kv", data=path, depths=(0.0, 0.5, 1.0), count=3)
    # Positions of the authors' experiments: 0, 37 and 74 of 75.
    assert [document.asks[0].facts["position"] for document in moved] == [0, 37, 74]
    for before, after in zip(made, moved, strict=False):
        assert after.asks[0].answers == before.asks[0].answers
        assert check_pairs(after, after.asks[0]) == check_pairs(before, before.asks[0])


def test_a_prompt_of_pairs_is_written_as_by_its_authors(tmp_path):
    pairs = [["a", "1"], ["b", "2"], ["c", "3"]]
    path = write(tmp_path / "r.jsonl", {"ordered_kv_records": pairs, "key": "b", "value": "2"})
    (document,) = make("lost-in-the-middle/kv", data=path)
    assert document.context + document.asks[0].question == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        'JSON data:\n{"a": "1",\n "b": "2",\n "c": "3"}\n\nKey: "b"\nCorresponding value:'
    )
    with pytest.raises(ValueError, match=r"r.jsonl line 1 has 155 tokens beside its answer's 100"):
        make("lost-in-the-middle/kv", data=path, tokenizer=Bytes(), length=200)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({}, r'line 1: "ordered_kv_records" is None, expected a list'),
        ({"ordered_kv_records": [1]}, r'line 1: "ordered_kv_records" has 1, expected \[key, value'),
        ({"ordered_kv_records": [["a", "b"]], "key": "a"}, r'line 1: "value" is None, expected a'),
        (
            {"ordered_kv_records": [["a", "b"]], "key": "a", "value": "c"},
            r'line 1: "key" a has not its "value", expected the pair',
        ),
    ],
)
def test_a_broken_row_of_pairs_is_one_sentence(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"rows.jsonl {message}"):
        make("lost-in-the-middle/kv", data=write(tmp_path / "rows.jsonl", line))


# ---------------------------------------------------------------------------- needle
def test_needles_are_at_every_depth_of_every_length(tokenizer, tmp_path):
    (tmp_path / "essay.txt").write_text("One short sentence stands here. " * 20)
    for haystack in (None, tmp_path / "essay.txt"):
        made = make("needle", tokenizer=tokenizer, lengths=(1024, 4096), haystack=haystack)
        assert len(made) == 22
        cells = []
        for document in made:
            (ask,) = document.asks
            length, depth = ask.facts["length"], ask.facts["depth"]
            cells.append((length, depth))
            assert length - 120 < used(tokenizer, document) <= length
            (answer,) = ask.answers
            hay = document.context.split("\n", 1)[1]
            assert f"is: {answer}." in hay
            needle = re.search(r"One of the special magic numbers for \S+ is: \d+\.", hay)
            rest = len(hay) - len(needle[0])
            assert needle.start() / rest == pytest.approx(depth, abs=100 / rest)
        assert cells == [(length, d / 10) for length in (1024, 4096) for d in range(11)]
    made = make("needle", tokenizer=tokenizer, length=1024, count=5, depths=(0.0, 0.5))
    assert [document.asks[0].facts["depth"] for document in made] == [0, 0.5, 0, 0.5, 0]
    assert len({document.asks[0].answers for document in made}) == 5
    with pytest.raises(
        ConfigError, match=r"length=100, expected at least ... tokens for task need"
    ):
        make("needle", tokenizer=Bytes(), lengths=(2048, 100))


# ---------------------------------------------------------------------------- texts
def test_texts_are_cut_into_prefixes_and_continuations(tokenizer, tmp_path):
    words = [f"{w}{i}" for i in range(400) for w in ("The", "old", "fox")]
    text = "".join(word + ("\n\n" if i % 17 == 0 else " ") for i, word in enumerate(words))
    (tmp_path / "text.txt").write_text("\ufeff  " + text)
    settings = {"tokenizer": tokenizer, "data": tmp_path / "text.txt", "continuation": 40}
    for name, metric in (("perplexity", "perplexity"), ("rouge", "rouge-l")):
        made = make(name, length=200, **settings)
        joined = ""
        for index, document in enumerate(made):
            (ask,) = document.asks
            assert (ask.question, ask.lead, ask.metric) == ("", "", metric)
            assert document.id == f"{name}/{index}"
            assert ask.new_tokens == 40
            (rest,) = ask.answers
            assert 150 < prompt_tokens(tokenizer, document.context, "") <= 160
            assert 30 < len(tokens_of(tokenizer, rest)) <= 40
            assert prompt_tokens(tokenizer, document.context, rest) <= 200
            joined += document.context + rest + " "
        assert joined.split() == words[: len(joined.split())]
        assert len(joined.split()) > len(words) - 201
        assert document.context in text
        assert make(name, length=200, count=2, **settings) == made[:2]
        with pytest.raises(
            ValueError, match=r"text.txt has no 20000 tokens in a row, expected a lo"
        ):
            make(name, length=20000, **settings)
        with pytest.raises(ConfigError, match=r"length=None, expected a number of tokens"):
            make(name, **settings)


def test_stories_are_apart(bundled, tmp_path):
    story = "the old baker finds one stone . " * 30
    (tmp_path / "text.txt").write_text(f"{story}\n<|endoftext|>\nshort\n<|endoftext|>\n{story}")
    made = make(
        "perplexity", tokenizer=bundled, data=tmp_path / "text.txt", length=100, continuation=20
    )
    assert len(made) == 4
    assert made[0].context == made[2].context
    assert made[0].asks[0].answers == made[2].asks[0].answers
    assert made[0].context.startswith("the old baker")
    assert len(made[0].context.split()) == 79  # and the start of the text before them


# ---------------------------------------------------------------------------- the bundled model
@pytest.mark.parametrize("name", QUESTIONS)
def test_words_are_those_of_the_study(name, bundled):
    """Documents and first questions of `kvjax.tiny.questions`, word for word."""
    made = make(f"tiny/{name}", tokenizer=bundled, length=528, count=8, seed=2, questions=3)
    for index, (document, item) in enumerate(
        zip(made, questions(name, 512, 8, seed=2), strict=True)
    ):
        assert tokens_of(bundled, document.context, special=True) == list(item.document)
        first = document.asks[0]
        assert tokens_of(bundled, first.question) == list(item.question)
        assert tokens_of(bundled, first.answers[0]) == list(item.answer)
        assert first.new_tokens == len(item.answer)
        assert used(bundled, document) <= 528
        assert [ask.id for ask in document.asks] == [
            f"tiny/{name}/{index}/{place}" for place in range(len(document.asks))
        ]
        assert len({ask.question for ask in document.asks}) == len(document.asks) <= 3
        for ask in document.asks:
            assert METRICS[ask.metric](
                bundled.decode(tokens_of(bundled, ask.answers[0])), ask.answers
            )
            for word in ask.answers[0].split():
                assert f" {word} " in document.context
    most = {"single": 1, "frequent": 1, "multikey": 3}.get(name, 2)
    assert {len(document.asks) for document in made} == {most}


def test_words_need_their_own_tokenizer_and_room():
    with pytest.raises(ConfigError, match="tokenizer of another vocabulary, expected the bundled"):
        make("tiny/single", tokenizer=Bytes(), length=200)
    with pytest.raises(
        ConfigError, match="length=79, expected at least 80 tokens for task tiny/si"
    ):
        make("tiny/single", length=79)
    (document,) = make("tiny/single", length=80, count=1)
    assert document.asks[0].metric == "exact"
