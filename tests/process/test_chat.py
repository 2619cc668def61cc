"""`kvjax chat` through pipes: a document is read once, questions follow one another."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from turns import SMOL, STRICT, tokenizer

from kvjax.tiny import WEIGHTS

FLAGS = ("--method", "snapkv", "--budget", "16", "--max-new-tokens", "4", "--ignore-eos")


def folder(path: Path, template: str | None) -> Path:
    """The bundled model with a tokenizer that chats."""
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(WEIGHTS / name, path)
    made = tokenizer(template)
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("chat") / "model", SMOL)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "document.txt"
    path.write_text("The note of Ann is 42. " * 4)
    return path


def talk(model: Path, said: str, *flags) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kvjax.cli", "chat", "--model", model, *FLAGS, *flags]
    return subprocess.run(
        list(map(str, command)), input=said, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def done(model, document):
    said = "Which note?\n/kept\nAnd why?\n/nothing\n\n/reset\n/kept\nWhich note?\n/quit\nmore\n"
    return talk(model, said, "--document", document, "--system", "Be brief.")


def test_turns_go_on_until_they_are_reset(done):
    """Slow: the command compiles its programs."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    parts = done.stdout.split("tokens compressed, ")
    assert len(parts) == 3
    since = [int(part.split(" since")[0]) for part in parts[1:]]
    assert since[0] > 4  # a question and an answer
    assert since[1] == 0
    # The same question, asked anew, has the same answer.
    lines = done.stdout.split("\n")
    assert lines[-2] == lines[0]


def test_what_is_kept_is_shown(done):
    first = done.stdout.split("tokens compressed")[1].split("\n")
    entries = next(line for line in first if line.startswith("entries"))
    held = int(entries.split()[1].replace(",", ""))
    layers = [line for line in first if line.startswith("layer")]
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert held == 16 * config["num_hidden_layers"] * config["num_key_value_heads"]
    assert len(layers) == config["num_hidden_layers"]
    assert all("#" in line and line.endswith("%") for line in layers)


def test_what_is_no_command_is_said_and_the_chat_goes_on(done):
    told = [line for line in done.stderr.split("\n") if line.startswith("kvjax: ")]
    assert told == ["kvjax: /nothing, expected a question, /kept, /reset or /quit"]


def test_a_chat_without_a_document(tmp_path):
    """Where roles must alternate, too; a question that is too long is refused in one sentence."""
    model = folder(tmp_path / "strict", STRICT)
    done = talk(model, f"/kept\nWho?\n{'long ' * 4000}\nWhy?\n/kept\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nothing is held yet\n")
    # No document, so nothing is compressed, whatever the method.
    assert "(100.0%)" in next(x for x in done.stdout.split("\n") if x.startswith("entries"))
    told = [line for line in done.stderr.split("\n") if line.startswith("kvjax: ")]
    assert len(told) == 1
    assert "exceeds the model's context" in told[0]


@pytest.mark.smoke
def test_what_a_chat_refuses(tmp_path, run, model, document):
    empty = tmp_path / "empty.txt"
    empty.touch()
    cases = [
        (model, ("--document", empty), f"--document {empty} is empty, expected a text"),
        (WEIGHTS, ("--document", document), "a chat, expected a tokenizer with a chat template"),
        (model, ("--template-arg", "x"), "--template-arg 'x', expected NAME=VALUE"),
        (
            model,
            ("--recompress-every", "64"),
            "--recompress-every without --recompress-budget, expected both in a chat, as the ratio"
            " of a document's cache is fixed",
        ),
    ]
    for directory, flags, message in cases:
        assert run("chat", "--model", directory, *FLAGS, *flags) == (2, "", f"kvjax: {message}\n")
