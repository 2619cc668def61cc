"""Needles answered from every method's cache, on a model with random weights."""

import dataclasses
import re
from pathlib import Path

import pytest

import kvjax
from kvjax.eval import needles
from kvjax.tiny.questions import questions
from kvjax.tiny.settings import Settings, load_settings
from kvjax.tiny.train import export, new_model
from kvjax.tiny.vocabulary import ID

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The shipped settings made small, before any training."""
    settings = load_settings(ROOT / "configs" / "tiny.toml")
    small: Settings = dataclasses.replace(settings, layers=1, width=16, mlp=16, head_dim=8)
    return export(new_model(small), small, tmp_path_factory.mktemp("needles") / "model")


def test_notes_are_found_in_a_document():
    item = questions("multikey", 512, 1)[0]
    spans, asked = needles.needles(item)
    tokens = list(item.document)
    assert len(spans) == 16
    assert asked in spans
    assert [ID["note"], item.question[1], *item.answer] == tokens[slice(*asked)]


def test_answers_tables_and_a_picture(directory, tmp_path, capsys, monkeypatch):
    some = {name: kvjax.METHODS[name] for name in ("full", "snapkv", "random")}
    monkeypatch.setattr(kvjax, "METHODS", some)
    monkeypatch.setattr(needles, "SHOWN", ("snapkv", "random"))
    monkeypatch.setattr(needles, "BUDGETS", (0.5, 0.1))
    call = ["--model", str(directory), "--length", "256", "--prompts", "3", "--out", str(tmp_path)]
    assert needles.main(call) == 0
    out = capsys.readouterr().out
    # 4 KV heads, keys and values of 8 fp32 numbers: 64 bytes an entry.
    assert "question inside the prompt: answers right (full cache 0%, 64 KiB a prompt)" in out
    assert "question after compression: answers right" in out
    assert re.search(r"entries/head +128\.0 +25\.0", out)
    assert out.count("(wrong: ") == 9
    pytest.importorskip("matplotlib")
    assert (tmp_path / "kept.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "20"], "--length 20, expected 64 to 2296"),
        (["--prompts", "0"], "--prompts 0, expected at least 1"),
    ],
)
def test_wrong_calls_are_one_sentence(directory, arguments, message, capsys):
    assert needles.main(["--model", str(directory), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_model_is_one_sentence(tmp_path, capsys):
    assert needles.main(["--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
