"""Load GGUF files into a `Decoder` and a tokenizer, or convert them to Hugging Face directories.

Names of tensors are llama.cpp's (github.com/ggml-org/llama.cpp, `gguf-py/gguf/constants.py` and
`conversion/`). Weights are dequantised a few rows at a time into the dtype that was asked for;
nothing stays quantised.

llama.cpp rotates neighbouring pairs of a head's components in models of the architecture "llama"
(Llama, Mistral), so the rows of their q and k are stored in that order; here they get Hugging
Face's back, in which component i is rotated with i + H/2.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int
from tqdm import tqdm

from kvjax.inputs.gguf_tokenizer import gguf_tokenizer, tokenizer_parts
from kvjax.models.checkpoints.checks import naming
from kvjax.models.checkpoints.export import check_out, new_folder, write_json, write_safetensors
from kvjax.models.checkpoints.gguf_config import FREQUENCIES, hf_config
from kvjax.models.checkpoints.gguf_file import TYPES, Gguf, Rows, TensorFile, read_gguf
from kvjax.models.checkpoints.weights import (
    Stored,
    TensorSpec,
    check_tensors,
    fill,
    tensor_specs,
    weights_dtype,
)
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

# Hugging Face's names of tensors, without the layer and the ending, -> llama.cpp's.
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load_gguf(
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Decoder:
    """Load a GGUF file's decoder; arguments as of `load_decoder`, but for the path of the file.

    Raises:
      ValueError: an architecture, a setting or a type of tensor that is not supported, by name, or
        a file or tensor that is missing, unexpected or damaged; one sentence that names the file.
      ImportError: the package gguf is not installed.
    """
    dtype = weights_dtype(dtype)
    source = read_gguf(path)
    config = _config(source)
    _check(source, config)
    return fill(
        lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)),
        gguf_specs(config), _stored(source), dtype, progress, mesh, _opener(source, config),
    )  # fmt: skip


def load_gguf_config(path: str | Path) -> ModelConfig:
    """The config of a GGUF file's decoder; errors as of `load_gguf`."""
    return _config(read_gguf(path))


def load_gguf_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a GGUF file, or None where it has none.

    Raises:
      ValueError: a kind of tokenizer that is not supported, by name, or a damaged file.
    """
    source = read_gguf(path)
    length = _config(source).max_position_embeddings
    with naming(path):
        return gguf_tokenizer(source.metadata, length)


def save_gguf_tokenizer(path: str | Path, directory: Path) -> None:
    """Write the tokenizer of a GGUF file, where it has one, and its special tokens.

    The files are `tokenizer.json`, `tokenizer_config.json` with the chat template, and
    `generation_config.json`; errors as of `load_gguf_tokenizer`.
    """
    source = read_gguf(path)
    config = _config(source)
    with naming(path):
        parts = tokenizer_parts(source.metadata, config.max_position_embeddings)
    if parts is not None:
        tokenizer, settings = parts
        tokenizer.save(str(directory / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast"}  # reads tokenizer.json as it is
        write_json(directory / "tokenizer_config.json", about | settings)
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    write_json(directory / "generation_config.json", special)


def convert_gguf(
    path: str | Path, out: str | Path, *, dtype: DTypeLike = jnp.float32, progress: bool = True
) -> Path:
    """Turn a GGUF file into a Hugging Face directory.

    It holds `config.json`, `model.safetensors`, and what `save_gguf_tokenizer` writes. It appears
    when complete; a failure leaves nothing behind. Memory: the rows of a tensor that are written at
    once.

    Args:
      path: the file, or the first of its parts.
      out: a directory that is new or empty. Missing parents are made.
      dtype: of the weights: float32, which loses nothing, bfloat16 or float16.
      progress: whether to show a bar on stderr.

    Returns:
      `out` as an absolute path.

    Raises:
      ValueError: as of `load_gguf`; `out` is a file or not empty; values beyond float16.
      ImportError: the package gguf is not installed.
    """
    dtype = weights_dtype(dtype)
    out = Path(out).resolve()
    check_out(out)
    source = read_gguf(path)
    config = _config(source)
    _check(source, config)
    shapes = {name: spec.file_shape for name, spec in tensor_specs(config).items()}
    with ExitStack() as stack, new_folder(out) as folder:
        save_gguf_tokenizer(path, folder)
        write_json(folder / "config.json", hf_config(source) | {"dtype": dtype.name})
        opened = _opener(source, config)
        paths = {one.path for one in source.tensors.values()}
        files = {one: stack.enter_context(opened(one)) for one in paths}
        bar = tqdm(total=len(shapes), desc="tensors", disable=not progress, leave=False)
        stack.enter_context(bar)

        def read(name: str) -> Rows:
            bar.update()
            return files[source.tensors[gguf_name(name)].path].get_tensor(gguf_name(name))

        with naming(path):
            write_safetensors(folder / "model.safetensors", shapes, dtype, read)
    return out


def _config(source: Gguf) -> ModelConfig:
    with naming(source.path):
        return ModelConfig.from_hf(hf_config(source))


def _stored(source: Gguf) -> dict[str, Stored]:
    return {name: Stored(one.path, one.shape, one.dtype) for name, one in source.tensors.items()}


def _check(source: Gguf, config: ModelConfig) -> None:
    """Raise ValueError where the tensors are not those of the config, or of types not read."""
    check_tensors(
        config.architecture, gguf_specs(config), source.path, _stored(source),
        (FREQUENCIES,), TYPES, "metadata",
    )  # fmt: skip


def gguf_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor that a file of this decoder must hold, by its name there."""
    return {gguf_name(name): spec for name, spec in tensor_specs(config).items()}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor, from Hugging Face's."""
    stem, ending = name.rsplit(".", 1)
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{ending}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.{ending}"


def _opener(source: Gguf, config: ModelConfig) -> Callable[[Path], TensorFile]:
    """What opens each of the source's files, with the rows of q and k in Hugging Face's order."""
    orders = {}
    if source.metadata["general.architecture"] == "llama":
        for letter, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
            order = _half_split(heads, config.head_dim)
            for layer in range(config.num_layers):
                for ending in ("weight", "bias"):
                    orders[f"blk.{layer}.attn_{letter}.{ending}"] = order
    return functools.partial(TensorFile, tensors=source.tensors, orders=orders)


def _half_split(heads: int, head_dim: int) -> Int[np.ndarray, " rows"]:
    """Where each row of Hugging Face's order stands among neighbouring pairs."""
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
