"""The bundled model: the file that its card describes, what it shows in seconds, needles."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax import CompressionConfig, tiny
from kvjax.studies import needles
from kvjax.studies.dispersion import entries_needed
from kvjax.studies.retrieval import ask
from kvjax.tiny.questions import questions
from kvjax.tiny.settings import load_settings
from kvjax.tiny.vocabulary import ID, text

ROOT = Path(__file__).resolve().parents[2]
FULL = CompressionConfig.named("full")


@pytest.fixture(scope="module")
def model():
    return tiny.load()[0]


@pytest.fixture(scope="module")
def items():
    return questions("multikey", 512, 12, seed=3)


def test_the_file_is_the_one_of_the_model_card():
    path = tiny.WEIGHTS / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    card = (ROOT / "docs" / "tiny.md").read_text()
    found = re.search(r"sha256 `([0-9a-f]{64})`", card)
    assert found is not None
    assert found[1] == digest
    assert sum(file.stat().st_size for file in tiny.WEIGHTS.iterdir()) <= 8_000_000


def test_its_shape_is_what_the_settings_say(model):
    settings = load_settings(ROOT / "configs" / "tiny.toml")
    config = model.config
    assert config.num_layers == settings.layers >= 4
    assert config.group_size >= 2
    assert config.max_position_embeddings == settings.context >= 2048


def test_words_go_in_and_out():
    model, tokenizer = tiny.load()
    item = questions("single", 200, 1)[0]
    prompt = text([*item.document[1:], *item.question])
    out = kvjax.generate(model, prompt, max_new_tokens=8, tokenizer=tokenizer, eos_ids=[ID["."]])
    assert out.text == [" " + text(item.answer)]  # the text goes on from the prompt's last word
    assert out.tokens == [list(item.answer)]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["seen", "unseen"])
def test_what_is_evicted_costs_answers(model, items, protocol):
    """Of 12 prompts of 512 tokens; an observation window finds what it has been asked for.

    Slow: 12 prompts of 512 tokens through the bundled model.
    """
    configs = [
        FULL,
        CompressionConfig.named("random", 0.1),
        CompressionConfig.named("snapkv", 0.25),
    ]
    full, random, snapkv = ask(model, items, configs, protocol)
    assert full.right.mean() >= 0.9
    assert random.right.mean() <= 0.25
    assert random.kept.mean() == pytest.approx(0.1 * 512, abs=1)
    if protocol == "seen":
        assert snapkv.right.sum() >= full.right.sum() - 1
    else:
        assert snapkv.right.mean() <= 0.75


def test_heads_differ(model, items):
    prompts = [[*item.document, *item.question] for item in items]
    counts = entries_needed(model, prompts)
    assert counts.max() / counts.min() >= 10


def test_it_repeats_a_document(model):
    """KVzip reads a context a second time: half of the model's context, to the last token."""
    document = questions("multikey", 1024, 1)[0].document[:1000]
    prompt = [*document, ID["again"]]
    out = kvjax.generate(model, [prompt], max_new_tokens=200, eos_ids=())
    right = np.array(out.tokens[0]) == np.array(document[1:201])
    assert right.mean() >= 0.95


# ---------------------------------------------------------------------------- needles
def test_notes_are_found_in_a_document(items):
    item = items[0]
    spans, asked = needles.needles(item)
    tokens = list(item.document)
    assert len(spans) == 16
    assert asked in spans
    assert [ID["note"], item.question[1], *item.answer] == tokens[slice(*asked)]


@pytest.mark.slow
def test_answers_tables_and_a_picture(tmp_path, capsys, monkeypatch):
    """Slow: the whole study, though with few prompts."""
    some = {name: kvjax.METHODS[name] for name in ("full", "snapkv", "random")}
    monkeypatch.setattr(kvjax, "METHODS", some)
    monkeypatch.setattr(needles, "SHOWN", ("snapkv", "random"))
    monkeypatch.setattr(needles, "BUDGETS", (0.5, 0.1))
    assert needles.main(["--length", "256", "--prompts", "3", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    # 4 layers of 4 KV heads, keys and values of 32 fp32 numbers: 4 KiB a token.
    assert "question seen: answers right (full cache 100%, 1024 KiB a prompt)" in out
    assert "question unseen: answers right" in out
    assert re.search(r"entries/head +128\.0 +25\.0", out)
    assert out.count("(right)") + out.count("(wrong: ") == 9
    pytest.importorskip("matplotlib")
    assert (tmp_path / "kept.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "20"], "--length 20, expected 64 to 2296"),
        (["--prompts", "0"], "--prompts 0, expected at least 1"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_calls_are_one_sentence(arguments, message, capsys):
    assert needles.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
