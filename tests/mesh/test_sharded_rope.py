"""Rotary frequencies by length over a mesh: each row keeps its own, wherever it lies."""

from pathlib import Path

import numpy as np

import kvjax
from kvjax.sharding import make_mesh

FOLDER = Path(__file__).parents[1] / "fixtures" / "rope" / "dynamic"


def test_answers_on_a_mesh_are_those_of_one_device():
    """Of two prompts, one on each side of the original length."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(5, 80, size).tolist() for size in (25, 61)]
    call = {"max_new_tokens": 6, "eos_ids": (), "return_cache": True}
    found = []
    for mesh in (None, make_mesh(2, 2)):
        model, _ = kvjax.load(FOLDER, progress=False, mesh=mesh)
        out = kvjax.generate(model, prompts, **call)
        np.testing.assert_array_equal(out.cache.rope_length, [31, 67])
        found.append(out)
    one, many = found
    assert many.tokens == one.tokens
    np.testing.assert_allclose(many.log_probs, one.log_probs, atol=1e-4)
