"""Several processes share an evaluation: on one machine, through `jax.distributed`."""

import json
import os
import socket
import subprocess
import sys

import pytest

from kvjax.eval import pod
from kvjax.eval.journal import key_of, read_rows

CONFIG = """\
model = "tiny"
tasks = ["tiny/multikey"]
methods = ["ada-snapkv"]
budgets = ["25%"]
lengths = [144]
count = 5
batch = 3
"""


def start(config, out, **environment) -> subprocess.Popen:
    line = [sys.executable, "-m", "kvjax.cli", "eval", "--config", config, "--out", out, "--json"]
    line += ["--distributed"] * bool(environment)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(line, env=environment, stdout=pipe, stderr=pipe, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rows(out) -> dict:
    return {key_of(row): row | {"seconds": None} for row in read_rows([out])}


def test_two_processes_give_what_one_gives(tmp_path):
    config = tmp_path / "e.toml"
    config.write_text(CONFIG)
    alone = start(config, tmp_path / "alone")
    where = f"127.0.0.1:{free_port()}"
    both = [
        start(
            config,
            tmp_path / "both",
            KVJAX_PROCESSES="2",
            KVJAX_PROCESS=str(index),
            JAX_COORDINATOR_ADDRESS=where,
        )
        for index in (0, 1)
    ]
    printed = []
    for process in (alone, *both):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        printed.append(out)
    assert json.loads(printed[0].splitlines()[-1])["run"] == 5
    assert json.loads(printed[1].splitlines()[-1])["run"] == 3
    assert printed[2] == ""  # only process 0 speaks
    files = sorted(path.name for path in (tmp_path / "both").glob("*.jsonl"))
    assert files == ["results-00000.jsonl", "results-00001.jsonl"]
    assert len(rows(tmp_path / "alone")) == 5
    assert rows(tmp_path / "both") == rows(tmp_path / "alone")


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
