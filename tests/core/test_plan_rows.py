"""Rows that fit on a device: by hand, against the server's own division, and the command."""

import json

import pytest

from kvjax.config import CompressionConfig, Recompress
from kvjax.models.presets import preset
from kvjax.plan.served import ALLOWANCE, Serving, fit
from kvjax.plan.topology import CARDS, TOPOLOGIES

FLAGS = ["--model", "llama-3-8b", "--topology", "l4,h200", "--budget", "128", "--new", "500"]


def asked(method="full", budget=None, rule=None, prompt=1000):
    return Serving(
        name="llama", model=preset("llama-3-8b", 2**14), chip=CARDS["l4"], prompt=prompt,
        new_tokens=500, compression=CompressionConfig.named(method, budget), recompress=rule,
    )  # fmt: skip


def test_a_full_request_by_hand():
    """32 layers of 8 heads of 128 numbers in bf16; pages of 64 slots, a tail of 32."""
    entry, heads = 2 * 128 * 2, 32 * 8
    pages = heads * (1000 + 499) // 64 + 32
    found = fit(asked())
    assert found.request == pages * 64 * (entry + 5) + 32 * heads * entry
    left = CARDS["l4"].room - found.weights - found.reading
    assert found.rows == left // (found.request + found.beside)
    # Reading: a layer's states of 1,024 tokens with the allowance, and the prompt's own entries.
    layer = 1024 * (3 * 4096 + 2 * 4096 + 2 * 1024) * 2 + 4 * 128_256
    mlp = 1024 * (2 * 14_336 + 4096) * 2 + 4 * 128_256
    own = 1024 * heads * (entry + 4)  # a position beside each
    assert found.reading == int(ALLOWANCE * max(layer, mlp)) + own


def test_compression_and_recompression_leave_room_for_more():
    rule = Recompress(every=64, budget=128)
    full, kept, again = (
        fit(asked()), fit(asked("ada-snapkv", 128)), fit(asked("ada-snapkv", 128, rule)),
    )  # fmt: skip
    assert again.request < kept.request < full.request
    assert full.rows < kept.rows < again.rows
    # What an answer holds then does not depend on its length.
    pages, tail, queries = (32 * 8 * 128 // 64 + 32) * 64 * 517, 64 * 32 * 8 * 512, 32 * 32 * 256
    assert again.request == pages + tail + 32 * queries
    assert fit(asked(prompt=6000)).rows < full.rows


def test_the_command_writes_a_table_and_its_json(run, tmp_path):
    page = tmp_path / "rows.md"
    flags = ["--rows", "500,6000", "--recompress-every", "64", "--json", "-o", page, *FLAGS]
    code, out, _ = run("plan", *flags)
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads(page.with_suffix(".json").read_text())
    assert [row["device"] for row in found["rows"]] == ["l4"] * 6 + ["h200"] * 6
    assert [row["recompress_every"] for row in found["rows"][:6]] == [None] * 4 + [64] * 2
    rows = {(row["device"], row["method"], row["prompt"]): row["rows"] for row in found["rows"]}
    assert rows["h200", "full", 500] > rows["l4", "full", 500] > rows["l4", "full", 6000] > 0
    assert all(str(row["rows"]) in page.read_text() for row in found["rows"])
    assert "kvjax plan --rows 500,6000 --model llama-3-8b --topology l4,h200" in page.read_text()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rows", "0", *FLAGS], "--rows 0, expected lengths of prompts"),
        (["--rows", "500"], "--model is missing, expected it beside --rows"),
        (
            ["--rows", "500", "--model", "1m", "--topology", "v5e-8"],
            "--topology v5e-8, expected one",
        ),
        (["--recompress-every", "64"], "--recompress-every, expected --rows beside it"),
        (
            ["--rows", "500", "--recompress-every", "64", *FLAGS, "--budget", "20%"],
            "--budget 20% beside --recompress-every, expected a number of entries",
        ),
    ],
)
def test_wrong_calls_are_one_sentence(run, flags, named):
    code, out, err = run("plan", *flags)
    assert (code, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1


def test_cards_are_no_topologies():
    """Nothing is compiled for them."""
    assert not set(CARDS) & set(TOPOLOGIES)
