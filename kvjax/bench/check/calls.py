"""Compare every public call on the device with the same call by XLA on the CPU.

A small model with random weights, a sliding window in its last layer, and sharper attention than
random weights have, so that a wrong mask or a wrong entry shows in the log-probabilities.
"""

import functools
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kvjax
from kvjax import CompressionConfig, Recompress
from kvjax.bench.check.part import Answer, Failed, agree
from kvjax.kernels.platform import assume
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

# Log-probabilities of fp32 on two machines; of bf16 beside fp32.
WITHIN = {"float32": 2e-3, "bfloat16": 0.3}
SHARPNESS = 3.0  # of random attention, whose scores are small


@dataclass(frozen=True)
class Size:
    """How long prompts and answers are.

    Attributes:
      prompts: tokens of each row.
      budget: entries a KV head.
      new: tokens of an answer.
      questions: tokens of questions to a cache.
      window: of the layer with a sliding window.
    """

    prompts: tuple[int, ...] = (512, 391)
    budget: int = 96
    new: int = 16
    questions: tuple[int, ...] = (1, 16, 128, 1000)
    window: int = 256


SMALL = Size(prompts=(64, 41), budget=16, new=6, questions=(1, 40), window=32)


def size_of(small: bool) -> Size:
    """The small size, or a device's."""
    return SMALL if small else Size()


@functools.lru_cache(maxsize=2)
def model_of(dtype: str, size: Size) -> Decoder:
    """Weights of this dtype, drawn in fp32 on the CPU, so that every machine draws the same."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "sliding_window": size.window,
        }
    )
    with jax.default_device(_cpu()):
        model = Decoder(config, rngs=nnx.Rngs(0))
        for layer in model.layers:
            for name in ("q_DX", "k_DY"):
                weight = getattr(layer.attention, name)
                weight[...] = weight[...] * SHARPNESS
        return jax.tree.map(lambda x: x.astype(dtype), model)


def _cpu() -> Any:
    return jax.local_devices(backend="cpu")[0]


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Random rows of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, length).tolist() for length in lengths]


# ---------------------------------------------------------------------------- calls
Call = Callable[[Any, Size], list[Answer]]


def generate(model, size, method: str, **settings) -> list[Answer]:
    """A method, its layout and dtype given."""
    config = _config(size, method, **settings)
    return _rows(kvjax.generate(model, prompts(size.prompts), config, **_answer(size)))


def question(model, size, tokens: int, **settings) -> list[Answer]:
    """A question of so many tokens to a compressed cache."""
    cache = kvjax.compress_prompt(model, prompts(size.prompts), _ada(size, **settings))
    asked = prompts((tokens, max(1, tokens - 3)), seed=1)
    return _rows(kvjax.generate(model, asked, cache=cache, **_answer(size)))


def many_questions(model, size) -> list[Answer]:
    """Questions of one document, whose entries they share."""
    cache = kvjax.compress_prompt(model, prompts(size.prompts[:1]), _ada(size))
    asked = prompts((9, 5, 7, 9), seed=1)
    return _rows(kvjax.generate(model, asked, cache=cache, **_answer(size)))


def stream(model, size) -> list[Answer]:
    """A stream's steps, put together."""
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in size.prompts]
    for step in kvjax.stream(model, prompts(size.prompts), _ada(size), **_answer(size)):
        for row, tokens, log_probs in zip(found, step.tokens, step.log_probs, strict=True):
            row[0].extend(tokens)
            row[1].extend(log_probs)
    return [Answer(*row) for row in found]


def score(model, size) -> list[Answer]:
    """The tail of each prompt, judged beside its compressed head."""
    rows = prompts(size.prompts)
    heads = [3 * len(row) // 4 for row in rows]
    found = kvjax.score(model, rows, heads, _ada(size))
    rests = [row[head:] for row, head in zip(rows, heads, strict=True)]
    return [Answer(rest, one.nll) for rest, one in zip(rests, found, strict=True)]


def recompress(model, size, **settings) -> list[Answer]:
    """An answer that is compressed again three times."""
    rule = Recompress(every=max(2, size.new // 4), budget=size.budget + 8, **settings)
    call = {"recompress": rule} | _answer(size)
    return _rows(kvjax.generate(model, prompts(size.prompts), _ada(size), **call))


def kvzip(model, size) -> list[Answer]:
    """Scores from a repetition of the prompt."""
    config = _config(size, "ada-kvzip", repeat=((5, 6), (7,)))
    return _rows(kvjax.generate(model, prompts(size.prompts), config, **_answer(size)))


def saved(model, size) -> list[Answer]:
    """A cache that was written and read answers as the one in memory does."""
    config, asked = _ada(size), prompts((6, 3), seed=1)
    cache = kvjax.compress_prompt(model, prompts(size.prompts), config)
    with tempfile.TemporaryDirectory() as folder:
        path = kvjax.save_cache(Path(folder) / "cache.safetensors", cache, model, config)
        read = kvjax.load_cache(path, model)
    before, after = (
        _rows(kvjax.generate(model, asked, cache=held, **_answer(size))) for held in (cache, read)
    )
    if [row.tokens for row in before] != [row.tokens for row in after]:
        raise Failed("the cache that was read answers otherwise than the one that was saved")
    return after


def second_turn(model, size) -> list[Answer]:
    """Both answers of a chat: the second question goes to the cache of the first."""
    call = _answer(size)
    first = kvjax.generate(model, prompts(size.prompts), _ada(size), return_cache=True, **call)
    # Where a near tie was drawn otherwise, the second turn would be another text.
    asked = prompts((7, 4), seed=1)
    second = kvjax.generate(model, asked, cache=first.cache, **call)
    return [*_rows(first), *_rows(second)]


def _config(size: Size, method: str, **settings) -> CompressionConfig:
    return CompressionConfig.named(method, size.budget, **settings)


def _ada(size: Size, **settings) -> CompressionConfig:
    return _config(size, "ada-snapkv", **({"layout": "packed"} | settings))


def _answer(size: Size) -> dict[str, Any]:
    return {"max_new_tokens": size.new, "eos_ids": ()}


def _rows(found: kvjax.Generation) -> list[Answer]:
    return [Answer(*row) for row in zip(found.tokens, found.log_probs, strict=True)]


def calls(size: Size) -> dict[str, Call]:
    """Every call by name."""
    named = {f"question of {n}": partial(question, tokens=n) for n in size.questions}
    longest = size.questions[-1]
    return {
        "generate full": partial(generate, method="full", layout="padded"),
        "generate ada-snapkv": partial(generate, method="ada-snapkv", layout="packed"),
        "generate snapkv padded": partial(generate, method="snapkv", layout="padded"),
        "generate h2o": partial(generate, method="h2o", layout="packed"),
        "generate prefixkv": partial(generate, method="prefixkv", layout="packed"),
        "generate int8": partial(generate, method="ada-snapkv", quantize="int8"),
        **named,
        f"question of {longest}, padded": partial(question, tokens=longest, layout="padded"),
        f"question of {longest}, int8": partial(question, tokens=longest, quantize="int8"),
        "many questions": many_questions,
        "stream": stream,
        "score": score,
        "recompress": recompress,
        "recompress key-diff": partial(recompress, scorer="key-diff", heads="uniform"),
        "recompress squared-sum": partial(recompress, scorer="squared-sum", layers="global"),
        "kvzip": kvzip,
        "saved cache": saved,
        "second turn": second_turn,
    }


# Positions alone decide what is kept, so that rounding to bf16 changes no choice.
HALF: dict[str, Call] = {
    "generate full, bf16": partial(generate, method="full", layout="padded"),
    "generate streaming-llm, bf16": partial(generate, method="streaming-llm", layout="packed"),
}


def check(name: str, small: bool = False) -> dict[str, Any]:
    """One call on the device and on the CPU.

    fp32 on both; a call of HALF with weights and cache in bf16 on the device, and the same weights
    in fp32 on the CPU.
    """
    size = size_of(small)
    dtype = "bfloat16" if name in HALF else "float32"
    call = HALF[name] if name in HALF else calls(size)[name]
    model = model_of(dtype, size)
    # Both are mostly compiled, which threads do side by side.
    with ThreadPoolExecutor(1) as beside:
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), model)
        expected = beside.submit(_on_cpu, call, exact, size)
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            found = call(jax.device_put(model, jax.devices()[0]), size)
        return agree(found, expected.result(), WITHIN[dtype])


def _on_cpu(call: Call, model: Decoder, size: Size) -> list[Answer]:
    """The call with XLA's own kernels, on the CPU."""
    with ExitStack() as inside:
        for context in (jax.default_device(_cpu()), assume("cpu")):
            inside.enter_context(context)
        inside.enter_context(jax.default_matmul_precision("highest"))
        return call(jax.device_put(model, _cpu()), size)
