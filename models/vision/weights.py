"""Load a Hugging Face checkpoint of a vision-language model, by the loader of `weights.py`.

Axes: C width of the tower, P its positions, E values of a patch, F MLP dim, X heads side by side,
D model dim.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from kvjax.models.checkpoints.weights import (
    Stored,
    TensorSpec,
    as_saved,
    check_tensors,
    fill,
    make_specs,
    prefixed,
    read_headers,
    tensor_specs,
    weights_dtype,
)
from kvjax.models.config import ModelConfig
from kvjax.models.vision.config import LLAVA, VisionConfig, load_vision_config
from kvjax.models.vision.llava import Llava

# As in `weights.py`: tensor in the file, attribute, axes in the file, flag.
_TOWER = (
    ("embeddings.class_embedding", "class_C", "C", ""),
    ("embeddings.patch_embedding.weight", "patch_EC", "CE", ""),
    ("embeddings.position_embedding.weight", "positions_PC", "PC", ""),
    ("pre_layrnorm.weight", "first_norm.scale_C", "C", ""),
    ("pre_layrnorm.bias", "first_norm.bias_C", "C", ""),
)
_LAYER = (
    ("layer_norm1.weight", "attention_norm.scale_C", "C", ""),
    ("layer_norm1.bias", "attention_norm.bias_C", "C", ""),
    ("self_attn.q_proj.weight", "q_CX", "XC", ""),
    ("self_attn.q_proj.bias", "q_bias_X", "X", ""),
    ("self_attn.k_proj.weight", "k_CX", "XC", ""),
    ("self_attn.k_proj.bias", "k_bias_X", "X", ""),
    ("self_attn.v_proj.weight", "v_CX", "XC", ""),
    ("self_attn.v_proj.bias", "v_bias_X", "X", ""),
    ("self_attn.out_proj.weight", "o_XC", "CX", ""),
    ("self_attn.out_proj.bias", "o_bias_C", "C", ""),
    ("layer_norm2.weight", "mlp_norm.scale_C", "C", ""),
    ("layer_norm2.bias", "mlp_norm.bias_C", "C", ""),
    ("mlp.fc1.weight", "up_CF", "FC", ""),
    ("mlp.fc1.bias", "up_bias_F", "F", ""),
    ("mlp.fc2.weight", "down_FC", "CF", ""),
    ("mlp.fc2.bias", "down_bias_C", "C", ""),
)
_PROJECTOR = (
    ("linear_1.weight", "projector.up_CF", "FC", ""),
    ("linear_1.bias", "projector.up_bias_F", "F", "bias"),
    ("linear_2.weight", "projector.down_FD", "DF", ""),
    ("linear_2.bias", "projector.down_bias_D", "D", "bias"),
)


class Naming(NamedTuple):
    """What the names of a checkpoint's parts begin with."""

    text: str
    head: str
    tower: str
    projector: str


_OLD = Naming(
    "language_model.model.",
    "language_model.lm_head.",
    "vision_tower.vision_model.",
    "multi_modal_projector.",
)
_NEW = Naming(
    "model.language_model.",
    "lm_head.",
    "model.vision_tower.vision_model.",
    "model.multi_modal_projector.",
)
# transformers before 4.52 and since; since 5 its towers have no `vision_model` of their own.
NAMINGS = (
    _NEW,
    _OLD,
    _NEW._replace(tower="model.vision_tower."),
    _OLD._replace(tower="vision_tower."),
)


def llava_specs(
    config: ModelConfig, vision: VisionConfig, naming: Naming
) -> tuple[dict[str, TensorSpec], list[str]]:
    """Every tensor that a LLaVA checkpoint must hold by its name, and what else it may hold."""
    specs = tensor_specs(config, naming.text, naming.head)
    sizes = {
        "C": vision.hidden_size,
        "X": vision.hidden_size,
        "E": 3 * vision.patch_size**2,
        "P": vision.patches + 1,
        "F": vision.intermediate_size,
    }
    rows = prefixed(_TOWER, naming.tower, "tower.")
    depth = max(vision.depths)
    for layer in range(depth):
        rows += prefixed(_LAYER, f"{naming.tower}encoder.layers.{layer}.", f"tower.layers.{layer}.")
    specs |= make_specs(rows, sizes, {})
    kernel = f"{naming.tower}embeddings.patch_embedding.weight"
    patch = (vision.hidden_size, 3, vision.patch_size, vision.patch_size)
    specs[kernel] = dataclasses.replace(specs[kernel], file_shape=patch)
    width = vision.hidden_size * len(vision.feature_layers)
    sizes = {"C": width, "F": vision.projector_size, "D": vision.projector_size}
    rows = prefixed(_PROJECTOR, naming.projector, "")
    specs |= make_specs(rows, sizes, {"bias": vision.projector_bias})
    above = range(depth, vision.num_layers)
    unread = [f"{naming.tower}encoder.layers.{layer}." for layer in above]
    unread += [f"{naming.tower}post_layernorm.", f"{naming.tower}embeddings.position_ids"]
    if config.tie_word_embeddings:
        unread.append(f"{naming.head}weight")
    return specs, unread


def _naming(stored: Mapping[str, Stored], namings: Sequence[Naming]) -> Naming:
    """The naming whose embeddings the files hold; what is missing is told in the first one's."""

    def held(naming: Naming) -> int:
        tower = f"{naming.tower}embeddings.patch_embedding.weight" in stored
        return tower + (f"{naming.text}embed_tokens.weight" in stored)

    return max(namings, key=held)


def load_vision_decoder(
    directory: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Llava:
    """Load a checkpoint of LLaVA; arguments and errors as of `load_decoder`.

    Names of transformers before 4.52 (`language_model.model...`) and since
    (`model.language_model...`) are both read. Layers of the tower above those that features are
    taken from are not.
    """
    dtype = weights_dtype(dtype)
    config, vision = load_vision_config(directory)
    source, stored = read_headers(Path(directory))
    naming = _naming(stored, NAMINGS)
    specs, unread = llava_specs(config, vision, naming)
    specs = as_saved(specs, stored, naming.head)
    check_tensors(LLAVA, specs, source, stored, unread)
    return fill(
        lambda: Llava(config, vision, dtype=dtype, rngs=nnx.Rngs(0)),
        specs,
        stored,
        dtype,
        progress,
        mesh,
    )
