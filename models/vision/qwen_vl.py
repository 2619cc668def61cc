"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): a Qwen2 decoder with M-RoPE, and its tower.

I images, P patches and E values of each, U tokens of all images, D model dim, B prompts, T tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kvjax.models.checkpoints.checks import expect, is_int, naming, read_object
from kvjax.models.checkpoints.weights import (
    as_saved,
    check_tensors,
    fill,
    read_headers,
    weights_dtype,
)
from kvjax.models.config import ModelConfig, with_generation_config
from kvjax.models.decoder import Decoder
from kvjax.models.vision.config import QWEN, decoder_keys
from kvjax.models.vision.qwen_config import QwenVisionConfig
from kvjax.models.vision.qwen_layout import QwenPatches, lay_out, mrope_positions
from kvjax.models.vision.qwen_tower import QwenTower
from kvjax.models.vision.qwen_weights import qwen_naming, qwen_specs

# What transformers' class assumes for a missing key where Qwen2's assumes something else.
_TEXT: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_window_layers": 80,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_SECTION = [16, 24, 24]


class QwenVL(Decoder):
    """A `Decoder` with M-RoPE and Qwen2.5-VL's tower.

    Args:
      config: of the decoder, with an `mrope_section`.
      vision_config: of the tower and the merger.
      dtype: of the weights, the activations and the cache.
      rngs: for random weights.

    `image_config`, how pictures become patches, is for the caller to set (`kvjax.load` does).
    """

    def __init__(
        self,
        config: ModelConfig,
        vision_config: QwenVisionConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.vision_config = vision_config
        self.image_config: Any = None
        self.tower = QwenTower(vision_config, dtype=dtype, rngs=rngs)

    def encode_images(self, patches: QwenPatches) -> Float[Array, "U D"]:
        """Features of all images, one image after the other, in the decoder's space."""
        return self.tower(patches)

    def lay_out(
        self,
        pixels: Float[np.ndarray, "P E"],
        grids: Int[np.ndarray, "I 3"],
        total: int | None = None,
    ) -> QwenPatches:
        """What `encode_images` reads of patches; see `qwen_layout.lay_out`."""
        return lay_out(pixels, grids, self.vision_config, total)

    def rotary_positions(
        self, prompts: Sequence[Sequence[int]], width: int, grids: Int[np.ndarray, "I 3"]
    ) -> tuple[Int[np.ndarray, "B T 3"], Int[np.ndarray, " B"]]:
        """Rotary positions of prompts and the shift after them; see `mrope_positions`."""
        return mrope_positions(prompts, grids, self.vision_config, width)


def load_qwen_config(directory: str | Path) -> tuple[ModelConfig, QwenVisionConfig]:
    """The decoder and the tower of a directory in the layout of the Hugging Face hub.

    The decoder's keys lie beside `vision_config` (as published) or in `text_config` (since
    transformers 4.52). Special tokens are read as by `load_config`.

    Raises:
      ValueError: a missing or unreadable file, or a key with a value that is not supported; the
        message names the file.
    """
    folder = Path(directory)
    with naming(folder / "config.json"):
        mapping = read_object(folder / "config.json")
        flat = {key: value for key, value in mapping.items() if key != "vision_config"}
        text = decoder_keys(mapping, _TEXT, flat)
        config = _text_config(text)
        vision = QwenVisionConfig.from_hf(mapping, config.hidden_size)
        below = f"a token of the vocabulary, below {config.vocab_size}"
        known = vision.image_token_id < config.vocab_size
        expect(known, "image_token_id", below, vision.image_token_id)
    return with_generation_config(folder, config), vision


def _text_config(text: Mapping[str, Any]) -> ModelConfig:
    """The decoder, which is Qwen2's but for what the rotary embedding turns with."""
    source = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = text.get(source) or {}
    expect(isinstance(rope, Mapping), source, "an object or null", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = kind in ("default", "mrope")
    expect(known, f"{source}.rope_type", "'default' or 'mrope'", kind)
    section = rope.get("mrope_section", _SECTION)
    three = isinstance(section, list) and len(section) == 3 and all(is_int(n, 0) for n in section)
    expect(three, f"{source}.mrope_section", "a list of three integers >= 0", section)
    plain = {key: value for key, value in text.items() if key not in _ROPE}
    plain["rope_theta"] = rope.get("rope_theta", text["rope_theta"])
    config = ModelConfig.from_hf(
        plain | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    )
    return dataclasses.replace(config, mrope_section=tuple(section))


_ROPE = ("rope_scaling", "rope_parameters", "vision_config", "text_config")


def load_qwen_vl(
    directory: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> QwenVL:
    """Load a checkpoint of Qwen2.5-VL; arguments and errors as of `load_decoder`.

    Names as published (`visual...`, `model.layers...`) and those of transformers' modules since
    4.52 (`model.visual...`, `model.language_model...`) are both read.
    """
    dtype = weights_dtype(dtype)
    config, vision = load_qwen_config(directory)
    source, stored = read_headers(Path(directory))
    specs, unread = qwen_specs(config, vision, qwen_naming(stored))
    specs = as_saved(specs, stored)
    check_tensors(QWEN, specs, source, stored, unread)
    return fill(
        lambda: QwenVL(config, vision, dtype=dtype, rngs=nnx.Rngs(0)),
        specs,
        stored,
        dtype,
        progress,
        mesh,
    )
