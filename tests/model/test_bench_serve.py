"""The measurement of a server: rows that fit, tokens that add up, bounds. Speed is not tested."""

import json

import numpy as np
import pytest

from kvjax.bench.load import Timeline, latencies, load_of
from kvjax.bench.serve import Settings, add_ratios, memory, rates, share
from kvjax.models.presets import preset, random_model
from kvjax.serve.clock import Clock, Decoding, Spent
from kvjax.serve.fit import page_bytes, pages_within, request_bytes, tail_bytes

SMALL = {"model": "1m", "budget": 16, "requests": 5, "lengths": (64,), "new_tokens": 9}


@pytest.fixture(scope="module")
def model():
    return random_model(preset("1m", 128))


def settings(**changed):
    return Settings(**({"methods": ("full", "ada-snapkv")} | SMALL | changed))


# ---------------------------------------------------------------------------- the clock
def test_a_dispatch_begins_when_the_one_before_it_is_done():
    clock = Clock()
    clock.note_prompt(queued=1.0, done=3.0)
    clock.note_tokens(queued=1.5, done=4.0, rows=2, tokens=16)
    clock.note_tokens(queued=3.5, done=6.0, rows=2, tokens=10)
    clock.note_tokens(queued=9.0, done=9.5, rows=1, tokens=8)  # nothing to do before
    assert clock.spent() == Spent(1, 2.0, (Decoding(1, 1, 8, 0.5), Decoding(2, 2, 26, 3.0)))


# ---------------------------------------------------------------------------- what fits
def test_memory_is_that_of_whole_caches(model):
    """Four layers of four heads of 16 numbers: 64 tokens, and a tail for all of the answer."""
    pages, slot = 4 * (64 * 4 // 16 + 1), 2 * 16 * 4 + 5
    one = pages * 16 * slot + 8 * 4 * 4 * 2 * 16 * 4
    assert memory(model, settings(full_rows=3)) == 3 * one
    assert memory(model, settings(cache_bytes=5000)) == 5000


@pytest.mark.parametrize("method", ["full", "ada-snapkv"])
@pytest.mark.parametrize("tail", [None, 8])
def test_as_many_rows_as_fit_and_no_more(model, method, tail):
    chosen = settings(requests=1000, tail=tail, new_tokens=25)
    size = memory(model, chosen)
    rows, menu = share(model, chosen, method, size).rows, chosen.menu(model, method)
    each = menu.pages(menu.choose(None, 64, None).entries, menu.growth(25))
    assert pages_within(size, menu, rows, 4) >= rows * each
    more = size - (rows + 1) * tail_bytes(menu, 4)
    assert more // page_bytes(menu, 4) < (rows + 1) * each


def test_recompression_bounds_a_row(model):
    chosen = settings(recompress_every=8, new_tokens=41)
    menu = chosen.menu(model, "ada-snapkv")
    assert request_bytes(menu, 64, 41, 4) == request_bytes(menu, 64, 9, 4)
    assert chosen.menu(model, "full").recompress is None


@pytest.mark.parametrize(("method", "width"), [("ada-snapkv", 4), ("prefixkv", 16)])
def test_a_table_is_no_wider_than_a_layer_can_come_to_be(model, method, width):
    """Of 16 entries for each of 16 heads a layer has a quarter, or any part: pages of 16 slots."""
    menu = settings(recompress_every=8).menu(model, method)
    assert menu.widest == width


def test_too_little_memory_is_one_sentence(model):
    with pytest.raises(
        ValueError, match=r"cache of 5000 bytes with method 'full', expected at lea"
    ):
        share(model, settings(), "full", 5000)


# ---------------------------------------------------------------------------- requests
def test_prompts_take_turns_and_arrive_at_random():
    call = {"count": 200, "lengths": (3, 5), "new_tokens": 4, "seed": 7}
    load = load_of(list(range(900)), 50, rate=None, **call)
    assert load.prompts[:3] == ([0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10])
    assert set(load.arrivals) == {0.0}
    random = load_of(None, 50, rate=4.0, **call)
    assert random == load_of(None, 50, rate=4.0, **call)
    assert all(3 <= token < 50 for prompt in random.prompts for token in prompt)
    waits = np.diff(random.arrivals)
    assert random.arrivals[0] == 0
    assert 0.2 < waits.mean() < 0.3
    assert 0.8 < waits.std() / waits.mean() < 1.2  # as exponential ones are
    with pytest.raises(ValueError, match=r"the text has 9 tokens, expected at least 800"):
        load_of(list(range(9)), 50, rate=None, **call)


def test_latencies_are_what_clients_wait():
    one = Timeline(1.0, ((3.0, 1), (3.5, 4), (5.5, 4)))
    found = latencies([one])
    assert found["ttft_p50"] == 2
    assert found["inter_token_p50"] == pytest.approx((0.125 + 0.5) / 2)
    assert found["wait_p50"] == 1.25
    assert found["wait_most"] == 2


# ---------------------------------------------------------------------------- bounds
def test_a_bound_has_all_rows_drawing_all_the_time():
    spent = Spent(4, 2.0, (Decoding(1, 1, 8, 1.0), Decoding(10, 1, 80, 2.0)))
    found = rates(spent, tokens=92, seconds=6.0)
    assert found["most_rows"] == 10
    assert found["output_per_decode_second"] == pytest.approx(88 / 3)
    assert found["decode_bound"] == 40
    assert found["whole_bound"] == pytest.approx(92 / (2 + 88 / 40))
    rows = [found, found | {"most_rows": 30, "output_per_second": 46.0}]
    add_ratios(rows)
    assert rows[1]["rows_of_first"] == 3
    assert rows[1]["whole_of_first"] == pytest.approx(3)
    assert rows[0]["of_decode_bound"] == pytest.approx(88 / 3 / 40)


# ---------------------------------------------------------------------------- the command
@pytest.mark.slow
def test_the_command_measures_all_methods_with_the_same_bytes(run, tmp_path):
    """A table, a picture, and one JSON object last.

    Slow: the programs of two servers are compiled.
    """
    flags = ["--model", "1m", "--requests", 5, "--tokens", "64", "--new", 9, "--budget", 16]
    flags += ["--rate", "1000", "--full-rows", 2, "--decode-steps", 8, "--reads", 5]
    flags += ["--save-prompts", tmp_path / "ids.jsonl", "--out", tmp_path]
    code, out, _ = run("bench", "serve", *flags)
    assert code == 0
    last = json.loads(out.splitlines()[-1])
    assert json.loads((tmp_path / "bench_serve_cpu_1m_64_9_1000.json").read_text()) == last
    full, packed = last["rows"]
    assert [full["method"], packed["method"]] == ["full", "ada-snapkv"]
    assert full["cache_bytes"] == packed["cache_bytes"]
    assert [full["rows"], packed["rows"]] == [2, 5]
    for row in last["rows"]:
        assert (row["prompt_tokens"], row["output_tokens"]) == (5 * 64, 5 * 9)
        assert sum(one["tokens"] for one in row["by_rows"]) == 5 * 8
        assert row["most_rows"] <= row["rows"]
        assert 0 < row["prefill_seconds"] + row["decode_seconds"] <= row["seconds"]
    ids = [json.loads(line) for line in (tmp_path / "ids.jsonl").read_text().splitlines()]
    assert [len(prompt) for prompt in ids] == [64] * 5
    assert "output/s of decode time" in out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "bench_serve_cpu_1m_64_9_1000.png").stat().st_size > 3000


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tokens", "0"], "--tokens 0, expected integers of at least 1"),
        (["--rate", "no"], "'no', expected a number above 0"),
        (["--methods", ""], "--methods '', expected"),
        (["--methods", "nope"], "method='nope'"),
        (["--cache-bytes", "1K"], "cache of 1024 bytes with method 'full', expected at least"),
        (["--tail-slots", "5"], "tail_slots=5, expected a multiple of decode_steps=8"),
        (
            ["--recompress-every", "12"],
            "recompress.every=12, expected a multiple of decode_steps=8",
        ),
        (["--text", "nothing.txt"], "--text nothing.txt beside a model without a tokenizer"),
    ],
)
def test_wrong_calls_are_one_sentence(run, flags, named):
    code, out, err = run("bench", "serve", "--model", "1m", "--tokens", "64", *flags)
    assert (code, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1
