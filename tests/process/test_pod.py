"""Several processes share an evaluation: on one machine, through `jax.distributed`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from kvjax.cli import main
from kvjax.eval import pod
from kvjax.eval.journal import key_of, read_rows

CONFIG = """\
model = "tiny"
tasks = ["tiny/multikey"]
methods = ["ada-snapkv"]
budgets = ["25%"]
lengths = [144]
protocols = ["seen"]
count = 6
batch = 2
"""
ROWS = 6  # one question each


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "e.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def alone(config):
    """Results of one process on one device."""
    out = config.parent / "alone"
    assert main(["eval", "--config", str(config), "--out", str(out)]) == 0
    return out


def start(config, out, count, devices=1, split=None) -> list[subprocess.Popen]:
    """`kvjax eval` in so many processes, each with so many virtual devices."""
    line = [sys.executable, "-m", "kvjax.cli", "eval", "--config", config, "--out", out, "--json"]
    line += ["--distributed", *(["--split", str(split)] if split else [])]
    given = {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}", 1),
        # Processes that share a program wait for one another where one of them reads it back.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "KVJAX_PROCESSES": str(count),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
    }
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            line, env=os.environ | given | {"KVJAX_PROCESS": str(index)}, stdout=pipe, stderr=pipe,
            text=True,
        )
        for index in range(count)
    ]  # fmt: skip


def finish(processes) -> list[dict | None]:
    """What each printed last."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        printed = [line for line in out.splitlines() if line.startswith("{")]
        found.append(json.loads(printed[-1]) if printed else None)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_same(out, alone):
    """Entries kept, predictions and all else; log-probabilities within 1e-5."""
    mine, theirs = ({key_of(row): row for row in read_rows([folder])} for folder in (out, alone))
    assert mine.keys() == theirs.keys()
    assert len(theirs) == ROWS
    for key, row in theirs.items():
        assert mine[key]["log_prob"] == pytest.approx(
            row["log_prob"], abs=5e-5
        )  # of some five tokens
        same = {"seconds": None, "log_prob": None}
        assert mine[key] | same == row | same


@pytest.mark.parametrize(
    ("count", "devices", "split", "teams", "first"),
    [
        pytest.param(4, 2, 2, 4, 2, id="four hosts, the model split within each"),
        pytest.param(2, 4, 8, 1, ROWS, id="two hosts that share one model"),
    ],
)
def test_processes_give_what_one_gives(
    config, alone, tmp_path, count, devices, split, teams, first
):
    out = tmp_path / "out"
    said = finish(start(config, out, count, devices, split))
    assert said[0] == {"run": first, "found": 0, "failed": 0, "out": str(out)}
    assert said[1:] == [None] * (count - 1)  # only process 0 speaks
    files = sorted(path.name for path in out.glob("*.jsonl"))
    assert files == [f"results-{team:05}.jsonl" for team in range(teams)]
    assert_same(out, alone)


def test_a_killed_process_is_made_up_for(config, alone, tmp_path, run):
    """Its rows stay, another run does the rest, and the report is that of one process."""
    out = tmp_path / "out"
    processes = start(config, out, 2)
    second = out / "results-00001.jsonl"
    while not (second.exists() and second.read_bytes().count(b"\n")):
        assert processes[1].poll() is None
        time.sleep(0.05)
    for process in reversed(processes):  # the second, then what is left, as a scheduler does
        process.send_signal(signal.SIGKILL)
        process.communicate()
    # It may have been quicker than the signal, so its file is cut where an early one cuts it:
    # within its second row.
    rows = second.read_bytes()
    second.write_bytes(rows[: rows.index(b"\n") + 20])
    whole = sum(1 for _ in read_rows([out]))
    assert 0 < whole < ROWS
    code, said, _ = run("eval", "--config", config, "--out", out, "--json")
    assert code == 0
    assert json.loads(said)["found"] >= whole
    assert_same(out, alone)
    for name, folder in (("merged", out), ("single", alone)):
        assert run("report", folder, "-o", tmp_path / name)[0] == 0
    reports = [(tmp_path / name / "report.csv").read_text() for name in ("merged", "single")]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("split", [0, 3, 12])
def test_a_split_that_fits_no_process_is_named(split):
    with pytest.raises(ValueError, match=rf"--split {split}, expected a divisor of the 8 devices"):
        pod.workers(split)


def test_a_process_of_eight_devices():
    two = pod.workers(2)
    assert (two.index, two.count, two.member) == (0, 1, 0)
    assert dict(two.mesh.shape) == {"data": 4, "model": 2}
    found = np.array([True, False])
    np.testing.assert_array_equal(two.agreed(found), found)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"KVJAX_PROCESSES": "2"}, "KVJAX_PROCESS=None, expected an integer in the environment"),
        (
            {"KVJAX_PROCESSES": "two", "KVJAX_PROCESS": "0"},
            "KVJAX_PROCESSES='two', expected an integer",
        ),
        (
            {"KVJAX_PROCESSES": "2", "KVJAX_PROCESS": "0"},
            "JAX_COORDINATOR_ADDRESS=None, expected host:port",
        ),
        (
            {"KVJAX_PROCESSES": "2", "KVJAX_PROCESS": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
            "KVJAX_PROCESS=2, expected less than KVJAX_PROCESSES=2",
        ),
        ({}, "--distributed found no cluster .*, expected a TPU slice, Slurm, or KVJAX_PROCESSES"),
    ],
)
def test_half_an_environment_is_named(monkeypatch, environment, message):
    for name in ("KVJAX_PROCESSES", "KVJAX_PROCESS", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def nothing_found(**_):  # this process has used JAX, so the real one would refuse first
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(pod.jax.distributed, "initialize", nothing_found)
    with pytest.raises(ValueError, match=message):
        pod.join()
