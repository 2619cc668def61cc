"""JAX_ENABLE_X64=1: everything runs, in 32 bits as without it, and compiles nothing anew."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CompressionConfig, Recompress
from kvjax.calibrate import calibrate
from kvjax.generation.programs import Program
from kvjax.models.checkpoints.weights import load_decoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
ROWS = np.random.default_rng(0).integers(3, 80, (2, 16)).tolist()
CALL = {"max_new_tokens": 3, "eos_ids": ()}
SNAP = CompressionConfig.named("snapkv", 8)


def told(out):
    return out.tokens, out.log_probs, out.kept.tolist()


def ask(model, *_):
    """A document, a question and a further one; the cache is a stream's and a program's."""
    cache = kvjax.compress_prompt(model, ROWS[0], SNAP)
    out = kvjax.generate(model, [5, 6], cache=cache, return_cache=True, **CALL)
    steps = list(kvjax.stream(model, [7], cache=out.cache, **CALL))
    return out.tokens, steps, [np.asarray(x).tolist() for x in jax.tree.leaves(out.cache)]


def answer(method, budget=8, **settings):
    config = CompressionConfig.named(method, budget, **settings)
    return lambda model, **call: told(kvjax.generate(model, ROWS, config, **(CALL | call)))


def sampled(model):
    rules = kvjax.Sampling(
        temperature=1.5, top_k=40, top_p=0.9, min_p=0.001, repetition_penalty=1.2
    )
    return told(kvjax.generate(model, ROWS, SNAP, sampling=rules, seed=3, **CALL))


RUN = {
    "int8": answer("ada-snapkv", quantize="int8"),
    "ask": ask,
    "score": lambda model: kvjax.score(model, ROWS, 8, SNAP, positions=True),
}
LOWERED = {
    "kvzip": answer("kvzip", repeat=((5,), (6,))),
    "prefixkv": answer("prefixkv", 0.5),
    "recompress": lambda model: answer("snapkv")(model, recompress=Recompress(every=2, budget=10)),
    "sampled": sampled,
    "calibrate": lambda model: calibrate(model, ROWS, CompressionConfig.named("prefixkv", 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_programs_are_the_same_ones(model, name):
    """A program is compiled without the flag; with it that one runs again, on a model loaded so.

    Slow: 12 s: a question and a further one, asked of a program and of a stream, as users do most.
    """
    expected, before = RUN[name](model), kvjax.compilations()
    with jax.enable_x64(True):
        found = RUN[name](load_decoder(FIXTURES / "llama2-gqa", progress=False))
        assert jnp.arange(2).dtype == jnp.int64  # the flag is the caller's again
    assert str(found) == str(expected)
    assert kvjax.compilations() == before


class LoweredError(Exception):
    """Instead of running: the program's text."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LOWERED)
def test_programs_have_the_same_text(model, name, monkeypatch):
    """Slow: every call is traced twice; these would take long to compile."""

    def lower(program, *arrays, **named):
        raise LoweredError(Program.lower(program, *arrays, **named).as_text())

    monkeypatch.setattr(Program, "__call__", lower)
    texts = []
    for flag in (False, True):
        with jax.enable_x64(flag), pytest.raises(LoweredError) as caught:
            LOWERED[name](model)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert "xf64>" not in texts[0]


def test_inside_of_a_callers_program():
    """One's own model: compressed, appended to and attended in a program with the flag."""

    def run(lengths):
        shape = (2, 16, 2, 8)
        keys = jnp.arange(512, dtype=jnp.float32).reshape(shape) / 512
        probe = kvjax.Probe(queries=jnp.ones((2, 4, 4, 8), jnp.float32))
        cache = kvjax.compress(
            [keys], [keys], [probe], CompressionConfig.named("ada-snapkv", 8), lengths=lengths,
            tail_slots=4,
        )  # fmt: skip
        cache = kvjax.append(kvjax.claim(cache, 1), 0, keys[:, :1], keys[:, :1])
        q = jnp.ones((2, 1, 4, 8), jnp.float32)
        return kvjax.decode_attention(q, cache), kvjax.claimed_positions(cache, 1), cache.counts

    expected = jax.jit(run)(jnp.array([16, 12]))
    with jax.enable_x64(True):
        found = jax.jit(run)(jnp.array([16, 12]))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_every_method_can_be_traced(model):
    """Shapes alone, as compiling would take minutes; what runs is tested above."""
    with jax.enable_x64(True):
        for method in kvjax.METHODS:
            config = CompressionConfig.named(method, None if method == "full" else 8)
            cache = jax.eval_shape(lambda c=config: kvjax.compress(*entries(c), c))
            wide = {x.dtype.name for x in jax.tree.leaves(cache) if "64" in x.dtype.name}
            assert not wide, method


def entries(config):
    from synthetic import probe_of

    probe = jax.tree.map(jnp.asarray, probe_of(0, 1, 16, 4, 2, 8, 16))
    keys = jnp.ones((1, 16, 2, 8), jnp.float32)
    return [keys] * 2, [keys] * 2, [probe] * 2
