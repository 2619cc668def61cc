"""load(): a directory, a GGUF file, or a name on the hub, as a model and its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from kvjax.inputs.image_processor import ClipImages, ImageConfig, QwenImages, load_image_config
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.models.checkpoints.checks import positive_int
from kvjax.models.checkpoints.gguf import load_gguf, load_gguf_config, load_gguf_tokenizer
from kvjax.models.checkpoints.gguf_file import is_gguf
from kvjax.models.checkpoints.hub import local_folder
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
    revision: str | None = None,
    dtype: Any = jnp.float32,
    progress: bool = True,
    mesh: Mesh | None = None,
    max_context: int | None = None,
) -> tuple[Decoder, Any]:
    """The decoder and the tokenizer of a checkpoint.

    Args:
      directory: `config.json`, safetensors (one file or shards with an index), tokenizer files,
        and the image processor's settings where the model sees (LLaVA-1.5,
        Qwen2.5-VL); or what
        `kvjax.models.checkpoints.orbax.save_orbax` wrote, with tokenizer files; or a GGUF file
        (extra `gguf`), whose weights are dequantised. A name on the Hugging Face hub, "org/name",
        where no such path exists: what is needed of it is fetched into huggingface_hub's cache
        (`kvjax.models.checkpoints.hub`).
      revision: branch, tag or commit on the hub; its main branch by default.
      dtype: of weights, activations and cache: jnp.float32, jnp.bfloat16 or jnp.float16.
      progress: whether to show a bar on stderr.
      mesh: from `kvjax.sharding.make_mesh`: weights go straight to the devices that hold a part of
        them, and whatever runs the model runs on the mesh. JAX's default device without one.
      max_context: most tokens of a prompt with its answer, in place of what the checkpoint was
        trained for; it moves a limit and changes no number that is computed.

    Returns:
      The model, and None in place of a tokenizer where there is none.

    Raises:
      ValueError: what is missing, extra, misshapen, truncated or unknown, by name; a name or a
        revision that the hub does not have, or a hub that cannot be reached; a max_context below 1.
      ImportError: a GGUF file, and the package gguf is not installed.
    """
    if max_context is not None:
        positive_int("max_context", max_context)
    folder = local_folder(directory, revision, progress=progress)
    load_text = load_gguf_tokenizer if is_gguf(folder) else load_tokenizer
    tokenizer = load_text(folder)  # first: its errors come within a second
    model = load_model(folder, dtype=dtype, progress=progress, mesh=mesh, max_context=max_context)
    return model, tokenizer


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
    revision: str | None = None,
    dtype: Any = jnp.float32,
    progress: bool = True,
    mesh: Mesh | None = None,
    max_context: int | None = None,
) -> Decoder:
    """`load` without a tokenizer, which takes seconds to import."""
    directory = local_folder(directory, revision, progress=progress)
    model = _load(directory, dtype, progress, mesh)
    if max_context is not None:
        model.config = dataclasses.replace(model.config, max_context=max_context)
    return model


def _load(directory: str | Path, dtype: Any, progress: bool, mesh: Mesh | None) -> Decoder:
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
