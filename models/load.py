"""load(): a Hugging Face directory, or a GGUF file, as a model and its tokenizer."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from kvjax.inputs.image_processor import ClipImages, ImageConfig, QwenImages, load_image_config
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.models.checkpoints.gguf import load_gguf, load_gguf_config, load_gguf_tokenizer
from kvjax.models.checkpoints.gguf_file import is_gguf
from kvjax.models.checkpoints.orbax import is_orbax, load_orbax, load_orbax_config
from kvjax.models.checkpoints.weights import load_decoder
from kvjax.models.config import ModelConfig, load_config
from kvjax.models.decoder import Decoder
from kvjax.models.vision.config import QWEN, load_vision_config, vision_architecture
from kvjax.models.vision.llava import Llava
from kvjax.models.vision.qwen_vl import QwenVL, load_qwen_config, load_qwen_vl
from kvjax.models.vision.weights import load_vision_decoder


def load(
    directory: str | Path,
    *,
    dtype: Any = jnp.float32,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> tuple[Decoder, Any]:
    """The decoder and the tokenizer of a checkpoint.

    Args:
      directory: `config.json`, safetensors (one file or shards with an index), tokenizer files,
        and the image processor's settings where the model sees (LLaVA-1.5,
        Qwen2.5-VL); or what
        `kvjax.models.checkpoints.orbax.save_orbax` wrote, with tokenizer files; or a GGUF file
        (extra `gguf`), whose weights are dequantised.
      dtype: of weights, activations and cache: jnp.float32, jnp.bfloat16 or jnp.float16.
      progress: whether to show a bar on stderr.
      mesh: from `kvjax.sharding.make_mesh`: weights go straight to the devices that hold a part of
        them, and whatever runs the model runs on the mesh. JAX's default device without one.

    Returns:
      The model, and None in place of a tokenizer where there is none.

    Raises:
      ValueError: what is missing, extra, misshapen, truncated or unknown, by name.
      ImportError: a GGUF file, and the package gguf is not installed.
    """
    if is_gguf(directory):
        tokenizer = load_gguf_tokenizer(directory)  # first: its errors come within a second
        return load_model(directory, dtype=dtype, progress=progress, mesh=mesh), tokenizer
    model = load_model(directory, dtype=dtype, progress=progress, mesh=mesh)
    return model, load_tokenizer(directory)


def load_model_config(directory: str | Path) -> ModelConfig:
    """The decoder's config of a checkpoint that `load` reads, without its weights.

    Raises:
      ValueError: what is missing or unknown, by name.
    """
    if is_gguf(directory):
        return load_gguf_config(directory)
    if is_orbax(directory):
        return load_orbax_config(directory)
    architecture = vision_architecture(directory)
    if architecture is None:
        return load_config(directory)
    return (load_qwen_config if architecture == QWEN else load_vision_config)(directory)[0]


def load_model(
    directory: str | Path,
    *,
    dtype: Any = jnp.float32,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Decoder:
    """`load` without a tokenizer, which takes seconds to import."""
    if is_gguf(directory):
        return load_gguf(directory, dtype=dtype, progress=progress, mesh=mesh)
    if is_orbax(directory):
        return load_orbax(directory, mesh, dtype=dtype)
    architecture = vision_architecture(directory)
    if architecture is None:
        return load_decoder(directory, dtype=dtype, progress=progress, mesh=mesh)
    kind: type[ImageConfig] = QwenImages if architecture == QWEN else ClipImages
    image_config = load_image_config(directory, kind)
    load_seeing = load_qwen_vl if architecture == QWEN else load_vision_decoder
    model: Llava | QwenVL = load_seeing(directory, dtype=dtype, progress=progress, mesh=mesh)
    model.image_config = image_config
    return model
