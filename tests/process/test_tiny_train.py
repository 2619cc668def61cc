"""Training the bundled model: the loss falls, and a killed run ends in the same bits."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax.tiny.settings import Settings, load_settings
from kvjax.tiny.train import read_log, train

ROOT = Path(__file__).resolve().parents[2]
SMALL = Settings(
    seed=3,
    layers=1,
    width=16,
    mlp=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    rope_theta=10000.0,
    context=64,
    muon_rate=0.02,
    adam_rate=0.01,
    warmup=5,
    cycles=(30, 10),
    peaks=(1.0, 0.5),
    final_rate=0.05,
    clip=1.0,
    filler_weight=0.1,
    rehearse=4,
    log_every=2,
    evaluate_every=20,
    save_every=4,
    steps=(30, 10),
    lengths=(32, 48),
    batches=(4, 2),
    alphabets=(8, 16),
    needles=(4, 4),
    tasks=("repeat multikey", "repeat multikey stream"),
)


def as_toml(settings: Settings) -> str:
    lines = []
    for name, value in dataclasses.asdict(settings).items():
        text = str(list(value)).replace("'", '"') if isinstance(value, tuple) else str(value)
        lines.append(f"{name} = {text}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    train(SMALL, out, progress=False)
    return out


def test_the_loss_falls(whole):
    losses = [float(row["loss"]) for row in read_log(whole)]
    assert losses[0] > 5.5  # near log(384) = 5.95
    assert min(losses[10:15]) < losses[0] - 1.5
    assert [int(row["step"]) for row in read_log(whole)] == list(range(2, 41, 2))
    assert read_log(whole)[9]["repeat"] != "" == read_log(whole)[8]["repeat"]


def test_the_result_is_a_checkpoint_like_any_other(whole):
    model, tokenizer = kvjax.load(whole / "model", progress=False)
    assert model.config.num_layers == 1
    out = kvjax.generate(model, "the old baker", max_new_tokens=3, tokenizer=tokenizer)
    assert len(out.tokens[0]) == 3
    assert tokenizer.bos_token == "<s>"


def test_a_run_killed_three_times_ends_in_the_same_bits(whole, tmp_path):
    config, out = tmp_path / "small.toml", tmp_path / "run"
    config.write_text(as_toml(SMALL))
    assert load_settings(config) == SMALL
    command = [sys.executable, "-m", "kvjax.cli", "train-tiny", "--config", config, "--out", out]
    # What the first process compiles the others read.
    shared = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    shared["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    settings = {"cwd": ROOT, "env": {**os.environ, **shared}}
    rng = np.random.default_rng(0)
    killed = 0
    for moment in (0.1, 0.4, 0.75):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **settings)
        wanted = int(moment * len(read_log(whole)))
        while process.poll() is None:
            done = len(read_log(out)) if (out / "log.csv").exists() else 0
            if done > wanted:
                time.sleep(float(rng.uniform(0, 0.05)))  # anywhere within a step or a save
                break
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed >= 2  # the last one may have come to its end first
    finished = subprocess.run(command, capture_output=True, text=True, check=True, **settings)
    assert finished.stdout.split() == [str(out / "model"), str(out / "log.png")]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), name
    assert read_log(out) == read_log(whole)


def test_a_finished_run_is_not_run_again(whole):
    before = (whole / "model" / "model.safetensors").read_bytes()
    train(SMALL, whole, progress=False)
    assert (whole / "model" / "model.safetensors").read_bytes() == before
    assert len(read_log(whole)) == 20


def test_another_run_in_the_same_folder_is_refused(whole):
    other = dataclasses.replace(SMALL, seed=4)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train(other, whole, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "x"}, "seed = 'x', expected one int"),
        ({"muon_rate": 0}, "muon_rate = 0.0, expected numbers above 0"),
        ({"steps": [1]}, "expected one for each of the 1 stages"),
        ({"cycles": [30, 9]}, "cycles = (30, 9), expected 40 steps in all"),
        ({"peaks": [1.0]}, "an entry for each of the 1 peaks"),
        ({"lengths": [32, 65]}, "lengths has 65, expected 32 to context = 64"),
        ({"alphabets": [3, 8]}, "alphabets has 3, expected 4 to 128"),
        ({"needles": [1, 4]}, "needles has 1, expected 2 or more"),
        ({"tasks": ["repeat", "recall"]}, "tasks has 'recall', expected names of single"),
        ({"tasks": "repeat"}, "tasks = 'repeat', expected a list of str"),
        ({"typo": 1}, "unknown key typo, expected seed"),
    ],
)
def test_wrong_settings_are_named(tmp_path, change, message):
    path = tmp_path / "bad.toml"
    keys = {name: value for name, value in dataclasses.asdict(SMALL).items()} | change
    lines = []
    for name, value in keys.items():
        listed = list(value) if isinstance(value, tuple) else value
        lines.append(f"{name} = {str(listed) if not isinstance(listed, str) else repr(listed)}")
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"bad\.toml: ") as caught:
        load_settings(path)
    assert message in str(caught.value)


def test_missing_key_and_broken_toml(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("seed = 1")
    with pytest.raises(ValueError, match="missing key adam_rate"):
        load_settings(path)
    path.write_text("seed = ")
    with pytest.raises(ValueError, match="is not TOML"):
        load_settings(path)


def test_the_shipped_settings_are_valid():
    settings = load_settings(ROOT / "configs" / "tiny.toml")
    assert settings.total_steps == sum(settings.steps)
    assert settings.stage_at(0).length == settings.lengths[0]
    assert settings.stage_at(settings.total_steps - 1).length == settings.lengths[-1]
    with pytest.raises(ValueError, match=f"step={settings.total_steps}, expected 0 to"):
        settings.stage_at(settings.total_steps)
    assert jax.default_backend() == "cpu"


def test_every_fourth_step_rehearses_one_of_the_three_stages_before():
    settings = load_settings(ROOT / "configs" / "tiny.toml")
    last = range(settings.total_steps - 24, settings.total_steps)
    drawn = [settings.drawn_at(step).length for step in last]
    assert drawn.count(2304) == 18
    assert sorted(set(drawn)) == sorted(settings.lengths[2:])
    assert {settings.drawn_at(step).length for step in range(settings.steps[0])} == {64}
