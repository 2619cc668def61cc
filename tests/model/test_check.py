"""`make gpu-check`: parts that fail, hang and die, going on, the summary."""

import json
import os
import subprocess
import sys

import check_parts
import jax.numpy as jnp
import numpy as np
import pytest
from check_parts import part

from kvjax.bench.check import kernels, needs, oracle, runner
from kvjax.bench.check.__main__ import main
from kvjax.bench.check.journal import NAME, Journal, summary
from kvjax.bench.check.listed import PLATFORMS, parts
from kvjax.bench.check.part import Answer, Failed, agree, error
from kvjax.bench.check.runner import run
from kvjax.kernels import decode_attention

SETTINGS = {"platform": "cpu", "small": True}


# ---------------------------------------------------------------------------- running
def test_parts_that_fail_hang_or_die_leave_the_others(tmp_path):
    """Slow: three processes are started, ten seconds, as a hung and a dead one are replaced."""
    listed = [
        part(check_parts.fails),
        part(check_parts.hangs, limit=0.5),
        part(check_parts.raises),
        part(check_parts.dies),
        part(check_parts.passes),
    ]
    shown = []
    journal = Journal(tmp_path, SETTINGS)
    run(listed, journal, 300, tmp_path / "log.txt", shown.append)
    errors = {name: row.get("error") for name, row in journal.rows.items()}
    assert errors == {
        "fails": "error 2.0e+00, expected at most 3.1e-05",
        "hangs": "took more than its 0.5 s",
        "raises": "RuntimeError: first line",
        "dies": "its process died (exit code 11)",
        "passes": None,
    }
    assert len(shown) == 5
    assert "second line" in (tmp_path / "log.txt").read_text()
    # What is on the disk is what the next call reads: what failed runs again, what passed does not.
    again = Journal(tmp_path, SETTINGS)
    assert again.rows == journal.rows
    assert [one.name for one in again.waiting(listed)] == ["fails", "hangs", "raises", "dies"]
    text = summary(again, listed)
    assert "| passes | passed | 0 | seven |" in text
    assert text.endswith("cpu: 1 of 5 parts passed, 4 failed.\n")


def test_a_call_goes_on_where_the_time_ended(tmp_path):
    """The part that the end cut off has no result and comes first in the next call."""
    listed = [part(check_parts.passes), part(check_parts.hangs), part(check_parts.fails)]
    journal = Journal(tmp_path, SETTINGS)
    journal.write({"part": "passes", "result": "passed", "seconds": 1.0})
    with open(journal.path, "a") as file:
        file.write('{"part": "hangs", "resu')  # killed while it wrote
    journal = Journal(tmp_path, SETTINGS)
    assert [one.name for one in journal.waiting(listed)] == ["hangs", "fails"]
    run([], journal, 10, tmp_path / "log.txt")
    run(journal.waiting(listed), journal, 0, tmp_path / "log.txt")
    assert set(journal.rows) == {"passes"}
    ended = "1 of 3 parts passed, 0 failed, 2 not run: the same command goes on there.\n"
    assert summary(journal, listed).endswith(ended)
    with pytest.raises(ValueError, match=r"holds results of .*'cpu'.*expected a new folder"):
        Journal(tmp_path, {"platform": "gpu", "small": False})


def test_the_command_runs_and_goes_on(tmp_path, capsys):
    """A kernel and the speed of a step, small, on a CPU, in a process of their own."""
    call = ["--platform", "cpu", "--out", str(tmp_path)]
    assert main([*call, "--only", "kernel prefill float32", "speed decode full"]) == 0
    out = capsys.readouterr().out
    assert "| kernel prefill float32 | passed |" in out
    assert "% of copy" in out
    rows = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()[1:]]
    assert rows[0]["found"]["errors"]["xla"] < 3e-5
    assert rows[1]["found"]["bandwidth"]["copy"] > 0
    assert (tmp_path / "summary.md").read_text() in out
    # Nothing is left to do, and a process would have found no time.
    assert main([*call, "--only", "speed decode full", "--seconds", "0"]) == 0
    assert main([*call, "--only", "speed scores", "--seconds", "0"]) == 3
    assert main([*call, "--only", "nothing"]) == 2
    assert "--only nothing, expected a piece of one of kernel" in capsys.readouterr().err


@pytest.mark.parametrize("platform", PLATFORMS)
def test_names_are_distinct_and_limits_fit(platform):
    names = [one.name for one in parts(platform, small=False)]
    assert len(set(names)) == len(names)
    assert names[0].startswith("kernel")
    assert all(one.limit < 480 for one in parts(platform, small=False))


# ---------------------------------------------------------------------------- comparing
def test_errors_count_nan_and_infinity():
    assert error([1.0, -np.inf], [1.0, -np.inf]) == 0
    assert error([3.0], [1.0]) == 1
    for wrong in (np.nan, np.inf, -np.inf):
        assert error([wrong], [1.0]) == np.inf
        assert error([1.0], [wrong]) == np.inf
    with pytest.raises(Failed, match="shape"):
        error([1.0], [[1.0]])


def test_answers_agree_up_to_a_near_tie():
    mine = [Answer([1, 2, 3, 4], [-1.0, -1.0, -1.0, -9.0])]
    same = agree(mine, mine, 1e-3)
    assert (same["error"], same["same"]) == (0, 4)
    tie = [Answer([1, 2, 5, 6], [-1.0, -1.0, -1.0005, -2.0])]
    assert agree(mine, tie, 1e-3)["same"] == 2
    with pytest.raises(Failed, match=r"row 0, token 2: log-probability -1\.0000, expected -1\.5"):
        agree(mine, [Answer([1, 2, 5, 6], [-1.0, -1.0, -1.5, -2.0])], 1e-3)
    with pytest.raises(Failed, match="0 of 4 tokens agree"):
        agree(mine, [Answer([7, 2, 3, 4], [-1.0] * 4)], 1e-3)
    with pytest.raises(Failed, match="log-probability nan"):
        agree([Answer([1], [np.nan])], [Answer([1], [-1.0])], 1e-3)


def test_a_wrong_kernel_is_named(monkeypatch):
    """An owner is overlooked: every head sees every slot."""
    right = decode_attention.paged_attention

    def wrong(*, owners, **arguments):
        return right(owners=jnp.where(owners > 0, 0, owners), **arguments)

    monkeypatch.setattr(decode_attention, "paged_attention", wrong)
    monkeypatch.setattr(kernels, "POOLS", kernels.POOLS[:1])
    with pytest.raises(Failed, match=r"xla, 1 tokens, H 64: error .*, expected at most 3"):
        kernels.pool("float32", small=True)


def test_the_oracle_by_hand():
    """Two slots of one head, scores ln 3 and 0: weights 3/4 and 1/4; then one is evicted."""
    q = np.full((1, 1, 1, 1), np.log(3.0))
    case = {
        "query_positions": np.array([[5]]),
        # The second page comes first; of the first one only slot 0 is the layer's.
        "entries": np.array([[[np.nan, np.nan], [9.0, 9.0], [1.0, 4.0], [0.0, 8.0]]]),
        "owners": np.array([[-1, 0, 0, 0]]),
        "positions": np.array([[-1, 1, 0, 5]]),
        "table": np.array([[1, 0]]),
        "lengths": np.array([3]),
        "page": 2,
    }
    out, lse = oracle.paged_attention(q, **case, kv_heads=1)
    np.testing.assert_allclose([out.item(), lse.item()], [5.0, np.log(4.0)])
    out, lse = oracle.paged_attention(q, **case, kv_heads=1, window=5)
    np.testing.assert_allclose([out.item(), lse.item()], [8.0, 0.0])
    evicted = np.array([[1]]), np.array([[[2]]])
    out, lse = oracle.paged_attention(q, **case, kv_heads=1, evicted=evicted)
    np.testing.assert_allclose([out.item(), lse.item()], [4.0, np.log(3.0)])
    k = np.array([1.0, 0.0]).reshape(1, 2, 1, 1)
    args = np.repeat(q, 2, 1), k, np.array([2])
    sums = oracle.window_scores(args[0], np.array([[-1, 1]]), *args[1:])
    np.testing.assert_allclose(sums, [[[0.75, 0.25]]])
    out, lse = oracle.prefill_attention(args[0], k, k, args[2])
    np.testing.assert_allclose(out.ravel(), [1.0, 0.75])
    np.testing.assert_allclose(lse.ravel(), np.log([3.0, 4.0]))


# ---------------------------------------------------------------------------- what is needed
def test_what_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(needs.PACKAGES, "cpu", {"jax": "jax"})
    packages = {"jax": "jax[tpu]", "not_there_at_all": "not-there"}
    monkeypatch.setitem(needs.PACKAGES, "tpu", packages)
    sentence = needs.missing("tpu")
    assert sentence.startswith(f"tpu-check needs not-there under {sys.executable}: ")
    assert "\n" not in sentence
    monkeypatch.setitem(needs.PACKAGES, "tpu", {"jax": "jax[tpu]"})
    assert "a TPU that JAX sees (" in needs.missing("tpu")
    monkeypatch.setattr(needs, "version", lambda _: "0.12.0")
    assert "jax 0.11.2 to 0.11 (this is 0.12.0)" in needs.missing("cpu")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """On a busy machine a process takes long to begin."""
    monkeypatch.setattr(runner, "START", 900.0)


@pytest.mark.slow
def test_make_says_what_is_missing(tmp_path):
    """A process: `make` with a bare interpreter, which sees none of the chips' compilers.

    Slow: a process of its own that imports what it can.
    """
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["make", "gpu-check", f"PYTHON={sys.executable} -S", f"OUT={tmp_path}"],
        capture_output=True, text=True, timeout=120, cwd=check_parts.__file__.rsplit("/", 2)[0],
        env=bare,
    )  # fmt: skip
    assert done.returncode == 2
    assert "kvjax: gpu-check needs jax[cuda13], triton, jax-triton, flax" in done.stderr
