"""Attention through a table of pages, in pools of a row or of all: against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from slot_cases import make_case, make_dead, oracle, paged, quantized, ragged, through_pages

from kvjax.kernels.decode_attention import packed, paged_attention, tpu


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("page", "implementation"), [(4, "xla"), (16, "xla"), (16, "pallas")])
@pytest.mark.parametrize("owners", ["any", "one slot", "empty layer", "holes"])
def test_pages_match_float64(owners, page, implementation, shared, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 32)
    case = make_case(43, tokens=2, owners=owners, head_dim=64, slots=300)
    evicted = make_dead(9, case, 2)
    expected = oracle(case, 2, 30, evicted)
    start = case["start"]
    evicted = evicted[0] - start[:, None], evicted[1] - start[:, None, None]
    gone = jax.tree.map(jnp.asarray, evicted)
    found = through_pages(
        paged(3, case, page, shared=shared), gone, page, implementation, window=30
    )
    np.testing.assert_allclose(found[0], expected[0], atol=5e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=5e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_pages_of_int8_entries(implementation):
    case, exact = quantized(make_case(47, head_dim=64, slots=200))
    expected = oracle(exact, 2)
    found = through_pages(paged(5, case, 32), None, 32, implementation)
    np.testing.assert_allclose(found[0], expected[0], atol=5e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=5e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_many_rows_through_pages(implementation, shared, many):
    case = ragged(53, "any")
    expected = oracle(case, 2)
    found = through_pages(paged(7, case, 16, shared=shared), None, 16, implementation)
    np.testing.assert_allclose(found[0], expected[0], atol=5e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=5e-6)


def test_copies_of_pages_have_no_races():
    """Two tiles' copies and their semaphores, simulated by Mosaic's interpreter."""
    case = paged(11, make_case(59, head_dim=64, slots=400, owners="holes"), 32)
    call = {name: jnp.asarray(x) for name, x in case.items()}
    table, lengths = call.pop("table"), call.pop("lengths")
    expected = paged_attention(**call, table=table, lengths=lengths, page=32, kv_heads=2)
    interpret = pltpu.InterpretParams(detect_races=True)

    def run(table, lengths, call):
        bounds = {"start": jnp.zeros_like(lengths), "end": lengths}
        rules = {"kv_heads": 2, "tile": 128, "interpret": interpret}
        return tpu.slot_attention(**call, **bounds, **rules, pages=(table, 32))

    out = jax.jit(run)(table, lengths, call)
    np.testing.assert_allclose(out[0], expected[0], atol=5e-6)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert interpreter.races is not None
    assert not interpreter.races.races_found


def test_a_pool_is_of_a_row_or_of_all():
    case = {name: jnp.asarray(x) for name, x in paged(1, make_case(1), 4).items()}
    for name in ("q", "query_positions", "table", "lengths"):
        case[name] = jnp.concatenate([case[name]] * 2)
    with pytest.raises(ValueError, match="entries have 2 pools, expected q's 4 or 1"):
        paged_attention(**case, page=4, kv_heads=2)
