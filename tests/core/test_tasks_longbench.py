"""LongBench's tasks, and files that are not what they should be."""

import hashlib
import json

import pytest
from tasks_data import Bytes, make, used, write

from kvjax.config import ConfigError
from kvjax.eval.tasks import METRICS, TASKS
from kvjax.eval.tasks.lengths import cut_middle, prompt_tokens
from kvjax.eval.tasks.longbench_prompts import PROMPTS
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.tiny import WEIGHTS

# task -> (most new tokens, metric), LongBench's dataset2maxlen.json and eval.py.
LONGBENCH = {
    "narrativeqa": (128, "f1"),
    "qasper": (128, "f1"),
    "multifieldqa_en": (64, "f1"),
    "multifieldqa_zh": (64, "f1-zh"),
    "hotpotqa": (32, "f1"),
    "2wikimqa": (32, "f1"),
    "musique": (32, "f1"),
    "dureader": (128, "rouge-l-zh"),
    "gov_report": (512, "rouge-l"),
    "qmsum": (512, "rouge-l"),
    "multi_news": (512, "rouge-l"),
    "vcsum": (512, "rouge-l-zh"),
    "trec": (64, "line-classification"),
    "triviaqa": (32, "line-f1"),
    "samsum": (128, "line-rouge-l"),
    "lsht": (64, "line-classification"),
    "passage_count": (32, "count"),
    "passage_retrieval_en": (32, "retrieval"),
    "passage_retrieval_zh": (32, "retrieval-zh"),
    "lcc": (64, "edit-similarity"),
    "repobench-p": (64, "edit-similarity"),
}


@pytest.fixture(scope="module")
def bundled():
    return load_tokenizer(WEIGHTS)


# ---------------------------------------------------------------------------- LongBench
def row(context="The context.", question="Which?", **others):
    given = {"input": question, "context": context, "answers": ["Paragraph 1 段落1"], "_id": "7"}
    return given | {"all_classes": ["A", "B"], "length": 5, "language": "en"} | others


@pytest.mark.parametrize("name", LONGBENCH)
def test_longbench_prompts_answers_and_metrics(name, tmp_path):
    path = write(tmp_path / "rows.jsonl", row(dataset=name))
    (document,) = make(f"longbench/{name}", data=path)
    (ask,) = document.asks
    template = PROMPTS[name].template
    filled = template.replace("{context}", "The context.").replace("{input}", "Which?")
    assert document.context + ask.question == filled
    assert document.context.endswith("The context.")
    assert (ask.new_tokens, ask.metric) == LONGBENCH[name]
    assert ask.id == document.id == f"longbench/{name}/7"
    assert ask.answers == ("Paragraph 1 段落1",)
    assert ask.classes == (("A", "B") if name in ("trec", "lsht") else ())
    assert ask.facts == {"length": 5, "language": "en"}
    assert ask.lead == ""
    # Chat templates are LongBench's for all but these.
    plain = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert TASKS[f"longbench/{name}"].chat == (name not in plain)


def test_longbench_templates_are_its_own():
    """The digest of its dataset2prompt.json at commit 2e00731f."""
    templates = {name: prompt.template for name, prompt in PROMPTS.items()}
    text = json.dumps(templates, sort_keys=True, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e7d865d712fe45e2"
    assert PROMPTS["triviaqa"].template == (
        "Answer the question based on the given passage. Only give me the answer and do not output"
        " any other words. The following are some examples.\n\n{context}\n\n{input}"
    )


def test_questions_about_one_context_are_one_document(tmp_path):
    rows = [row("one", "a", _id="1"), row("two", "b", _id="2"), row("one", "c", _id="3")]
    write(tmp_path / "qasper.jsonl", *rows)
    first, second = make("longbench/qasper", data=tmp_path)
    assert [ask.id for ask in first.asks] == ["longbench/qasper/1", "longbench/qasper/3"]
    assert [ask.id for ask in second.asks] == ["longbench/qasper/2"]
    assert [document.id for document in make("longbench/qasper", data=tmp_path, count=1)] == [
        "longbench/qasper/1"
    ]


def test_the_middle_of_a_long_prompt_is_cut(tmp_path):
    words = " ".join(f"w{i:03}" for i in range(300))
    path = write(tmp_path / "rows.jsonl", row(words), row(words, "Which of all of them? " * 3))
    (whole,) = make("longbench/hotpotqa", data=path)
    (cut,) = make("longbench/hotpotqa", data=path, tokenizer=Bytes(), length=1032)
    assert used(Bytes(), cut) == 1032
    # 999 bytes beside the token before the text: 499 of the beginning, 500 of the end.
    longest = cut.asks[1].question
    assert cut.asks == whole.asks
    assert cut.context[:499] == whole.context[:499]
    assert cut.context[499:] == whole.context[-(500 - len(longest)) :]
    (same,) = make("longbench/hotpotqa", data=path, tokenizer=Bytes(), length=8000)
    assert same == whole


def test_a_long_question_loses_its_middle_too(tmp_path):
    path = write(tmp_path / "rows.jsonl", row("c" * 900, "q" * 900, _id="3"))
    (cut,) = make("longbench/repobench-p", data=path, tokenizer=Bytes(), length=465)
    assert cut.context.endswith("cc")
    assert len(cut.context) == 200
    assert cut.asks[0].question == "q" * 181 + "Next line of code:\n"
    assert used(Bytes(), cut) == 465


def test_cut_text_is_never_longer_than_asked(bundled):
    text = "the old baker finds one stone . " * 40
    for limit in range(8, 60):
        context, question = cut_middle(bundled, text, " ask badi", limit)
        assert question == " ask badi"
        # Halves are put together without a space, as in LongBench: two words may become one.
        assert limit - 1 <= prompt_tokens(bundled, context, question) <= limit
    # Halves of characters are more tokens when they are read again.
    for limit in range(40, 90):
        context, _ = cut_middle(Bytes(), "北京" * 50, "", limit)
        assert limit - 12 < prompt_tokens(Bytes(), context, "") <= limit


def test_real_rows_of_longbench(shared_data):
    from transformers import PreTrainedTokenizerFast

    path = shared_data / "tokenizers" / "gpt2" / "tokenizer.json"
    gpt2 = PreTrainedTokenizerFast(tokenizer_file=str(path))
    for name, count in (("multi_news", 50), ("passage_retrieval_zh", 20)):
        path = shared_data / "longbench" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        made = make(f"longbench/{name}", data=path.parent)
        assert len(made) == len(rows) == count
        for document, source in zip(made, rows, strict=True):
            (ask,) = document.asks
            prompt = PROMPTS[name].template.replace("{input}", source["input"])
            assert document.context + ask.question == prompt.replace("{context}", source["context"])
            assert list(ask.answers) == source["answers"]
            assert METRICS[ask.metric](ask.answers[0], ask.answers, ()) > 0.999
        cut = make(f"longbench/{name}", data=path, tokenizer=gpt2, length=1024, count=3)
        assert all(1015 < used(gpt2, document) <= 1024 for document in cut)


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("qasper", {"context": None}, r'line 2: "context" is None, expected a text'),
        ("qasper", {"input": 3}, r'line 2: "input" is 3, expected a text'),
        (
            "qasper",
            {"answers": "yes"},
            r"line 2: \"answers\" is 'yes', expected a list of at least",
        ),
        ("qasper", {"answers": []}, r'line 2: "answers" is \[\], expected a list of at least one'),
        ("qasper", {"dataset": "lcc"}, r"line 2: \"dataset\" is 'lcc', expected 'qasper'"),
        ("trec", {"all_classes": None}, r'line 2: "all_classes" is None, expected a list'),
        (
            "passage_retrieval_zh",
            {"answers": ["3"]},
            r"line 2: \"answers\" has '3', expected one like \"段落1\"",
        ),
    ],
)
def test_a_broken_row_of_longbench_is_one_sentence(tmp_path, name, broken, message):
    write(tmp_path / "rows.jsonl", row(), row(**broken))
    with pytest.raises(ValueError, match=rf"rows.jsonl {message}"):
        make(f"longbench/{name}", data=tmp_path / "rows.jsonl")


def test_longbench_e_is_read_too(tmp_path):
    write(tmp_path / "rows.jsonl", row(dataset="qasper_e"))
    assert len(make("longbench/qasper", data=tmp_path / "rows.jsonl")) == 1


# ---------------------------------------------------------------------------- files
def test_files_that_cannot_be_read_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="data=None, expected the task's file, or a folder"):
        make("longbench/lcc")
    with pytest.raises(ConfigError, match=r"is a folder without lcc.jsonl, expected the file of"):
        make("longbench/lcc", data=tmp_path)
    with pytest.raises(ConfigError, match=r"is a folder, expected the file of task rouge"):
        make("rouge", data=tmp_path, tokenizer=Bytes(), length=500)
    with pytest.raises(FileNotFoundError):
        make("longbench/lcc", data=tmp_path / "none.jsonl")
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"rows.jsonl is empty, expected at least one line"):
        make("longbench/lcc", data=tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"rows.jsonl is not UTF-8 text \(.*, byte 0\)"):
        make("longbench/lcc", data=tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl.gz").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is not a gzip file"):
        make("longbench/lcc", data=tmp_path / "rows.jsonl.gz")
    write(tmp_path / "lcc.jsonl", row())
    with pytest.raises(ConfigError, match="tokenizer=None, expected one to measure length=9000"):
        make("longbench/lcc", data=tmp_path, length=9000)
