"""The table of a server's pages is as wide as room is made while answers are compressed again."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kvjax import CompressionConfig, Recompress
from kvjax.compression.recompress import make_room
from kvjax.compression.room import widest_layer
from kvjax.generation.prefill import prefill_compress
from kvjax.models.decoder import Decoder

TOKENS = 64


def room_made(model, config, rule):
    """Slots of a row's pool, and of its widest layer, in whole pages."""
    windows, heads = model.config.sliding_windows, model.config.num_heads

    def run(model, tokens, lengths):
        key = jax.random.key(0)
        cache = prefill_compress(model, tokens, lengths, key, config)[1]
        return make_room(cache, rule, heads, windows, asked=False)[0].slots

    array = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    slots = jax.eval_shape(run, model, array((1, TOKENS)), array((1,)))
    return slots.page, slots.table.shape[2]


@pytest.mark.parametrize("windows", [False, True], ids=["alike", "windows"])
@pytest.mark.parametrize("method", ["full", "snapkv", "ada-snapkv", "pyramidkv", "joint-snapkv"])
def test_a_table_is_as_wide_as_room_is_made(model, method, windows):
    """One layer of several may hold most of a row, or each its equal part."""
    config = CompressionConfig.named("full")
    if method != "full":
        config = CompressionConfig.named(method, 24, layout="packed")
    layers, kv_heads = model.config.num_layers, model.config.num_kv_heads
    shape = model.config
    if windows:
        shape = dataclasses.replace(shape, sliding_windows=(40, *shape.sliding_windows[1:]))
    model = nnx.eval_shape(lambda: Decoder(shape, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    rule = Recompress(every=8, budget=TOKENS if method == "full" else 32)
    widest = widest_layer(config, TOKENS, rule, model.config.sliding_windows, kv_heads)
    page, width = room_made(model, config, rule)
    assert -(-widest // page) == width
    if method in ("snapkv", "ada-snapkv") and not windows:  # else a table is as wide as a row
        assert widest == kv_heads * 32 < layers * kv_heads * 32
