"""Attention to slots: reference against float64, TPU kernel against the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from slot_cases import make_case, make_dead, oracle, quantized, ragged

from kvjax.kernels.decode_attention import packed, paged_attention, tpu
from kvjax.kernels.decode_attention.by_head import block_size, owned


def pool_attention(start, end, evicted=None, region=None, **case):
    """The public call for a layer that lies at [start, end): consecutive pages of one slot."""
    if evicted is not None:
        evicted = evicted[0] - start[:, None], evicted[1] - start[:, None, None]
    return paged_attention(
        **case, table=start[:, None], lengths=end - start, evicted=evicted, page=1,
        consecutive=True, run=region,
    )  # fmt: skip


OWNERS = ["any", "runs", "one head", "one slot", "empty layer", "holes"]


@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("owners", OWNERS)
def test_reference_matches_float64(owners, window, block, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", block)
    case = make_case(3, tokens=2, owners=owners)
    for evicted in (None, make_dead(0, case, 2)):
        out, lse = packed.slot_attention(
            **jax.tree.map(jnp.asarray, case),
            kv_heads=2,
            window=window,
            evicted=jax.tree.map(jnp.asarray, evicted),
        )
        expected = oracle(case, 2, window, evicted)
        np.testing.assert_allclose(out, expected[0], atol=2e-6)
        np.testing.assert_allclose(lse, expected[1], atol=2e-6)


@pytest.mark.parametrize("block", [7, 512])
def test_reference_of_int8_entries_matches_float64(block, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", block)
    case, exact = quantized(make_case(3, tokens=2))
    out, lse = packed.slot_attention(**jax.tree.map(jnp.asarray, case), kv_heads=2)
    expected = oracle(exact, 2)
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=2e-6)


def test_reference_with_a_fixed_region():
    case = make_case(5, slots=30)
    case["start"][:], case["end"][:] = 10, [25, 18]
    expected = packed.slot_attention(**jax.tree.map(jnp.asarray, case), kv_heads=2)
    out = packed.slot_attention(**jax.tree.map(jnp.asarray, case), kv_heads=2, region=(10, 26))
    for a, b in zip(out, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


# Twins of the named shapes: the same query and KV heads and widths, few slots.
SHAPES = {
    "llama-3-8b": (32, 8, 128),
    "llama-3-70b/tp8": (8, 1, 128),
    "qwen3-0.6b": (16, 8, 128),
    "width 64": (12, 4, 64),
    "width 80": (4, 4, 80),
    "width 96": (6, 2, 96),
    "width 256": (4, 2, 256),
}


@pytest.mark.parametrize("name", SHAPES)
def test_tpu_kernel_matches_the_reference(name):
    heads, kv_heads, head_dim = SHAPES[name]
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "slots": 400}
    case = jax.tree.map(jnp.asarray, make_case(7, **shape))
    expected = packed.slot_attention(**case, kv_heads=kv_heads)
    out = tpu.slot_attention(**case, kv_heads=kv_heads, tile=128, interpret=True)
    np.testing.assert_allclose(out[0], expected[0], atol=5e-6)
    np.testing.assert_allclose(out[1], expected[1], atol=5e-6)


@pytest.mark.parametrize(("tokens", "window"), [(1, None), (3, 30)])
@pytest.mark.parametrize("owners", OWNERS)
def test_tpu_kernel_masks(owners, window, tokens):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "slots": 300, "tokens": tokens}
    case = jax.tree.map(jnp.asarray, make_case(11, owners=owners, **shape))
    evicted = jax.tree.map(jnp.asarray, make_dead(5, case, 2)) if tokens > 1 else None
    call = {**case, "kv_heads": 2, "window": window, "evicted": evicted}
    expected = packed.slot_attention(**call)
    out = tpu.slot_attention(**call, tile=128, interpret=True)
    np.testing.assert_allclose(out[0], expected[0], atol=5e-6)
    np.testing.assert_allclose(out[1], expected[1], atol=5e-6)


@pytest.mark.parametrize("owners", ["any", "one slot"])
def test_tpu_kernel_with_int8_entries(owners):
    case, _ = quantized(make_case(19, head_dim=64, slots=300, owners=owners))
    case = jax.tree.map(jnp.asarray, case)
    expected = packed.slot_attention(**case, kv_heads=2)
    out = tpu.slot_attention(**case, kv_heads=2, tile=128, interpret=True)
    np.testing.assert_allclose(out[0], expected[0], atol=5e-6)
    np.testing.assert_allclose(out[1], expected[1], atol=5e-6)


@pytest.mark.parametrize("head_dim", [64, 128])  # 128 ** -0.5 is no power of two
def test_tpu_kernel_scales_scores_in_float32(head_dim):
    case = jax.tree.map(jnp.asarray, make_case(13, head_dim=head_dim, slots=200))
    half = case | {name: case[name].astype("bfloat16") for name in ("q", "entries")}
    exact = case | {name: half[name].astype(jnp.float32) for name in ("q", "entries")}
    expected = packed.slot_attention(**exact, kv_heads=2)
    out = tpu.slot_attention(**half, kv_heads=2, tile=128, interpret=True)
    np.testing.assert_allclose(out[1], expected[1], atol=5e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tpu_kernel_in_half_precision(dtype):
    case = jax.tree.map(jnp.asarray, make_case(13, head_dim=64, slots=200))
    half = case | {"q": case["q"].astype(dtype), "entries": case["entries"].astype(dtype)}
    exact = case | {name: half[name].astype(jnp.float32) for name in ("q", "entries")}
    expected = packed.slot_attention(**exact, kv_heads=2)
    out = tpu.slot_attention(**half, kv_heads=2, tile=128, interpret=True)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(out[0], expected[0], atol=8 * eps)


def test_tpu_kernel_has_no_races():
    """Mosaic's interpreter, which simulates the copies and their semaphores."""
    case = jax.tree.map(jnp.asarray, make_case(17, head_dim=64, slots=300))
    expected = packed.slot_attention(**case, kv_heads=2)
    interpret = pltpu.InterpretParams(detect_races=True)
    run = partial(tpu.slot_attention, kv_heads=2, tile=128, interpret=interpret)
    out = jax.jit(run)(**case)
    np.testing.assert_allclose(out[0], expected[0], atol=5e-6)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert interpreter.races is not None
    assert not interpreter.races.races_found


def test_int8_entries_come_with_scales():
    case = jax.tree.map(jnp.asarray, quantized(make_case(1))[0])
    without = {name: value for name, value in case.items() if name != "scales"}
    with pytest.raises(ValueError, match="entries are int8, expected int8 with scales, or neither"):
        pool_attention(**without, kv_heads=2)


# ---------------------------------------------------------------------------- many rows


def both(case, **rules):
    """The reference's and the TPU kernel's answers to a question's many rows."""
    case, rules = jax.tree.map(jnp.asarray, (case, rules))
    call = partial(pool_attention, **case, kv_heads=2, **rules)
    yield jax.jit(partial(call, implementation="xla"))()
    yield tpu.slot_attention(**case, kv_heads=2, tile=128, interpret=True, **rules)


@pytest.mark.parametrize("owners", OWNERS)
def test_many_rows_match_float64(owners, many):
    case = ragged(23, owners)
    expected = oracle(case, 2)
    assert not expected[0][1, 2:].any()  # padded tokens see nothing
    for out, lse in both(case):
        np.testing.assert_allclose(out, expected[0], atol=5e-6)
        np.testing.assert_allclose(lse, expected[1], atol=5e-6)


def test_many_rows_with_a_window_and_evicted_slots(many):
    case = ragged(29, "any")
    evicted = make_dead(7, case, 2)
    expected = oracle(case, 2, 30, evicted)
    rules = {"evicted": jax.tree.map(jnp.asarray, evicted)}
    case, rules = jax.tree.map(jnp.asarray, (case, rules))
    xla = packed.slot_attention(**case, kv_heads=2, window=30, **rules)
    mosaic = tpu.slot_attention(**case, kv_heads=2, window=30, tile=128, interpret=True, **rules)
    for out, lse in (xla, mosaic):
        np.testing.assert_allclose(out, expected[0], atol=5e-6)
        np.testing.assert_allclose(lse, expected[1], atol=5e-6)


@pytest.mark.parametrize("owners", ["any", "one slot"])
def test_many_rows_with_int8_entries(owners, many):
    case, exact = quantized(ragged(31, owners))
    expected = oracle(exact, 2)
    for out, lse in both(case):
        np.testing.assert_allclose(out, expected[0], atol=5e-6)
        np.testing.assert_allclose(lse, expected[1], atol=5e-6)


def test_many_rows_in_a_fixed_region(many):
    case = ragged(37, "holes")
    case["start"][:], case["end"][:] = 20, [250, 180]
    outside = np.ones(300, bool)
    outside[20:250] = False
    case["entries"][:, outside] = np.nan
    expected = oracle(case, 2)
    for module, rules in ((packed, {}), (tpu, {"tile": 128, "interpret": True})):
        arrays = jax.tree.map(jnp.asarray, case)
        out, lse = module.slot_attention(**arrays, kv_heads=2, region=(20, 250), **rules)
        np.testing.assert_allclose(out, expected[0], atol=5e-6)
        np.testing.assert_allclose(lse, expected[1], atol=5e-6)


def test_bounds_of_what_a_head_owns():
    """Whatever the order: slots 1..8 are the layer's, head 1 owns two of them, head 2 none."""
    owners = jnp.array([[1, 0, -1, 1, 0, 0, 1, -1, 0, 2]], jnp.int8)
    bounds = jnp.array([1]), jnp.array([9])
    first, end = owned(owners, *bounds, 3)
    assert (first.tolist(), end.tolist()) == ([[1, 3, 0]], [[9, 7, 0]])
    again = owned(owners, *bounds, 3, region=(1, 9))
    assert [bound.tolist() for bound in again] == [first.tolist(), end.tolist()]


@pytest.mark.parametrize(
    ("rows", "most", "multiple", "size"),
    [(5, 256, 16, 16), (320, 256, 16, 160), (512, 256, 16, 256)],
)
def test_blocks_are_as_full_as_may_be(rows, most, multiple, size):
    assert block_size(rows, most, multiple) == size


def test_scores_of_many_rows_never_span_a_layer():
    """Temporaries of a question of 128 tokens, Llama-3-8B's heads, 16 times the slots.

    A slot's scores would be 16 KB, its entry is 512 bytes. What still grows is the reduction that
    finds heads' bounds, 8 bytes for each slot and head on a CPU, nothing on an accelerator.
    """

    def temporaries(slots, region):
        array = jax.ShapeDtypeStruct
        arrays = {
            "q": array((1, 128, 32, 128), jnp.bfloat16),
            "query_positions": array((1, 128), jnp.int32),
            "entries": array((1, slots, 256), jnp.bfloat16),
            "owners": array((1, slots), jnp.int8),
            "positions": array((1, slots), jnp.int32),
            "start": array((1,), jnp.int32),
            "end": array((1,), jnp.int32),
        }
        run = partial(pool_attention, kv_heads=8, region=region, implementation="xla")
        compiled = jax.jit(lambda call: run(**call)).lower(arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = (temporaries(slots, (0, slots)) for slots in (8192, 131_072))
    assert many - few < 1.1 * 8 * 8 * (131_072 - 8192)
