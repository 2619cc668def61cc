"""Texts with hidden facts, and tables of what was measured on them."""

from pathlib import Path

import numpy as np
import pytest

from kvjax.studies import real_report, real_texts
from kvjax.studies.real_models import SURVEYED, ten_best
from kvjax.studies.real_texts import Text

RESULTS = Path(__file__).parents[2] / "docs" / "real_models"
NOVEL = " ".join(f"Sentence {number} says little." for number in range(100_000))


class Words:
    """A tokenizer whose tokens are words; ids grow with new words."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [self.ids.setdefault(w, len(self.ids)) for w in text.split()]}

    def decode(self, ids):
        words = list(self.ids)
        return " ".join(words[i] for i in ids)


@pytest.fixture(scope="module")
def words():
    return Words()


@pytest.fixture(scope="module")
def texts(words):
    return list(real_texts.fact_texts(NOVEL, words))


def test_every_fact_stands_once_in_its_context(texts, words):
    unseen = [text for text in texts if text.part == "unseen"]
    assert len(unseen) == real_texts.CONTEXTS
    for text in unseen:
        assert len(text.prompt) == real_texts.CONTEXT_TOKENS
        context = words.decode(text.prompt)
        for row in text.follows:
            assert context.count(words.decode(row) + ".") == 1


def test_a_seen_question_ends_the_same_context(texts):
    contexts = {text.name: text for text in texts if text.part == "unseen"}
    seen = [text for text in texts if text.part == "seen"]
    assert len(seen) == real_texts.SEEN * real_texts.CONTEXTS
    for text in seen:
        whole = contexts[text.name[:2]]
        row = whole.follows[int(text.name[3:])]
        assert [*text.prompt, *text.follows[0]] == [*whole.prompt, *row]


def test_prefixes_go_on_in_the_novel(words):
    texts = list(real_texts.novel_texts(NOVEL, words))
    assert {text.name: len(text.prompt) for text in texts} == {
        f"{tokens}-{number:02}": tokens
        for tokens, count in real_texts.PREFIXES.items()
        for number in range(count)
    }
    assert all(words.decode([*t.prompt, *t.follows[0]]) in NOVEL for t in texts)


def test_the_best_are_those_of_the_survey():
    later = {"name": f"{SURVEYED:02}", "method": "late", "right": "1111"}
    rows = [
        {"name": "00", "method": "full", "right": "1111"},
        {"name": "00", "method": "good", "right": "0111"},
        {"name": "01", "method": "poor", "right": "0001"},
        {"name": "00", "method": "poor", "right": "0001"},
        later,
    ]
    assert ten_best(rows) == ["good", "poor"]


def row(method, budget, name, right="", nll="1.0"):
    return {"method": method, "budget": budget, "name": name, "right": right, "nll": nll}


def test_questions_about_one_context_are_one_draw():
    rows = real_report.by_method(
        [row("kvzip", "0.25", "00-1", "1"), row("kvzip", "0.25", "00-5", "0"),
         row("kvzip", "0.25", "01-2", "1")]
    )  # fmt: skip
    assert real_report.shares(rows["kvzip", "0.25"]) == {"00": 0.5, "01": 1.0}


def test_the_novels_table_has_differences_to_the_full_cache():
    rows = [row("full", "1", "1024-00", nll="2.0"), row("full", "1", "1024-01", nll="3.0")]
    for budget in ("0.5", "0.25", "0.1", "0.05"):
        rows += [
            row("snapkv", budget, "1024-00", nll="2.5"),
            row("snapkv", budget, "1024-01", nll="3.1"),
        ]
        rows += [row("h2o", budget, "1024-00", nll="2.25")]
    made = real_report.novel_table(real_report.by_method(rows))
    assert "| `snapkv` | +0.300 | +0.300 | +0.300 | +0.300 |" in made
    assert "| `h2o` | +0.250 (1) |" in made  # counted where not all were run


def test_the_best_are_compared_on_the_contexts_that_both_have():
    names = [f"{number:02}" for number in range(SURVEYED + 1)]
    mine = [row("kvzip", "0.25", name, "11") for name in names]
    mine += [row("key-diff", "0.25", name, "10") for name in names]
    theirs = [row("kvzip", "0.25", name, "10") for name in names]
    made = real_report.best_table(
        real_report.by_method(mine), real_report.by_method(theirs), "unseen"
    )
    assert "| 25 % | `kvzip` | `kvzip` | +50.0 [+50.0, +50.0] | 8 |" in made


def test_texts_are_read_as_they_were_written(tmp_path):
    text = Text("unseen", "00", [1, 2], [[3]], [1])
    path = tmp_path / "texts.jsonl"
    real_texts.write_texts([text], path)
    assert real_texts.read_texts(path) == [text]


def test_positions_of_other_runs_stay(tmp_path):
    """A run that goes on has the positions of what was missing alone."""
    mine, theirs, out = tmp_path / "kept", tmp_path / "kept_kvpress", tmp_path / "kept.csv"
    for folder, bits in ((mine, 0b1110), (theirs, 0b0111)):
        folder.mkdir()
        np.savez(folder / "2048-00.npz", **{"tova 0.5": np.array([[[bits]]], np.uint8)})
    out.write_text("name,method,budget,kept,same\n1024-00,tova,0.5,8,7\n2048-00,tova,0.5,1,1\n")
    real_report.count_same(mine, theirs, out)
    assert out.read_text().splitlines()[1:] == ["1024-00,tova,0.5,8,7", "2048-00,tova,0.5,3,2"]


def report(results, out, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", "--results", str(results), "-o", str(out)])
    real_report.main()
    return out.read_text()


def test_the_committed_tables_are_those_of_the_rows(tmp_path, monkeypatch):
    committed = (RESULTS / "tables.md").read_text()
    assert report(RESULTS, tmp_path / "tables.md", monkeypatch) == committed


def test_few_rows_make_few_sections(tmp_path, monkeypatch):
    (tmp_path / "kvjax_unseen.csv").write_text(
        "part,name,method,budget,kept,nll,right\nunseen,00,full,1,9,0.1,1\n"
    )
    made = report(tmp_path, tmp_path / "tables.md", monkeypatch)
    titles = [line for line in made.splitlines() if line.startswith("#")]
    assert titles == ["# SmolLM2-135M, measured", "## Answers right, question unseen"]
