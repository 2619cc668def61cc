"""Nothing changes by accident: every cell of the net (`net.py`) is what it was."""

import json

import net
import pytest

EXPECTED = json.loads(net.FILE.read_text())


@pytest.fixture(scope="module", params=net.CHECKPOINTS)
def checkpoint(request):
    return request.param


@pytest.mark.slow
def test_every_cell_is_as_it_was(checkpoint):
    """Slow: some thirty programs a checkpoint are compiled, half a minute."""
    found = {name: cell() for name, cell in net.cells(checkpoint)}
    assert list(found) == list(EXPECTED[checkpoint])
    changed = [name for name in found if net.differs(found[name], EXPECTED[checkpoint][name])]
    assert not changed


def test_a_change_would_show():
    cell = EXPECTED[net.CHECKPOINTS[0]]["ask snapkv padded"]
    assert not net.differs(cell, cell)
    first = cell[0]
    moved = {**first, "log_probs": [value + 1e-3 for value in first["log_probs"]]}
    assert net.differs([moved, *cell[1:]], cell)
    assert net.differs([{**first, "tokens": [row[::-1] for row in first["tokens"]]}], [first])
