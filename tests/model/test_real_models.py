"""The study of a real model, on a tiny one: what it says of a text is what the public calls say."""

import numpy as np
import pytest

import kvjax
from kvjax.spelling import parse_method
from kvjax.studies.real_models import Measurement, measure, read_rows
from kvjax.studies.real_texts import Text

CONFIGS = [parse_method(name, 0.25) for name in ("snapkv", "key-diff:heads=ada")]


@pytest.fixture(scope="module")
def text(prompts):
    rng = np.random.default_rng(1)
    follows = [rng.integers(3, 80, size).tolist() for size in (7, 9)]
    return Text("novel", "1024-00", prompts[0], follows, [7, 4])


@pytest.fixture(scope="module")
def measured(model, text):
    return Measurement(model, text, CONFIGS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_the_nll_is_that_of_score(model, text, measured, config):
    row, kept_LKT = measured.row(config)
    whole = [[*text.prompt, *ids] for ids in text.follows]
    scored = kvjax.score(model, whole, len(text.prompt), config, positions=True)
    counted = [
        x for mine, count in zip(scored, text.judged, strict=True) for x in mine.nll[-count:]
    ]
    assert float(row["nll"]) == pytest.approx(np.mean(counted), abs=2e-5)
    assert float(row["kept"]) == 16
    for layer, heads in enumerate(scored[0].positions):
        for head, positions in enumerate(heads):
            assert np.flatnonzero(kept_LKT[layer, head]).tolist() == positions


def test_an_answer_is_right_where_it_is_the_greedy_one(model, text):
    config = CONFIGS[0]
    cache = kvjax.compress_prompt(model, text.prompt, config)
    question = text.follows[0]
    (answer,) = kvjax.generate(model, question, cache=cache, max_new_tokens=4, eos_ids=()).tokens
    wrong = [*answer[:-1], (answer[-1] + 1) % 80]
    rows = [[*question, *answer], [*question, *wrong]]
    asked = Text("unseen", "00", text.prompt, rows, [4, 4])
    assert Measurement(model, asked, [config]).row(config)[0]["right"] == "10"


def test_a_run_goes_on_where_it_stopped(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("kvjax.studies.real_models.methods_of", lambda *_: ("full", "snapkv"))
    out, kept = tmp_path / "rows.csv", tmp_path / "kept"
    measure(model, None, [text], out, kept)
    rows = read_rows(out)
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("full", "1"), ("snapkv", "0.5"), ("snapkv", "0.25"), ("snapkv", "0.1"), ("snapkv", "0.05"),
    ]  # fmt: skip
    whole = out.read_bytes()
    out.write_bytes(whole[:-9])  # cut inside of the last row
    measure(model, None, [text], out, kept)
    assert out.read_bytes() == whole
    assert set(np.load(kept / "1024-00.npz")) == {
        f"{row['method']} {row['budget']}" for row in rows
    }
