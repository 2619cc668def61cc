"""What compression holds and what it needs on the way, from shapes and from compilers."""

import jax
import jax.numpy as jnp
import pytest

from kvjax import METHODS, CompressionConfig, compress
from kvjax.cache.slots import in_pages
from kvjax.compile_for import missing
from kvjax.compression.compress import probe_request
from kvjax.compression.scorers import SCORERS
from kvjax.model_interface import Probe
from kvjax.plan.compile_matrix import LAYER_BYTES, layer_growth, packing

COMPRESSING = [name for name in METHODS if name != "full"]
array = jax.ShapeDtypeStruct


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def prompt_arrays(config, *, batch, tokens, layers, heads, kv_heads, head_dim, dtype):
    """Keys, values and probes of a prefilled prompt, as shapes."""
    keys = [array((batch, tokens, kv_heads, head_dim), dtype)] * layers
    shapes = {
        "queries": (batch, probe_request(config, tokens).queries, heads, head_dim),
        "column_sums": (batch, heads, tokens),
        "future_mean": (batch, heads, head_dim),
        "future_cov": (batch, heads, head_dim, head_dim),
        "output_norms": (batch, kv_heads, tokens),
        "reconstruction": (batch, kv_heads, tokens),
    }
    read = {"queries", *SCORERS[config.scorer].reads, *["output_norms"] * config.output_aware}
    kinds = {name: dtype if name == "queries" else jnp.float32 for name in read}
    return keys, keys, [Probe(**{name: array(shapes[name], kinds[name]) for name in read})] * layers


def run(config, tail_slots=0):
    def call(keys, values, probes):
        return compress(keys, values, probes, config, tail_slots=tail_slots)

    return call


LLAMA = {"layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": jnp.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESSING)
def test_llama_3_8b_holds_a_28th(name):
    """Batch 16, prompt 32,768, budget 1024; a tail of 128 on both sides, owners and positions.

    Slow: all 32 layers are traced for every method; nothing is computed.
    """
    config = CompressionConfig.named(name, 1024, layout="packed")
    arrays = prompt_arrays(config, batch=16, tokens=32_768, **LLAMA)
    held = jax.eval_shape(run(config, 128), *arrays)
    full = CompressionConfig.named("full")
    whole = jax.eval_shape(run(full, 128), *prompt_arrays(full, batch=16, tokens=32_768, **LLAMA))
    assert nbytes(whole) / nbytes(held) >= 28


def test_int8_holds_half_of_that():
    sizes = []
    for quantize in (None, "int8"):
        config = CompressionConfig.named("ada-snapkv", 1024, quantize=quantize)
        arrays = prompt_arrays(config, batch=1, tokens=8192, **LLAMA)
        sizes.append(nbytes(jax.eval_shape(run(config), *arrays).slots))
    assert sizes[0] / sizes[1] == pytest.approx((512 + 5) / (256 + 8 + 5), rel=1e-3)


@pytest.mark.parametrize("name", ["snapkv", "ada-snapkv", "ada-prefixkv", "h2o"])
def test_compilers_count_the_same_bytes(name):
    """A slot's key and value, 5 bytes of owner and position, and next to nothing else.

    Two rows of two layers; where a layer's size follows from scores, each may waste 15 slots.
    """
    config = CompressionConfig.named(name, 128, layout="packed")
    shape = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": jnp.float32}
    arrays = prompt_arrays(config, batch=2, tokens=512, **shape)
    compiled = jax.jit(run(config)).lower(*arrays).compile()
    runs = None if name == "ada-prefixkv" else ((0, 2 * 128), (2 * 128, 2 * 2 * 128))
    slots = 2 * in_pages(2 * 2 * 128, runs, 2, 16)[0]
    expected = slots * (2 * 64 * 4 + 5)
    assert compiled.memory_analysis().output_size_in_bytes == pytest.approx(expected, rel=0.02)


# ---------------------------------------------------------------------------- on accelerators
@pytest.mark.slow
def test_a_large_batch_needs_no_more_than_a_group_of_its_rows():
    """Of 16,384 tokens, two rows here; the pool itself is the output.

    Slow: the compiler for an H200.
    """
    if (reason := missing("h200")) is not None:
        pytest.skip(reason)
    few, many = (packing("h200", 1, rows) for rows in (4, 8))
    assert many.output_size_in_bytes > 1.9 * few.output_size_in_bytes
    assert many.temp_size_in_bytes < 1.05 * few.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_temporaries_do_not_grow_with_layers(target):
    """Slow: compilers for chips, two depths each."""
    if (reason := missing(target)) is not None:
        pytest.skip(reason)
    assert layer_growth(target, 2, 3) < 0.1 * LAYER_BYTES


def test_the_peak_is_one_layer_and_the_pool():
    if (reason := missing("h200")) is not None:
        pytest.skip(reason)
    packed, alone = (packing("h200", 2, compress=flag) for flag in (True, False))
    pool = packed.output_size_in_bytes
    allowed = 1.1 * (LAYER_BYTES + pool + alone.temp_size_in_bytes)
    assert packed.temp_size_in_bytes + pool <= allowed
