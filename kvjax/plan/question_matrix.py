"""Compile questions to a compressed cache for every target, without having one.

A few layers of a Llama-3-8B's attention, its other sizes shrunk: what is looked at is the memory
that attention needs on the way, which must not hold scores over a whole layer.
"""

import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.compile_for import TPUS, compile_for
from kvjax.config import CompressionConfig
from kvjax.generation import prefill
from kvjax.generation.programs import ask_program
from kvjax.inputs.prompts import bucket
from kvjax.kernels.platform import assume
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 8, 128  # Llama-3-8B's, but for the layers
PROMPT, NEW = 32_768, 128
SLOT_BYTES = 4 * HEAD_DIM  # a key and a value in bf16
# Of the matrix: the question's tokens, budgets (None: the padded full cache), rows.
TOKENS, BUDGETS, ROWS = (16, 128, 1000), (1024, 8192, None), (1, 16)


def small_model(layers: int = LAYERS, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Decoder:
    """A decoder of a few layers in bf16, as shapes: wide in attention and nowhere else."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 2 * PROMPT,
        }
    )
    return nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))


def cache_of(model: Decoder, config: CompressionConfig, rows: int, prompt: int = PROMPT) -> Any:
    """The shapes of such prompts' cache; packed where it is compressed."""
    if config.compresses:
        config = dataclasses.replace(config, layout="packed")
    array = jax.ShapeDtypeStruct

    def compress(model, tokens, lengths):
        key = jax.random.key(0)
        return prefill.prefill_compress(model, tokens, lengths, key, config)[1]

    # Shapes are the same wherever; kernels of another platform would want its chips.
    with assume("cpu"):
        return jax.eval_shape(
            compress, model, array((rows, prompt), jnp.int32), array((rows,), jnp.int32)
        )


def asking(
    target: str, tokens: int, budget: int | None, rows: int, layers: int = LAYERS
) -> dict[str, Any]:
    """A question of so many tokens to a cache of that budget, compiled: seconds and bytes."""
    model = small_model(layers)
    name = "full" if budget is None else "snapkv"
    cache = cache_of(model, CompressionConfig.named(name, budget), rows)
    slots = bucket(tokens)
    question = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    began = time.perf_counter()
    run = partial(ask_program, tail_slots=slots + NEW)
    compiled = compile_for(target, run, model, cache, question, lengths)
    text = compiled.as_text()
    call = "tpu_custom_call" if target in TPUS else "triton_kernel_call"
    return {
        "target": target,
        "tokens": tokens,
        "budget": budget,
        "rows": rows,
        "seconds": time.perf_counter() - began,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "result": "compiled" if call in text or budget is None else "no kernel",
    }


def layer_bytes(budget: int | None) -> int:
    """Bytes of one row's slots in one layer."""
    return SLOT_BYTES * KV_HEADS * (PROMPT if budget is None else budget)


def table(rows: list[dict[str, Any]], targets: list[str]) -> str:
    """Megabytes of temporaries."""
    lines = ["| tokens | budget | rows | " + " | ".join(targets) + " |"]
    lines.append("|---" * (len(targets) + 3) + "|")
    cells = {(r["tokens"], r["budget"], r["rows"], r["target"]): r["temporaries"] for r in rows}
    for tokens in TOKENS:
        for budget in BUDGETS:
            for batch in ROWS:
                sizes = [f"{cells[tokens, budget, batch, t] / 1e6:.1f}" for t in targets]
                kept = "full" if budget is None else f"{budget:,}"
                lines.append(f"| {tokens:,} | {kept} | {batch} | " + " | ".join(sizes) + " |")
    return "\n".join(lines) + "\n"
