"""The tensors of Qwen2.5-VL, for the loader of `weights.py`.

Axes: E values of a patch, C width of the tower, A heads side by side, Z queries, keys and values, F
MLP dim, J patches of a token side by side, D model dim.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from kvjax.models.checkpoints.weights import Stored, TensorSpec, make_specs, prefixed, tensor_specs
from kvjax.models.config import ModelConfig
from kvjax.models.vision.qwen_config import QwenVisionConfig

# As in `weights.py`: tensor in the file, attribute, axes in the file, flag.
_PATCH = ("patch_embed.proj.weight", "patch_EC", "CE", "")
_LAYER = (
    ("norm1.weight", "attention_norm.scale_C", "C", ""),
    ("attn.qkv.weight", "qkv_CZ", "ZC", ""),
    ("attn.qkv.bias", "qkv_bias_Z", "Z", ""),
    ("attn.proj.weight", "o_AC", "CA", ""),
    ("attn.proj.bias", "o_bias_C", "C", ""),
    ("norm2.weight", "mlp_norm.scale_C", "C", ""),
    ("mlp.gate_proj.weight", "gate_CF", "FC", ""),
    ("mlp.gate_proj.bias", "gate_bias_F", "F", ""),
    ("mlp.up_proj.weight", "up_CF", "FC", ""),
    ("mlp.up_proj.bias", "up_bias_F", "F", ""),
    ("mlp.down_proj.weight", "down_FC", "CF", ""),
    ("mlp.down_proj.bias", "down_bias_C", "C", ""),
)
_MERGER = (
    ("merger.ln_q.weight", "merger.norm.scale_C", "C", ""),
    ("merger.mlp.0.weight", "merger.up_JF", "FJ", ""),
    ("merger.mlp.0.bias", "merger.up_bias_F", "F", ""),
    ("merger.mlp.2.weight", "merger.down_FD", "DF", ""),
    ("merger.mlp.2.bias", "merger.down_bias_D", "D", ""),
)


class QwenNaming(NamedTuple):
    """What the names of a checkpoint's parts begin with; the head is `lm_head` in both."""

    text: str
    tower: str


# As published, and as transformers names its modules since 4.52.
PUBLISHED = QwenNaming("model.", "visual.")
NESTED = QwenNaming("model.language_model.", "model.visual.")


def qwen_naming(stored: Mapping[str, Stored]) -> QwenNaming:
    """The naming that a checkpoint follows."""
    return NESTED if f"{NESTED.tower}{_PATCH[0]}" in stored else PUBLISHED


def tower_specs(vision: QwenVisionConfig, name: str, attribute: str) -> dict[str, TensorSpec]:
    """Every tensor of the tower, whose names begin with `name`, by its name in the file."""
    width = vision.hidden_size
    sizes = {
        "E": vision.patch_values,
        "C": width,
        "A": width,
        "Z": 3 * width,
        "F": vision.intermediate_size,
    }
    rows = prefixed([_PATCH], name, attribute)
    for layer in range(vision.num_layers):
        rows += prefixed(_LAYER, f"{name}blocks.{layer}.", f"{attribute}layers.{layer}.")
    specs = make_specs(rows, sizes, {})
    kernel, side = f"{name}{_PATCH[0]}", vision.patch_size
    shape = (width, 3, vision.temporal_patch_size, side, side)
    specs[kernel] = dataclasses.replace(specs[kernel], file_shape=shape)
    merged = width * vision.merged
    sizes = {"C": width, "J": merged, "F": merged, "D": vision.projector_size}
    return specs | make_specs(prefixed(_MERGER, name, attribute), sizes, {})


def qwen_specs(
    config: ModelConfig, vision: QwenVisionConfig, naming: QwenNaming
) -> tuple[dict[str, TensorSpec], list[str]]:
    """Every tensor that a checkpoint must hold by its name, and what else it may hold."""
    specs = tensor_specs(config, naming.text) | tower_specs(vision, naming.tower, "tower.")
    return specs, ["lm_head.weight"] if config.tie_word_embeddings else []
