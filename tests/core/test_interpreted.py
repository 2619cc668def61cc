"""The record of the Triton kernels under Triton's interpreter is of the kernels as they are."""

import hashlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "tests/fixtures/triton_interpreted.json").read_text())


@pytest.mark.parametrize("kernel", sorted(RECORD["sha256"]))
def test_record_is_of_the_kernel_as_it_is(kernel):
    """A changed kernel has to be run again: `python tests/fixtures/run_triton.py -o ...`."""
    source = (ROOT / "kernels" / kernel / "triton_kernel.py").read_bytes()
    assert hashlib.sha256(source).hexdigest() == RECORD["sha256"][kernel]


def test_recorded_errors_are_within_the_limit():
    assert RECORD["limit"] <= 5e-6
    assert len(RECORD["errors"]) > 100
    assert max(RECORD["errors"].values()) <= RECORD["limit"]
    for word in (
        "page=16",
        "page=64",
        "one pool",
        "int8",
        "evicts",
        "T=16",
        "scores N",
        "window_scores",
    ):
        assert any(word in case for case in RECORD["errors"]), word


def test_every_triton_kernel_has_a_record():
    kernels = {path.parent.name for path in (ROOT / "kernels").glob("*/triton_kernel.py")}
    assert kernels == set(RECORD["sha256"])
