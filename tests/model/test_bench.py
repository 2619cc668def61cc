"""The benchmarks: caches of the bytes they claim, rows that add up. Speed itself is not tested."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CompressionConfig
from kvjax.bench import budgets, decode, report
from kvjax.bench.report import Settings
from kvjax.bench.timing import bandwidth, timed
from kvjax.cache.slots import first_page
from kvjax.models.config import load_config
from kvjax.models.load import load_model
from kvjax.models.presets import model_config, preset, random_model


def test_timing_counts_runs_and_steps():
    timing, out = timed(lambda x: x + 1, jnp.ones(4), repeats=3, per=2)
    np.testing.assert_array_equal(out, 2)
    assert timing.runs == 3
    assert 0 < timing.least <= timing.median
    whole, _ = timed(lambda x: jnp.linalg.matrix_power(x, 9), jnp.eye(200))
    parts, _ = timed(lambda x: jnp.linalg.matrix_power(x, 9), jnp.eye(200), per=1000)
    assert parts.least < whole.least


def test_bandwidth_is_that_of_a_machine():
    rates = bandwidth(repeats=1)
    assert set(rates) == {"copy", "read"}
    assert all(1e8 < rate < 1e14 for rate in rates.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "owners"),
    [
        ("snapkv", {"layout": "padded"}, "even"),
        ("ada-snapkv", {"layout": "packed"}, "even"),
        ("ada-snapkv", {"layout": "packed", "quantize": "int8"}, "skewed"),
    ],
)
def test_synthetic_caches_are_like_real_ones(name, settings, owners):
    """The same arrays as compression makes of prompts of that length, and as many entries.

    Slow: a prefill of a 1M model is compiled for each kind of cache.
    """
    config = CompressionConfig.named(name, 16, **settings)
    shape = preset("1m", 128)
    model = random_model(shape)
    call = {"batch": 2, "prompt": 64, "new": 4, "dtype": jnp.float32, "owners": owners}
    made = decode.synthetic_cache(shape, config, **call)
    prompts = np.random.default_rng(0).integers(3, 90, (2, 64)).tolist()
    real = kvjax.compress_prompt(model, prompts, config)
    assert made.nbytes == real.nbytes
    made_shapes, real_shapes = (
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((c.layers, c.slots))]
        for c in (made, real)
    )
    assert made_shapes == real_shapes
    np.testing.assert_array_equal(made.counts.sum((1, 2)), real.counts.sum((1, 2)))
    if settings["layout"] == "packed":
        counts = np.asarray(made.counts[0, 0])
        assert (counts[0] == counts[-1]) == (owners == "even")
        # The second layer begins with a page of its own, and is filled as counts say.
        start = int(first_page(made.slots, 1)[0]) * made.slots.page
        assert start == -(-counts.sum() // made.slots.page) * made.slots.page
        owners_M = np.asarray(made.slots.owners[0, start : start + counts.sum()])
        np.testing.assert_array_equal(np.bincount(owners_M), made.counts[0, 1])
    timing = decode.attention(shape, made, 1, jnp.float32, loops=1)
    assert timing.median > 0


def test_a_full_cache_holds_the_prompt():
    config = CompressionConfig.named("full")
    call = {"batch": 1, "prompt": 64, "new": 4, "dtype": jnp.float32}
    cache = decode.synthetic_cache(preset("1m", 128), config, **call)
    assert (cache.counts == 64).all()
    assert cache.nbytes == 4 * 4 * 64 * 2 * 16 * 4  # layers, heads, tokens, K and V, H, fp32


@pytest.mark.slow
def test_budgets_are_shared_out_alike(monkeypatch):
    """Everybody gives away the same, and the two ways to sort come to bisection's sizes.

    Slow: two sorts beside bisection are compiled.
    """
    shape, call = preset("1m", 64), {"budget": 16, "batch": 2, "prompt": 64, "repeats": 1}
    rows = {row["what"]: row for row in budgets.measure(shape, **call)}
    assert {row["entries"] for row in rows.values()} == {2 * 4 * 4 * 16}
    assert all(row["total"] == 4 * row["seconds"] > 0 for row in rows.values())
    assert rows["uniform"]["results"] == rows["prefix"]["results"] == 2 * 4 * 4
    assert rows["ada"]["results"] == rows["joint"]["results"] == 2 * 4 * 4 * 4
    assert rows["selection, after any"]["results"] == 2 * 4 * 4 * 64
    assert rows["joint"]["temporaries"] > 2 * 4 * 4 * 64 * 4

    def backwards(values, count):
        return budgets._argsort(-values, count)

    monkeypatch.setattr(budgets.lax, "top_k", backwards)
    with pytest.raises(RuntimeError, match="ada, top_k: other sizes than by bisection"):
        budgets.measure(shape, **call)


@pytest.mark.parametrize(
    ("kind", "model", "batches", "prompt", "budget"),
    [
        ("decode", "100m", (1, 4), 2048, 256),
        ("budgets", "llama-3-8b", (1,), 131_072, 1024),
    ],
)
def test_what_flags_come_to_that_are_not_given(
    run, monkeypatch, kind, model, batches, prompt, budget
):
    calls = []
    monkeypatch.setattr(report, "run", lambda *call: calls.append(call))
    assert run("bench", kind)[0] == run("bench", kind, "--model", "1m", "--prompt", 64)[0] == 0
    for (named, settings, out), changed in zip(calls, (False, True), strict=True):
        assert (named, out, settings.batches, settings.budget) == (kind, None, batches, budget)
        expected = ("1m", 64) if changed else (model, prompt)
        assert (settings.model, settings.prompt) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", report.KINDS)
def test_reports(run, tmp_path, kind):
    """Slow: each benchmark compiles and times all that it measures, as on a device."""
    flags = ["--model", "1m", "--batch", "1", "--prompt", 64, "--new", 3, "--budget", 16]
    flags += ["--methods", "ada-snapkv/packed/int8", "--repeats", 1, "--out", tmp_path]
    code, out, _ = run("bench", kind, *flags)
    assert code == 0
    last = json.loads(out.splitlines()[-1])
    assert json.loads((tmp_path / f"bench_{kind}_cpu_1m.json").read_text()) == last
    names = [row.get("method") or row["what"] for row in last["rows"]]
    if kind == "budgets":
        assert len(names) == 8
        assert last["machine"]["peak_rss"] > 1e8
    elif kind == "scores":
        first = ["prefill attention", "window scores", "accumulated scores"]
        assert names == [*first, "ada-snapkv/packed/int8"]
    else:
        assert names == ["full", "ada-snapkv/packed/int8"]
        full, packed = last["rows"]
        assert packed["cache_bytes"] == 4 * 4 * 16 * (2 * 16 + 8)
        assert full["of_full"] == 1
        rate = max(last["machine"]["bandwidth"].values())
        assert packed["limit"] * rate == pytest.approx(
            last["machine"]["weights"] + packed["held_bytes"]
        )
    assert all(name in out for name in names)
    pytest.importorskip("matplotlib")
    assert (tmp_path / f"bench_{kind}_cpu_1m.png").stat().st_size > 3000


@pytest.mark.slow
def test_a_checkpoints_directory_is_measured(run, tmp_path):
    """Its own config and weights; the files of the report are named after it.

    Slow: three programs are compiled and timed.
    """
    directory = Path(__file__).parents[1] / "fixtures" / "hf" / "llama2-gqa"
    flags = ["--batch", "1", "--prompt", 64, "--new", 2, "--budget", 16, "--repeats", 1]
    flags += ["--methods", "snapkv/padded", "--model", directory, "--out", tmp_path]
    code, out, _ = run("bench", "decode", *flags)
    assert code == 0
    last = json.loads(out.splitlines()[-1])
    assert last["machine"]["weights"] == sum(
        leaf.nbytes for leaf in jax.tree.leaves(load_model(directory, progress=False))
    )
    assert json.loads((tmp_path / "bench_decode_cpu_llama2-gqa.json").read_text()) == last
    assert model_config(str(directory), 64) == load_config(directory)  # all that scores need


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["speed"], "invalid choice: 'speed'"),
        (["decode", "--model", "gpt"], "--model gpt, expected one of 1m, 100m"),
        (["decode", "--batch", "0"], "--batch 0, expected integers of at least 1"),
        (["decode", "--methods", "nope"], "method='nope'"),
        (["decode", "--methods", "snapkv/padded/int8"], "quantize='int8'"),
        (["decode", "--methods", "snapkv/packed/int8/more"], "method='snapkv/packed/int8/more'"),
    ],
)
def test_wrong_calls_are_one_sentence(run, flags, named):
    code, out, err = run("bench", *flags)
    assert (code, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1


def test_settings_name_their_methods():
    call = {"model": "1m", "batches": (1,), "prompt": 64, "new": 4, "budget": 8}
    found = Settings(methods=("snapkv", "ada-snapkv/packed"), **call).configs()
    assert [config.method for config in found] == ["full", "snapkv", "ada-snapkv"]
    assert [config.layout for config in found] == [None, None, "packed"]
