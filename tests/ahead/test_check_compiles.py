"""`make gpu-check`: its programs, compiled for chips that are not here."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.bench import decode, generate, scores
from kvjax.bench.check import calls, kernels, oracle, speed
from kvjax.bench.check.listed import parts
from kvjax.bench.timing import Timing
from kvjax.compile_for import TPUS, compile_for, missing
from kvjax.generation.programs import Program
from kvjax.models.presets import preset


class Recorder:
    """Notes programs with the shapes and the precision that they are called with."""

    def __init__(self):
        self.programs: dict[tuple, tuple] = {}

    def note(self, name: str, function, *arrays):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        leaves = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(shapes))
        key = name, repr(getattr(function, "keywords", None)), leaves
        precision = jax.config.jax_default_matmul_precision
        self.programs.setdefault(key, (name, function, shapes, precision))

    def compiled(self, target: str) -> list[tuple[str, str]]:
        """Name and text of each program, compiled for the target."""
        found = []
        for name, function, shapes, precision in self.programs.values():
            with jax.default_matmul_precision(precision):
                found.append((name, compile_for(target, function, *shapes).as_text()))
        return found


@pytest.fixture
def recorder():
    return Recorder()


def targeted(target: str) -> str:
    if (reason := missing(target)) is not None:
        pytest.skip(reason)
    return "tpu" if target in TPUS else "gpu"


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_kernel_parts_compile(target, recorder, monkeypatch):
    """Every program of the kernels' parts at a device's sizes.

    A minute or two of compilers for chips.
    """
    platform = targeted(target)
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    # Only shapes are needed: nothing is computed here.
    monkeypatch.setattr(kernels, "_note", lambda *_: None)
    for name in ("paged_attention", "prefill_attention", "window_scores"):
        monkeypatch.setattr(oracle, name, lambda *a, **k: (np.zeros(()), np.zeros(())))
    monkeypatch.setattr(kernels, "_log_sums", lambda arrays, _: np.zeros(
        (2, kernels.HEADS, arrays["q"].shape[1])))  # fmt: skip
    own = set(kernels.ATTENTION.values()) | set(kernels.PREFILL.values())

    def record(function, *arrays):
        implementation = function.keywords["implementation"]
        if implementation != "xla":
            recorder.note(str(implementation), function, *arrays)

    monkeypatch.setattr(kernels, "run", record)
    for one in parts(platform, small=False):
        if one.name.startswith("kernel") and one.name != "kernel at load":
            one.run()
    jax.eval_shape(lambda: kernels.loaded() and None)
    assert len(recorder.programs) > 30
    assert {name for name, *_ in recorder.programs} <= own
    called = "tpu_custom_call" if platform == "tpu" else "triton|cudnn"
    for name, text in recorder.compiled(target):
        assert any(call in text for call in called.split("|")), name


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_speed_parts_compile(target, recorder, monkeypatch):
    """Every program that is timed, at the load of a chip of that size; nothing is run.

    Of the model's layers, which are alike, there are two. Compilers for chips, at full sizes.
    """
    targeted(target)
    load = speed.LOADS[100e9] if target == "h200" else speed.LOADS[12e9]

    def record(function, *arrays, repeats=5, per=1):
        recorder.note(getattr(function, "__name__", "program"), function, *arrays)
        return Timing(1.0, 1.0, repeats), function(*arrays)

    for module in (decode, generate, scores):
        monkeypatch.setattr(module, "timed", record)
    monkeypatch.setattr(speed, "rates", lambda: {"copy": 1.0, "read": 1.0})
    two = {"num_layers": 2, "sliding_windows": ()}
    monkeypatch.setattr(speed, "preset", lambda *named: dataclasses.replace(preset(*named), **two))
    half = partial(lambda: jnp.bfloat16)
    for place in ("kvjax.models.presets.default_dtype", "kvjax.bench.check.speed.default_dtype"):
        monkeypatch.setattr(place, half)

    def everything():
        for method in ("ada-snapkv/packed", "ada-snapkv/packed/int8", "full"):
            speed.decode_at(load, method)
        speed.score_at(load)
        for method in speed.METHODS:
            speed.whole_at(load, method)

    try:
        jax.eval_shape(everything)
    finally:
        speed.model_of.cache_clear()
    kernel = "tpu_custom_call" if target in TPUS else "triton"
    texts = recorder.compiled(target)
    assert len(texts) > 10
    assert sum(kernel in text for _, text in texts) >= len(texts) // 2


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_public_calls_compile(target, recorder, monkeypatch):
    """Every program of every public call: called on this CPU, small, and compiled for the chip."""
    targeted(target)
    call = Program.__call__

    def record(self, *arrays, **named):
        recorder.note(self._jitted.__name__, partial(self._jitted.__wrapped__, **named), *arrays)
        return call(self, *arrays, **named)

    monkeypatch.setattr(Program, "__call__", record)
    size = calls.SMALL
    for dtype, named in (("float32", calls.calls(size)), ("bfloat16", calls.HALF)):
        model = calls.model_of(dtype, size)
        precision = "highest" if dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            for one in named.values():
                one(model, size)
    kernel = "tpu_custom_call" if target in TPUS else "triton"
    texts = recorder.compiled(target)
    assert len(texts) > 20
    assert {name for name, text in texts if kernel in text} >= {
        "generate_program", "answer_program", "decode_program"
    }  # fmt: skip
