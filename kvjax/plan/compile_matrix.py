"""Compile kernels at every named shape, and questions, for every target, without having one.

    python -m kvjax.plan.compile_matrix [-o docs/compile_matrix.md]

The temporaries stand beside the pool or the keys, so that a hidden copy would show. Some twenty
minutes on two cores; the last line on stdout is one JSON object.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from kvjax.cache.slots import page_size
from kvjax.compile_for import TARGETS, TPUS, compile_for, devices, missing
from kvjax.config import CompressionConfig
from kvjax.generation import decode, prefill
from kvjax.generation.programs import generate_program
from kvjax.kernels import decode_attention, window_scores
from kvjax.kernels.platform import assume
from kvjax.kernels.shapes import SHAPES, Shape
from kvjax.model_interface import ProbeRequest
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.presets import preset
from kvjax.plan import question_matrix

KERNELS = (
    "slot_attention",
    "paged_attention",
    "scored_attention",
    "window_scores",
    "accumulated_scores",
)
LAYERS = 4  # of the pool that attention reads one layer of
WINDOW = 32
WHOLE = Shape("llama-3-8b", 32, 8, 128, 1, 32_768, 1024)
NEW = 128
# One layer's keys and values in bf16, of the prompt that `packing` prefills: 33.6 MB.
PROMPT, KV_HEADS, HEAD_DIM = 8192, 8, 128
LAYER_BYTES = 2 * PROMPT * KV_HEADS * HEAD_DIM * 2
_GROWTH_TITLE = f"""
# Prefill and packing, 4 against 12 layers

What the temporaries grow by with a layer, whose own keys and values are {LAYER_BYTES / 1e6:.1f} MB.

"""
_QUESTIONS_TITLE = f"""
# Questions to a cache

Megabytes that a question needs on the way: {question_matrix.LAYERS} layers of a Llama-3-8B's
attention (its other sizes shrunk), a prompt of {question_matrix.PROMPT:,} tokens compressed to a
budget of entries a head (packed), or whole (padded). A row's slots in one layer take
{question_matrix.layer_bytes(1024) / 1e6:.1f} MB at a budget of 1,024,
{question_matrix.layer_bytes(8192) / 1e6:.1f} at 8,192 and
{question_matrix.layer_bytes(None) / 1e6:.1f} in full.

"""
_WHOLE_TITLE = f"""
# A whole Llama-3-8B `generate`

A prompt of {WHOLE.tokens:,} tokens a chip, budget {WHOLE.budget}, {NEW} new tokens, bf16. Prefill,
compression and the decode loop are one program; gigabytes of each chip.

"""
LONGEST = 32_768  # accumulated scores beyond this only repeat the same tiles


def problem(kernel: str, shape: Shape, target: str) -> tuple[Callable, list, int] | None:
    """The function, its argument shapes, and the bytes it mainly reads; None if not supported."""
    array = jax.ShapeDtypeStruct
    b, n, k, h = shape.batch, shape.heads, shape.kv_heads, shape.head_dim
    dtype, wide = jnp.dtype(shape.dtype), jnp.int32
    on_tpu = target in TPUS
    if kernel.endswith("_attention"):
        return _decoding(kernel, shape, on_tpu)
    tokens = min(shape.tokens, LONGEST) if kernel == "accumulated_scores" else shape.tokens
    queries = tokens if kernel == "accumulated_scores" else WINDOW
    module = window_scores.tpu if on_tpu else window_scores.gpu
    if not module.supports((b, queries, n, h), k, tokens):
        return None
    arrays = [array((b, queries, n, h), dtype), array((b, tokens, k, h), dtype)]
    if kernel == "accumulated_scores":
        arrays.append(array((b, n, tokens), jnp.float32))
    else:
        arrays.insert(1, array((b, queries), wide))
    arrays.append(array((b,), wide))
    return getattr(module, kernel), arrays, b * tokens * k * h * dtype.itemsize


def _decoding(kernel: str, shape: Shape, on_tpu: bool) -> tuple[Callable, list, int] | None:
    """One layer's slots: consecutive ones, or in pages anywhere in the pool, with their scores."""
    array, dtype, wide = jax.ShapeDtypeStruct, jnp.dtype(shape.dtype), jnp.int32
    b, n, k, h = shape.batch, shape.heads, shape.kv_heads, shape.head_dim
    module = decode_attention.tpu if on_tpu else decode_attention.gpu
    with assume("tpu" if on_tpu else "gpu"):
        page = page_size()
    slots = -(-LAYERS * shape.slots // page) * page
    table = array((b, -(-shape.slots // page)), wide)
    pages = (table, page) if kernel != "slot_attention" else None
    scores = kernel == "scored_attention"
    if not module.supports((b, 1, n, h), dtype, pages):
        return None
    arrays = [array((b, 1, n, h), dtype), array((b, 1), wide), array((b, slots, 2 * h), dtype)]
    arrays += [array((b, slots), jnp.int8), array((b, slots), wide)]
    arrays += [array((b,), wide)] * 2

    def attend(*call):
        *call, table = call
        through = (table, page) if pages else None
        return module.slot_attention(*call, kv_heads=k, pages=through, scores=scores)

    return attend, [*arrays, table], b * slots * 2 * h * dtype.itemsize


def compile_one(kernel: str, shape: Shape, target: str) -> dict[str, Any]:
    """Seconds, temporaries, and whether the kernel is in the program."""
    row: dict[str, Any] = {"kernel": kernel, "shape": shape.name, "target": target}
    found = problem(kernel, shape, target)
    if found is None:
        return row | {"result": "XLA"}
    function, arrays, read = found
    began = time.perf_counter()
    compiled = compile_for(target, function, *arrays)
    text = compiled.as_text()
    call = "tpu_custom_call" if target in TPUS else "triton"
    return row | {
        "result": "compiled" if call in text else "no kernel",
        "seconds": time.perf_counter() - began,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "reads": read,
    }


def packing(target: str, layers: int, rows: int = 1, *, compress: bool = True) -> Any:
    """Memory of a narrow model's prefill, alone or with packing into 512 entries a head."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": KV_HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 2 * PROMPT,
        }
    )
    compression = CompressionConfig.named("snapkv", 512)

    def run(model, tokens, lengths):
        if not compress:
            return prefill.prefill(model, tokens, lengths, ProbeRequest()).logits
        return prefill.prefill_compress(model, tokens, lengths, jax.random.key(0), compression)

    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((rows, PROMPT), jnp.int32)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return compile_for(target, run, model, tokens, lengths).memory_analysis()


def layer_growth(target: str, few: int, many: int) -> float:
    """Bytes that the temporaries of prefill and packing grow by with each further layer."""
    sizes = [packing(target, layers).temp_size_in_bytes for layers in (few, many)]
    return (sizes[1] - sizes[0]) / (many - few)


def growth_table(rows: list[dict[str, Any]]) -> str:
    """Megabytes a layer, of each target."""
    lines = ["| target | MB a layer |", "|---|---|"]
    lines += [f"| {row['target']} | {row['growth'] / 1e6:.2f} |" for row in rows]
    return "\n".join(lines) + "\n"


def whole_generate(target: str, topology: str | None, method: str) -> dict[str, Any]:
    """The whole program of a Llama-3-8B: prefill, compress, decode; gigabytes a chip."""
    config = preset("llama-3-8b", WHOLE.tokens + NEW)
    compression = CompressionConfig.named(method, WHOLE.budget)
    rules = decode.greedy_rules()

    def run(model, tokens, lengths):
        call = (model, tokens, lengths, jax.random.key(0), rules)
        sizes = {"new_tokens": NEW, "tail_slots": NEW, "whole": False}
        return generate_program(*call, config=compression, **sizes)[0].tokens

    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    rows = len(devices(target, topology)) if topology else 1
    prompt = jax.ShapeDtypeStruct((rows, WHOLE.tokens), jnp.int32)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    began = time.perf_counter()
    compiled = compile_for(target, run, model, prompt, lengths, topology=topology)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    names = {"tpu_custom_call": "Pallas", "cudnn": "cuDNN", "triton": "Triton"}
    return {
        "target": topology or target,
        "method": method,
        "rows": rows,
        "seconds": time.perf_counter() - began,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "kernels": sorted(name for call, name in names.items() if call in text),
    }


def whole_table(rows: list[dict[str, Any]]) -> str:
    """Gigabytes of each chip."""
    lines = [
        "| target | rows | method | weights, GB | temporaries, GB | kernels |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        sizes = f"{row['arguments'] / 1e9:.2f} | {row['temporaries'] / 1e9:.2f}"
        kernels = ", ".join(row["kernels"])
        lines.append(f"| {row['target']} | {row['rows']} | {row['method']} | {sizes} | {kernels} |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]], targets: list[str]) -> str:
    """Temporaries as a share of what is read, by kernel and shape."""
    lines = ["| kernel | shape | " + " | ".join(targets) + " |", "|---" * (len(targets) + 2) + "|"]
    for kernel in KERNELS:
        for shape in SHAPES:
            cells = []
            for target in targets:
                row = next(
                    r for r in rows
                    if (r["kernel"], r["shape"], r["target"]) == (kernel, shape.name, target)
                )  # fmt: skip
                known = row["result"] == "compiled"
                cells.append(f"{row['temporaries'] / row['reads']:.1%}" if known else row["result"])
            lines.append(f"| {kernel} | {shape.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    for target in arguments.targets:
        if (reason := missing(target)) is not None:
            print(f"kvjax: target {target} {reason}", file=sys.stderr)
            return 2
    cells = [(k, s, t) for t in arguments.targets for k in KERNELS for s in SHAPES]
    rows = [compile_one(*cell) for cell in tqdm(cells, desc="compile", disable=None)]
    programs = [
        whole_generate(target, topology, method)
        for target, topology in (("v6e", "v6e:2x4"), ("h200", None))
        for method in ("full", "ada-snapkv")
        if target in arguments.targets
    ]
    growth = [
        {"target": target, "growth": layer_growth(target, 4, 12)}
        for target in ("v5e", "h200")
        if target in arguments.targets
    ]
    questions = [
        question_matrix.asking(target, tokens, budget, batch)
        for target, tokens, budget, batch in tqdm(
            list(
                itertools.product(
                    arguments.targets,
                    question_matrix.TOKENS,
                    question_matrix.BUDGETS,
                    question_matrix.ROWS,
                )
            ),
            desc="questions",
            disable=None,
        )
    ]
    text = table(rows, arguments.targets)
    text += _QUESTIONS_TITLE + question_matrix.table(questions, arguments.targets)
    if growth:
        text += _GROWTH_TITLE + growth_table(growth)
    if programs:
        text += _WHOLE_TITLE + whole_table(programs)
    if arguments.output:
        header = (
            "# Kernels compiled ahead of time\n\nWritten by `make compile-matrix`. A cell is the"
            " program's temporaries as a share of the slots or keys that it reads. *XLA*: the"
            " kernel does not take the shape, the reference stands in. Nothing here has run.\n\n"
        )
        arguments.output.write_text(header + text)
    print(text)
    print(json.dumps(rows + questions + growth + programs))
    return int(any(row["result"] == "no kernel" for row in rows + questions))


if __name__ == "__main__":
    sys.exit(main())
