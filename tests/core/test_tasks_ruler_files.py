"""RULER's questions from files of SQuAD and HotpotQA, and its own finished prompts."""

import json
import re

import pytest
from tasks_data import NAMES, UUID, Bytes, whole, write_ruler
from tasks_data import make_ruler as make

from kvjax.config import ConfigError
from kvjax.eval.tasks.ruler_needles import needle, needle_prompt


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_ruler(tmp_path_factory.mktemp("ruler"))


# ---------------------------------------------------------------------------- questions
def test_questions_stand_among_other_paragraphs(data):
    for index, document in enumerate(make("qa_1", data, tokenizer=Bytes(), count=20)):
        (ask,) = document.asks
        number = f"{index // 4}{index % 4}"
        assert ask.answers == (f"answer {number}",) * 2
        assert f"The answer {number} stands" in document.context
        assert ask.question.endswith(
            f"\n\nAnswer the question based on the given documents. Only give me the answer and do"
            f" not output any other words.\n\nQuestion: What is {number}?"
        )
        assert ask.lead == " Answer:"
        told = re.findall(r"Document (\d+):\nThe answer (\d)(\d)", document.context)
        assert [int(place) for place, _, _ in told] == list(range(1, len(told) + 1))
        # Paragraphs of the same article come first, and then others; none twice while they last.
        assert {f"{index // 4}{p}" for p in range(4)} <= {a + p for _, a, p in told}
        assert len({a + p for _, a, p in told}) == min(len(told), 12)
    assert index == 11  # those without an answer are not asked


def test_questions_of_several_paragraphs_have_all_of_them(data):
    for index, document in enumerate(make("qa_2", data, tokenizer=Bytes(), length=1024, count=9)):
        (ask,) = document.asks
        assert ask.answers == (f"person {index}",)
        for paragraph in range(3):
            assert f"Title {index}{paragraph}\nHere is person {index}. More." in document.context
    assert index == 3


def test_questions_with_too_long_paragraphs_are_left_out(tmp_path):
    rows = [
        {"question": str(i), "answer": "a", "context": [["T", ["word " * size]]]}
        for i, size in enumerate((5, 500, 6))
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(rows))
    made = make("qa_2", tmp_path, tokenizer=Bytes(), length=1024, haystack=None)
    assert [document.id for document in made] == ["ruler/qa_2/0", "ruler/qa_2/2"]
    with pytest.raises(ConfigError, match="length=300, expected at least 354 tokens for task"):
        make("qa_2", tmp_path, tokenizer=Bytes(), length=300, haystack=None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qa_1", [], r'file.json: "data" is None, expected a list'),
        ("qa_1", {"data": []}, "file.json has no question with an answer"),
        ("qa_1", {"data": [{"paragraphs": 3}]}, r'article 0: "paragraphs" is 3, expected a list'),
        (
            "qa_1",
            {
                "data": [
                    {"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}
                ]
            },
            r'article 0: "answers" is \[\], expected a list of at least one text',
        ),
        ("qa_2", {}, "file.json is {}, expected a list of questions"),
        ("qa_2", [{"context": [["t", "x"]]}], r"question 0: .context. has \['t', 'x'\], expected"),
        ("qa_2", [{"context": [], "answer": 1}], r'question 0: "answer" is 1, expected a text'),
    ],
)
def test_a_broken_file_of_questions_is_one_sentence(tmp_path, name, value, message):
    (tmp_path / "file.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        make(name, tmp_path / "file.json", tokenizer=Bytes(), haystack=None)


# ---------------------------------------------------------------------------- files
def test_real_rows_are_what_is_drawn_here(shared_data):
    """Each of RULER's own prompts is put together again from its needles."""
    path = shared_data / "ruler" / "niah_multikey_3_4096.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    made = make("niah_multikey_3", path, length=None, count=None, haystack=None)
    assert len(made) == len(rows) == 50
    for row, document in zip(rows, made, strict=True):
        (ask,) = document.asks
        assert whole(document) == row["input"]
        assert list(ask.answers) == row["outputs"]
        (key,) = re.findall(UUID, ask.question)
        before, question, lead = needle_prompt("uuids", [key], 1)
        told = re.findall(rf"for ({UUID}) is: ({UUID})\.", document.context)
        assert document.context == before + "\n".join(needle("uuids", k, v) for k, v in told)
        assert (ask.question, ask.lead) == (question, lead)
        assert dict(told)[key] == ask.answers[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("apart", [False, True])
def test_what_is_written_in_rulers_form_is_read_again(name, apart, data, tmp_path):
    """With the answer prefix apart, as RULER has it now, and inside the input, as it had."""
    made = make(name, data, tokenizer=Bytes(), count=2)
    folder = tmp_path / name
    folder.mkdir()
    with (folder / "validation.jsonl").open("w") as file:
        for index, document in enumerate(made):
            (ask,) = document.asks
            row = {"index": index, "outputs": ask.answers, "length": 2048}
            end = {"answer_prefix": ask.lead} if apart else {}
            text = document.context + ask.question + ("" if apart else ask.lead)
            file.write(json.dumps(row | {"input": text} | end) + "\n")
    read = make(name, tmp_path, length=None, count=None, haystack=None)
    for one, other in zip(made, read, strict=True):
        assert one.context == other.context
        (first,), (second,) = one.asks, other.asks
        for field in ("id", "question", "lead", "answers", "new_tokens", "metric"):
            assert getattr(first, field) == getattr(second, field)
    assert len(make(name, folder / "validation.jsonl", length=None, count=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", r"line 2 is \[1\], expected a JSON object"),
        ('{"input": 3}', 'line 2: "input" is 3, expected a text'),
        (
            '{"input": "x", "outputs": ["1"]}',
            r'line 2: "input" has no .*, expected a prompt of rul',
        ),
        ('{"input": "x\\nWhat ", "outputs": []}', r'line 2: "outputs" is \[\], expected a list of'),
        ('{"input": "x\\nWhat ", "outputs": "1"}', r"line 2: \"outputs\" is '1', expected a list"),
        ('{"input": "%s\\nWhat ", "outputs": ["1"]}' % ("x" * 99), "line 2 has 106 tokens beside"),
    ],
)
def test_a_broken_row_is_one_sentence_with_file_and_line(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"input": "x\\nWhat ", "outputs": ["1"]}\n' + line)
    with pytest.raises(ValueError, match=f"rows.jsonl {message}"):
        make("niah_single_1", tmp_path / "rows.jsonl", tokenizer=Bytes(), length=200, count=None)
