"""Speed of the whole path: prefill, compression and the decode step, as ratios.

    python -m kvjax.bench [--methods snapkv,ada-snapkv/padded] [--budget 256] [-o FILE.json]

A decode step reads every weight and every held entry once, so it is bound by memory: beside each
measured step stands (weights + held bytes) / (bandwidth measured in the same run by summing an
array of the weights' size). Prefill is bound by arithmetic; compression should vanish beside it.
The model is a random Llama of about 100M parameters (12 layers, D 768, 12 heads, 4 KV heads,
F 2048, V 32000, tied), prompt 2048, 64 new tokens. Each number is the best of several runs, with
compilation outside. About five minutes on two cores. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax import stages
from kvjax.cache import Cache, ProbeRequest, with_room
from kvjax.config import CompressionConfig
from kvjax.kernels.prefill_attention import prefill_attention
from kvjax.kernels.window_scores import accumulated_scores
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.sampling import Sampling

PROMPT, NEW = 2048, 64


def config_100m() -> ModelConfig:
    """The benchmark's model."""
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        }
    )


def best(function: Callable, *arrays: Any, runs: int = 3) -> tuple[float, Any]:
    """Least seconds of several runs of a function compiled beforehand, and its result."""
    compiled = jax.jit(function).lower(*arrays).compile()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        out = jax.block_until_ready(compiled(*arrays))
        seconds.append(time.perf_counter() - began)
    return min(seconds), out


def bandwidth(nbytes: int) -> float:
    """Bytes a second at which memory is read."""
    array = jnp.ones((nbytes // 4 // 1024, 1024), jnp.float32)
    seconds, _ = best(lambda x: x @ jnp.ones((1024,), jnp.float32), array, runs=5)
    return array.nbytes / seconds


def decode_step(model: Decoder, cache: Cache, logits: jax.Array) -> float:
    """Seconds of one decode step, the mean over NEW - 1 of them in one loop."""
    batch = logits.shape[0]
    rules = stages.Rules(
        values=Sampling().values, eos=jnp.array([-1]), switches=Sampling().switches
    )
    tokens, lengths = jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch,), jnp.int32)
    answer = stages.start_answer(logits, tokens, lengths, jax.random.key(0), rules, NEW)
    run = partial(stages.decode, steps=NEW - 1)
    seconds, _ = best(run, model, with_room(cache, NEW), answer, rules)
    return seconds / (NEW - 1)


def scoring(batch: int, config: ModelConfig) -> tuple[float, float]:
    """Seconds of all layers' prefill attention, and of their accumulated scores."""
    keys = jax.random.split(jax.random.key(0), 3)
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    q_BTNH, k_BTKH, v_BTKH = (
        jax.random.normal(key, (batch, PROMPT, heads, h))
        for key, heads in zip(keys, (n, k, k), strict=True)
    )
    lengths = jnp.full((batch,), PROMPT, jnp.int32)
    attention, (_, lse_BNT) = best(prefill_attention, q_BTNH, k_BTKH, v_BTKH, lengths)
    sums, _ = best(accumulated_scores, q_BTNH, k_BTKH, lse_BNT, lengths)
    return attention * config.num_layers, sums * config.num_layers


def measure(model: Decoder, batch: int, methods: list[str], budget: int, rate: float) -> dict:
    """Everything for one batch size; seconds and bytes."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, PROMPT))
    tokens, lengths = jnp.asarray(tokens, jnp.int32), jnp.full((batch,), PROMPT, jnp.int32)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))

    def read(model, tokens, lengths):
        return stages.prefill(model, tokens, lengths, ProbeRequest())

    prefill, (logits, *_) = best(read, model, tokens, lengths)
    attention, sums = scoring(batch, model.config)
    result: dict[str, Any] = {
        "batch": batch,
        "prefill": prefill,
        "prefill_attention": attention,
        "accumulated_scores": sums,
        "methods": {},
    }
    for name in ["full", *methods]:
        method, _, layout = name.partition("/")
        config = CompressionConfig.named(method, budget=budget, layout=layout or None)
        # The two in turn, so that both see the same machine.
        run = partial(stages.prefill_compress, config=config)
        again, _ = best(read, model, tokens, lengths, runs=2)
        whole, (_, cache) = best(run, model, tokens, lengths, jax.random.key(0))
        step = decode_step(model, cache, logits)
        result["methods"][name] = {
            "prefill": again,
            "prefill_and_compress": whole,
            "decode_step": step,
            "cache_bytes": cache.nbytes,
            "limit": (weights + cache.nbytes) / rate,
        }
        print(f"batch {batch} {name}: {step * 1e3:.1f} ms a step", file=sys.stderr)
    return result


def table(results: list[dict]) -> str:
    """The ratios as Markdown."""
    lines = [
        "| batch | method | prefill + compress / prefill | decode step, ms | / full | limit, ms |"
        " cache, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        full = result["methods"]["full"]["decode_step"]
        for name, row in result["methods"].items():
            overhead = row["prefill_and_compress"] / row["prefill"]
            lines.append(
                f"| {result['batch']} | {name} | {overhead:.3f} | {row['decode_step'] * 1e3:.1f}"
                f" | {row['decode_step'] / full:.2f} | {row['limit'] * 1e3:.1f}"
                f" | {row['cache_bytes'] / 1e6:.1f} |"
            )
    lines.append("")
    for result in results:
        share = result["accumulated_scores"] / result["prefill_attention"]
        lines.append(
            f"Batch {result['batch']}: prefill {result['prefill']:.2f} s, of which attention"
            f" {result['prefill_attention']:.2f} s; accumulated scores take {share:.0%} of that."
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default="snapkv,ada-snapkv,h2o,prefixkv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--batch", default="1,4", help="batch sizes, comma-separated")
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    model = Decoder(config_100m(), rngs=nnx.Rngs(0))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    rate = bandwidth(weights)
    methods = arguments.methods.split(",")
    results = [
        measure(model, int(batch), methods, arguments.budget, rate)
        for batch in arguments.batch.split(",")
    ]
    report = {
        "parameters": weights // 4,
        "bandwidth_GB_s": rate / 1e9,
        "backend": jax.default_backend(),
        "budget": arguments.budget,
        "results": results,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{weights / 4e6:.0f}M parameters, memory read at {rate / 1e9:.1f} GB/s\n")
    print(table(results))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
