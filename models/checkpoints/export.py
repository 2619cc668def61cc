"""Write a `Decoder` as a Hugging Face directory: `kvjax.models.checkpoints.weights` in reverse."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from kvjax.models.checkpoints.weights import check_reads_text, parameter_at, tensor_specs
from kvjax.models.decoder import Decoder


def save_decoder(
    model: Decoder, directory: str | Path, config: Mapping[str, Any], *, dtype: Any = jnp.bfloat16
) -> Path:
    """Write `config.json` and `model.safetensors`.

    Args:
      model: the decoder.
      directory: is made where it does not exist; files of these names are replaced.
      config: the `config.json` that `ModelConfig.from_hf` made the model's config from.
      dtype: of the weights on disk: bfloat16, float16 or float32.

    Returns:
      The path of the weights.

    Raises:
      ValueError: a vision-language model.
    """
    check_reads_text(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, spec in tensor_specs(model.config).items():
        array = np.asarray(parameter_at(model, spec.attribute)[...]).astype(jnp.dtype(dtype))
        tensors[name] = np.ascontiguousarray(array.T if spec.transposed else array)
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    return path
