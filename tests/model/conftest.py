"""The small model that most of these files ask, and prompts for it; a file may have others."""

from pathlib import Path

import numpy as np
import pytest

from kvjax.models.checkpoints.weights import load_decoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"


@pytest.fixture(scope="module")
def model():
    return load_decoder(FIXTURES / "llama2-gqa", progress=False)


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of 64, 41 and 52 tokens: one bucket of 64."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, 80, size).tolist() for size in (64, 41, 52)]
