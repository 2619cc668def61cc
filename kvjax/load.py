"""load(): a Hugging Face directory as a model and its tokenizer."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from kvjax.models.checkpoint import is_orbax, load_orbax
from kvjax.models.decoder import Decoder
from kvjax.models.weights import load_decoder
from kvjax.tokenizer import load_tokenizer


def load(
    directory: str | Path,
    *,
    dtype: Any = jnp.float32,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> tuple[Decoder, Any]:
    """The decoder and the tokenizer of a checkpoint.

    Args:
      directory: `config.json`, safetensors (one file or shards with an index), tokenizer files; or
        what `kvjax.models.checkpoint.save_orbax` wrote, with tokenizer files.
      dtype: of weights, activations and cache: jnp.float32, jnp.bfloat16 or jnp.float16.
      progress: whether to show a bar on stderr.
      mesh: from `kvjax.sharding.make_mesh`: weights go straight to the devices that hold a part of
        them, and whatever runs the model runs on the mesh. JAX's default device without one.

    Returns:
      The model, and None in place of a tokenizer where the directory has none.

    Raises:
      ValueError: what is missing, extra, misshapen, truncated or unknown, by name.
    """
    if is_orbax(directory):
        return load_orbax(directory, mesh, dtype=dtype), load_tokenizer(directory)
    model = load_decoder(directory, dtype=dtype, progress=progress, mesh=mesh)
    return model, load_tokenizer(directory)
