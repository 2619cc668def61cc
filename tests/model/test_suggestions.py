"""What a checkpoint says of itself: how to draw its answers, and how long its texts may be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import kvjax
from kvjax.models.checkpoints.orbax import CONFIG, load_orbax_config, save_orbax

SOURCE = Path(__file__).parents[1] / "fixtures" / "hf" / "llama2-gqa"
SUGGESTED = {"do_sample": True, "temperature": 1.7, "repetition_penalty": 1.1, "eos_token_id": 2}
NOTE = (
    "the checkpoint suggests temperature=1.7, repetition_penalty=1.1; greedy is used, --sampling"
    " model follows it\n"
)
PROMPT = list(range(3, 43))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("suggests") / "model"
    shutil.copytree(SOURCE, target)
    (target / "generation_config.json").write_text(json.dumps(SUGGESTED))
    return target


@pytest.fixture(scope="module")
def suggesting(folder):
    return kvjax.load(folder, progress=False)[0]


@pytest.fixture
def call(run, folder, tmp_path):
    """`kvjax generate` of 40 tokens in a context of 256."""
    (tmp_path / "one.txt").write_text(" ".join(map(str, PROMPT)))
    flags = ["--tokens", tmp_path / "one.txt", "--max-new-tokens", 4, "--ignore-eos"]

    def generate(*more, model=folder):
        return run("generate", "--model", model, *flags, *more)

    return generate


def drawn(model, sampling) -> list[int]:
    rules = {"sampling": sampling, "max_new_tokens": 4, "seed": 3, "eos_ids": ()}
    steps = kvjax.stream(model, PROMPT, **rules)
    return [token for step in steps for token in step.tokens[0]]


def test_answers_are_drawn_as_the_checkpoint_suggests(suggesting):
    rules = kvjax.Sampling(temperature=1.7, repetition_penalty=1.1)
    assert drawn(suggesting, "model") == drawn(suggesting, rules)
    assert drawn(suggesting, "model") != drawn(suggesting, None)


def test_the_command_says_what_is_suggested_and_follows_it_when_asked(call, suggesting):
    code, greedy, err = call()
    assert code == 0
    assert err == f"{NOTE}method=full\n"
    code, out, err = call("--sampling", "model", "--seed", 3)
    assert (code, err) == (0, "method=full\n")
    assert out == " ".join(map(str, drawn(suggesting, "model"))) + "\n"
    assert out != greedy
    # Who asks for greedy is told nothing, nor is anyone of a checkpoint without a suggestion.
    assert call("--temperature", 0) == (0, greedy, "method=full\n")
    assert call(model=SOURCE) == (0, greedy, "method=full\n")


def test_the_command_says_that_there_is_nothing_to_follow(call):
    code, _, err = call("--sampling", "model", model=SOURCE)
    nothing = "--sampling model: the checkpoint suggests nothing; greedy is used\n"
    assert (code, err) == (0, f"{nothing}method=full\n")


def test_suggestions_that_are_refused(call, folder, tmp_path):
    code, out, err = call("--sampling", "model", "--top-k", 3)
    assert (code, out) == (2, "")
    assert err == "kvjax: --top-k 3 beside --sampling model, expected one of the two\n"
    code, out, err = call("--sampling", "greedy")
    assert (code, out) == (2, "")
    shutil.copytree(folder, tmp_path / "beams")
    text = json.dumps({"do_sample": True, "num_beams": 4})
    (tmp_path / "beams" / "generation_config.json").write_text(text)
    code, out, err = call("--sampling", "model", model=tmp_path / "beams")
    assert (code, out) == (2, "")
    assert err.startswith("kvjax: sampling='model': the checkpoint sets num_beams=4, which is not")
    assert err.count("\n") == 1


def test_a_longer_context_is_asked_for(call, run, folder, tmp_path):
    code, out, err = call("--max-context", 43)
    assert (code, out) == (2, "")
    assert err.endswith("exceeds the model's context, expected at most 43 in all\n")
    assert call("--max-context", 44)[0] == 0
    code, _, err = call("--max-context", 0)
    assert (code, "--max-context: '0'" in err) == (2, True)
    line = {"tokens": (PROMPT * 7)[:270], "prefix": 40}
    (tmp_path / "long.jsonl").write_text(json.dumps(line))
    for command in (
        ("score", "--tokens"),
        ("calibrate", "-o", tmp_path / "p.json", "--budget", "9", "--prompts"),
    ):
        flags = [*command, tmp_path / "long.jsonl", "--model", folder]
        code, _, err = run(*flags)
        assert code == 2
        assert err.endswith("has 270 tokens, expected at most the model's context of 256\n")
        assert run(*flags, "--max-context", 300)[0] == 0


def test_an_orbax_checkpoint_has_suggestions_and_no_limit(suggesting, tmp_path):
    assert suggesting.config.stated_sampling[1:] == (
        ("temperature", 1.7),
        ("repetition_penalty", 1.1),
    )
    limited, _ = kvjax.load(SOURCE, progress=False, max_context=64)
    for name, model in (("suggesting", suggesting), ("limited", limited)):
        save_orbax(model, tmp_path / name)
        read = load_orbax_config(tmp_path / name)
        assert read.stated_sampling == model.config.stated_sampling
        assert read.context == 256
        written = json.loads((tmp_path / name / CONFIG).read_text())["config"]
        assert ("stated_sampling" in written) == (name == "suggesting")
        assert "max_context" not in written


@pytest.mark.parametrize("name", ["yarn", "dynamic", "longrope"])
def test_an_orbax_checkpoint_has_its_scaling(tmp_path, name):
    model, _ = kvjax.load(SOURCE.parents[1] / "rope" / name, progress=False)
    save_orbax(model, tmp_path / name)
    again, _ = kvjax.load(tmp_path / name, progress=False)
    assert repr(again.config) == repr(model.config)
    np.testing.assert_array_equal(again.embed.table_VD[...], model.embed.table_VD[...])
