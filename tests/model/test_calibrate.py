"""Offline layer profiles: what is measured, the file, and the command."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvjax
from kvjax import CompressionConfig, ConfigError, compress_prompt, figures
from kvjax.calibrate import Profile, _batches, calibrate, read_profile, write_profile
from kvjax.inputs.prompts import bucket
from kvjax.models.checkpoints.weights import load_decoder
from kvjax.settings import check_writable, replacing

MODEL = str(Path(__file__).parents[1] / "fixtures" / "hf" / "llama2-gqa")  # 2 layers, 2 KV heads
LENGTHS = (40, 100, 44, 41)  # two buckets, one of them with three prompts
HALF = CompressionConfig.named("prefixkv", 0.5)


@pytest.fixture(scope="module")
def sharpened(tmp_path_factory) -> Path:
    """The model with attention of its last layer that is less even, so that layers differ."""
    folder = tmp_path_factory.mktemp("model") / "sharpened"
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"] *= 10
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(sharpened):
    return load_decoder(sharpened, progress=False)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 80, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(model, prompts) -> np.ndarray:
    """`[P, L]`: each prompt compressed by itself."""
    rows = []
    for prompt in prompts:
        counts_LK = np.asarray(compress_prompt(model, prompt, HALF).counts)[0]
        rows.append([sum(heads) / len(heads) / len(prompt) for heads in counts_LK.tolist()])
    return np.array(rows)


# ------------------------------------------------------------------------- what is measured
@pytest.mark.slow
def test_the_mean_of_prompts_compressed_alone(model, prompts, alone):
    """Slow: every prompt is compressed alone and in a batch, and each length is a program."""
    before = kvjax.compilations()
    profile = calibrate(model, prompts, HALF, batch=2)
    assert kvjax.compilations() - before == 1, "both batches of three prompts, one filled up"
    assert profile.lengths == LENGTHS
    np.testing.assert_allclose(profile.by_prompt, alone, atol=1e-12)
    np.testing.assert_allclose(profile.retained, alone.mean(0), atol=1e-12)
    np.testing.assert_allclose(profile.spread, alone.std(0), atol=1e-12)
    halves = [length // 2 / length for length in LENGTHS]
    np.testing.assert_allclose(profile.by_prompt.mean(1), halves, atol=1e-12)
    assert min(alone[:, 0] - alone[:, 1]) > 0.04, "a uniform profile would show nothing"


def test_batches_and_order_change_nothing(model, prompts, alone):
    np.testing.assert_array_equal(calibrate(model, prompts, HALF, batch=1).by_prompt, alone)
    turned = calibrate(model, prompts[::-1], HALF, batch=2)
    np.testing.assert_array_equal(turned.by_prompt, alone[::-1])


def test_one_prompt_is_its_own_profile(model, prompts, alone):
    profile = calibrate(model, prompts[1], HALF)
    assert profile.retained == tuple(alone[1])
    assert profile.spread == (0.0, 0.0)
    assert profile.lengths == LENGTHS[1:2]


def test_heads_and_prompts_are_averaged_by_hand(model, monkeypatch):
    """Heads that keep different numbers, under a budget of 6 entries."""

    def keep(model, rows, config, *, tokenizer, seed, images):
        assert (rows, seed) == ([[5] * 10, [6] * 12], 7)
        counts_BLK = np.array([[[9, 3], [1, 11]], [[8, 6], [0, 10]]])
        return SimpleNamespace(counts=counts_BLK)

    monkeypatch.setattr("kvjax.calibrate.compress_prompt", keep)
    config = CompressionConfig.named("ada-prefixkv", 6)
    profile = calibrate(model, [[5] * 10, [6] * 12], config, seed=7)
    np.testing.assert_allclose(profile.by_prompt, [[0.6, 0.6], [7 / 12, 5 / 12]])
    np.testing.assert_allclose(profile.retained, [71 / 120, 61 / 120])
    np.testing.assert_allclose(profile.spread, [1 / 120, 11 / 120])


def test_a_budget_that_holds_everything(model, prompts):
    config = CompressionConfig.named("prefixkv", 1.0)
    assert calibrate(model, prompts[0], config).retained == (1.0, 1.0)


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_batches_share_programs(size):
    lengths = [40, 300, 44, 41, 290, 48, 7, 43]
    made = list(_batches(lengths, size))
    assert sorted({place for batch in made for place in batch}) == list(range(len(lengths)))
    assert max(map(len, made)) <= size
    shapes = set()
    for batch in made:
        (width,) = {bucket(lengths[place]) for place in batch}
        shapes.add((len(batch), width))
    assert len(shapes) == len({bucket(length) for length in lengths})


def test_what_cannot_be_calibrated(model, prompts):
    with pytest.raises(ConfigError, match=r"method='snapkv' .*expected one of prefixkv, ada-pre"):
        calibrate(model, prompts, CompressionConfig.named("snapkv", 0.5))
    stored = CompressionConfig.named("prefixkv", profile=(0.5, 0.5))
    with pytest.raises(ConfigError, match="profile of 2 layers, expected None"):
        calibrate(model, prompts, stored)
    with pytest.raises(ValueError, match="batch=0, expected at least 1"):
        calibrate(model, prompts, HALF, batch=0)
    with pytest.raises(ValueError, match="prompts is empty"):
        calibrate(model, [], HALF)


# ------------------------------------------------------------------------- files
def test_the_file_is_as_its_authors_publish_it(tmp_path, shared_data):
    profile = Profile(by_prompt=np.array([[0.25, 0.75], [0.5, 1.0]]), lengths=(4, 8))
    path = write_profile(tmp_path / "profile.json", profile)
    assert path.read_text() == "[0.625, 0.125]"
    assert read_profile(str(path)) == profile.retained == (0.375, 0.875)
    assert [item.name for item in tmp_path.iterdir()] == ["profile.json"]
    published = (shared_data / "prefixkv_confs" / "prefixkv_llava-v1.5-7b_0.5.json").read_text()
    assert published == json.dumps(json.loads(published)), "one line, no line end, as ours"
    assert {type(share) for share in json.loads(published)} == {float}


def test_every_published_file_is_read(shared_data):
    files = sorted((shared_data / "prefixkv_confs").glob("*.json"))
    assert len(files) == 20
    for file in files:
        retained = read_profile(str(file))
        assert len(retained) == (40 if "13b" in file.name else 32)
        evicted = float(file.stem.rpartition("_")[2])
        assert 1 - np.mean(retained) == pytest.approx(evicted, abs=0.002)
        assert CompressionConfig.named("prefixkv", profile=retained).fraction > 0


def test_nothing_half_written_is_left(tmp_path):
    target = tmp_path / "profile.json"
    target.write_text("old")

    def fail(error):
        with replacing(target) as part:
            part.write_text("ne")
            assert (part.parent, part.suffix) == (tmp_path, ".json")
            raise error

    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]
    (tmp_path / "link.json").symlink_to(target)
    with replacing(tmp_path / "link.json") as part:
        part.write_text("new")
    assert (tmp_path / "link.json").is_symlink()
    assert target.read_text() == "new"


def test_a_name_is_tried_before_the_work(tmp_path):
    target = tmp_path / "profile.json"
    check_writable(target)
    assert list(tmp_path.iterdir()) == []
    target.write_text("old")
    check_writable(target)
    assert target.read_text() == "old"
    for wrong in (tmp_path, "/dev/null", tmp_path / "none" / "x.json", target / "x.json"):
        with pytest.raises(ValueError, match=f"output {wrong} "):
            check_writable(wrong)
    assert list(tmp_path.iterdir()) == [target]


# ------------------------------------------------------------------------- the command
@pytest.fixture
def samples(tmp_path, prompts) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"tokens": prompt}) + "\n" for prompt in prompts))
    return path


@pytest.fixture
def flags(sharpened, samples) -> list[str]:
    common = ["--model", str(sharpened), "--prompts", str(samples)]
    return ["calibrate", *common, "-o", str(samples.with_name("profile.json"))]


@pytest.mark.slow
def test_generate_takes_what_calibrate_wrote(run, flags, sharpened, samples, model, prompts):
    """Slow: two commands are compiled."""
    code, out, err = run(*flags, "--budget", "50%", "--batch", 2, "--json")
    assert (code, err) == (0, "method=prefixkv budget=50% sinks=1 recent=1 group=mean\n")
    report = json.loads(out.splitlines()[-1])
    measured = calibrate(model, prompts, HALF, batch=2)
    path = samples.with_name("profile.json")
    assert report == {
        "method": "prefixkv",
        "budget": 0.5,
        "prompts": 4,
        "tokens": sum(LENGTHS),
        "retained": list(measured.retained),
        "spread": list(measured.spread),
        "file": str(path),
        "picture": str(path.with_suffix(".png")),
    }
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {item.name for item in path.parent.iterdir()} == {
        "prompts.jsonl", "profile.json", "profile.png",
    }  # fmt: skip
    ids = samples.with_name("ids.txt")
    ids.write_text("\n".join(map(str, prompts)))
    answer = ["generate", "--model", sharpened, "--tokens", ids, "--max-new-tokens", 1, "--json"]
    code, out, _ = run(*answer, "--method", "prefixkv", "--profile", path)
    kept_BLK = np.array(json.loads(out.splitlines()[-1])["kept"])
    wanted_BL = np.outer(LENGTHS, measured.retained)
    assert code == 0
    assert np.abs(kept_BLK.mean(-1) - wanted_BL).max() <= 1
    assert np.abs(kept_BLK.mean(-1) - wanted_BL[:, ::-1]).max() > 1, "layers cannot be confused"


def test_what_is_printed_without_json(run, flags, samples, prompts, monkeypatch):
    monkeypatch.setattr(figures, "available", lambda: False)
    samples.write_text(json.dumps({"tokens": prompts[0]}))
    code, out, _ = run(*flags, "--budget", "100%")
    assert code == 0
    assert out.splitlines() == [
        "prompts 1, tokens 40, retained 100.00%",
        "LAYER  RETAINED  SPREAD",
        "    0   100.00%   0.00%",
        "    1   100.00%   0.00%",
        str(samples.with_name("profile.json")),
    ]
    assert samples.with_name("profile.json").read_text() == "[0.0, 0.0]"
    assert not samples.with_name("profile.png").exists()


def test_what_reaches_the_measurement(run, flags, samples, model, monkeypatch):
    """Texts arrive as the tokenizer's ids; what the model makes of them is left out."""
    samples.write_text('{"prompt": "3407"}\n{"tokens": [5, 6]}')
    given = []

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [1, *map(int, text)] if add_special_tokens else []}

    def measure(model, rows, config, **settings):
        given.append((rows, config, settings))
        return Profile(by_prompt=np.full((2, 2), 0.5), lengths=(5, 2))

    monkeypatch.setattr(kvjax, "load", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr("kvjax.cli.calibrate.calibrate", measure)
    output = samples.with_name("x.png")
    more = ["--method", "ada-prefixkv", "--budget", 9, "--batch", 3, "--seed", 8, "-o", output]
    code, out, err = run(*flags, *more)
    assert (code, out.splitlines()[-2:]) == (0, [str(output), f"{output}.png"])
    assert err.startswith("method=ada-prefixkv budget=9 window=1..2 ")
    config = CompressionConfig.named("ada-prefixkv", 9)
    settings = {"seed": 8, "batch": 3, "progress": True, "images": None}
    assert given == [([[1, 3, 4, 0, 7], [5, 6]], config, settings)]
    assert output.read_text() == "[0.5, 0.5]"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], "budget=None, expected a number of entries, or a fraction"),
        (["--budget", "0%"], "budget='0%'"),
        (["--budget", "9", "--method", "nope"], "method='nope', expected one of"),
        (["--budget", "9", "--method", "snapkv"], "method='snapkv' (layers='uniform')"),
        (["--method", "full"], "method='full'"),
        (["--budget", "9", "--batch", "0"], "--batch: '0'"),
        (["--budget", "9", "--prompts", "/nowhere"], "/nowhere: No such file"),
        (["--budget", "9", "--prompts", MODEL], "Is a directory"),
        (["--budget", "9", "-o", "/nowhere/x.json"], "output /nowhere/x.json cannot be written"),
        (["--budget", "9", "-o", MODEL], "is not a file"),
        (["--budget", "9", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_calls(run, flags, more, named, monkeypatch):
    assert_refused(run, [*flags, *more], named, monkeypatch)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "prompts.jsonl is empty"),
        ("[1, 2]", 'line 2, expected an object with either "prompt" or "tokens"'),
        ('{"text": "x"}', 'line 2, expected an object with either "prompt" or "tokens"'),
        ('{"prompt": "x", "tokens": [1]}', 'line 2, expected an object with either "prompt"'),
        ('{"prompt": ""}', "line 2: \"prompt\" is '', expected a text that is not empty"),
        ('{"prompt": 3}', 'line 2: "prompt" is 3, expected a text'),
        ('{"prompt": "\\udcff"}', 'line 2: "prompt" is not valid Unicode'),
        ('{"prompt": "x"}', "line 2 is text but the model has no tokenizer"),
        ('{"tokens": []}', 'line 2: "tokens" is empty'),
        ('{"tokens": [1, 80]}', "line 2: token id 80 is outside the vocabulary"),
        (json.dumps({"tokens": [5] * 257}), "line 2 has 257 tokens, expected at most the model's"),
        ('{"tokens": [1', "line 2 is not valid JSON"),
    ],
)
def test_malformed_prompts(run, flags, samples, line, named, monkeypatch):
    samples.write_text(f'{{"tokens": [4, 5, 6]}}\n{line}' if line else "")
    assert_refused(run, [*flags, "--budget", "50%"], named, monkeypatch)


def assert_refused(run, flags, named, monkeypatch):
    """Exit code 2 and one sentence, before any prompt was run and with nothing written."""

    def too_late(*_, **__):
        raise AssertionError("a prompt was compressed")

    monkeypatch.setattr("kvjax.calibrate.compress_prompt", too_late)
    folder = Path(flags[flags.index("--prompts") + 1]).parent
    before = sorted(folder.iterdir())
    code, out, err = run(*flags)
    assert (code, out) == (2, "")
    assert err.startswith("kvjax: ")
    assert err.count("\n") == 1
    assert named in err
    assert sorted(folder.iterdir()) == before
