"""Questions of several blocks to a compressed cache: one loop over blocks of one size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import CompressionConfig
from kvjax.cache.state import with_room
from kvjax.generation import prefill
from kvjax.inputs.prompts import bucket


@pytest.fixture(scope="module")
def cache(model):
    config = dataclasses.replace(CompressionConfig.named("ada-snapkv", 8), layout="packed")
    tokens, lengths = jnp.arange(48).reshape(2, 24) + 3, jnp.array([24, 17])
    run = jax.jit(prefill.prefill_compress, static_argnums=4)
    return run(model, tokens, lengths, jax.random.key(0), config)[1]


def asked(model, cache, tokens, lengths):
    """`extend_prompt`, traced anew: another size of blocks is another program."""
    run = jax.jit(lambda *call: prefill.extend_prompt(*call))
    return run(model, tokens, lengths, with_room(cache, tokens.shape[1]))


def test_blocks_of_a_question_are_the_question(model, cache, monkeypatch):
    """Rows of 1, 2, 3 blocks' tokens: logits of the last real one, and all of the tail."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 80, (2, 24)), jnp.int32)
    for lengths in ([24, 5], [8, 9]):
        monkeypatch.setattr(prefill, "BLOCK", 128)
        logits, whole = asked(model, cache, tokens, jnp.array(lengths))
        monkeypatch.setattr(prefill, "BLOCK", 8)
        again, parts = asked(model, cache, tokens, jnp.array(lengths))
        np.testing.assert_allclose(again, logits, atol=2e-5)
        np.testing.assert_array_equal(parts.tail.positions, whole.tail.positions)
        np.testing.assert_array_equal(parts.next_positions, whole.next_positions)
        assert int(parts.tail.cursor) == int(whole.tail.cursor) == 24
        real = np.asarray(whole.tail.positions) >= 0
        for mine, other in zip(parts.tail.keys, whole.tail.keys, strict=True):
            mine, other = (np.asarray(x).swapaxes(1, 2)[real] for x in (mine, other))
            np.testing.assert_allclose(mine, other, atol=2e-5)


def test_a_long_question_is_no_larger_program(model, cache):
    """2,048 tokens are traced as 128 are, but for the loop: compiling takes as long as well."""

    def size(tokens):
        question = jnp.zeros((2, tokens), jnp.int32), jnp.full(2, tokens, jnp.int32)
        lowered = jax.jit(prefill.extend_prompt).lower(model, *question, with_room(cache, tokens))
        return len(lowered.as_text().splitlines())

    assert size(2048) < 1.5 * size(128)


def test_every_bucket_has_a_large_block():
    for tokens in range(1, 5000):
        width = bucket(tokens)
        block = prefill._question_block(width)
        assert width % block == 0
        assert block <= prefill.BLOCK
        assert block == width or block > prefill.BLOCK // 2
