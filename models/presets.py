"""Models for measurements: known shapes with random weights, or a checkpoint's."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.models.checkpoints.gguf_file import is_gguf
from kvjax.models.checkpoints.hub import local_folder
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.models.load import load_model, load_model_config

_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
# name: L, D, F, N, K, V, tied
PRESETS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "1m": (4, 128, 256, 8, 4, 384, True),
    "100m": (12, 768, 2048, 12, 4, 32_000, True),
    "llama-3-1b": (16, 2048, 8192, 32, 8, 128_256, True),
    "llama-3-8b": (32, 4096, 14_336, 32, 8, 128_256, False),
    "llama-3-70b": (80, 8192, 28_672, 64, 8, 128_256, False),
    "llava-1.5-7b": (32, 4096, 11_008, 32, 32, 32_064, False),
}


def preset(name: str, context: int) -> ModelConfig:
    """A Llama of the preset's shape.

    Raises:
      ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(
            f"--model {name}, expected one of {', '.join(PRESETS)}, a checkpoint's directory, a"
            " GGUF file, or org/name on the hub"
        )
    shape = dict(zip(_KEYS, PRESETS[name], strict=True))
    extra = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": context}
    return ModelConfig.from_hf(shape | extra)


def model_config(name: str, context: int) -> ModelConfig:
    """A preset's for this context, or that of a checkpoint: a directory, a GGUF file, org/name.

    Raises:
      ValueError: none of them, or a checkpoint that is not read.
    """
    folder = _checkpoint(name)
    return preset(name, context) if folder is None else load_model_config(folder)


def model_of(name: str, config: ModelConfig) -> Decoder:
    """A checkpoint's weights, or random ones of this config, in the default dtype."""
    folder = _checkpoint(name)
    if folder is None:
        return random_model(config)
    return load_model(folder, dtype=default_dtype(), progress=False)


def _checkpoint(name: str) -> Path | None:
    """Where a checkpoint lies, fetched from the hub if need be; None for what is not one's name."""
    if name in PRESETS:
        return None
    folder = local_folder(name, progress=False)
    return folder if folder.is_dir() or is_gguf(folder) else None


def default_dtype() -> Any:
    """What benchmarks compute in: fp32 on a CPU, bf16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def random_model(config: ModelConfig) -> Decoder:
    """Random weights of the default dtype, drawn on the device."""
    return nnx.jit(lambda: Decoder(config, dtype=default_dtype(), rngs=nnx.Rngs(0)))()
