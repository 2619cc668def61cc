"""Fixtures that files of array tests share."""

import pytest

from kvjax.kernels.decode_attention import packed, tpu


@pytest.fixture
def many(monkeypatch):
    """Blocks of one head's rows from five on, several a head, the last one not full."""
    for module in (packed, tpu):
        monkeypatch.setattr(module, "FEW", 4)
    monkeypatch.setattr(packed, "BLOCK", 70)
    monkeypatch.setattr(packed, "SCORES", 70 * 2 * 16)
    monkeypatch.setattr(tpu, "MOST_ROWS", 16)
