"""The config of a vision tower, and how its images enter the decoder (LLaVA).

A missing key has the default of transformers' class. What is not implemented is an error.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.models.checkpoints.checks import (
    boolean,
    check_fields,
    expect,
    is_int,
    naming,
    positive_float,
    positive_int,
    read_object,
    token_id,
)
from kvjax.models.config import ModelConfig, with_generation_config

LLAVA = "LlavaForConditionalGeneration"
QWEN = "Qwen2_5_VLForConditionalGeneration"
_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
_CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# LLaVA's own tower, ViT-L/14 at 336 pixels, where config.json has no vision_config.
_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A CLIP tower and LLaVA's projector, validated and hashable.

    Attributes:
      hidden_size, intermediate_size, num_layers, num_heads: of the tower; heads divide the width.
      image_size: pixels of each side of the square that the tower reads.
      patch_size: pixels of each side of a patch; divides image_size.
      layer_norm_eps: added to the variance, > 0.
      hidden_act: of the tower's MLP, "quick_gelu" or "gelu".
      feature_layers: whose hidden states are the features, side by side: 0 for the embeddings, n
        for what the nth layer gives, negative ones from the end (-1 the last layer).
      keeps_class: whether the class token is a feature too, the first ("full").
      projector_act: "gelu", exact.
      projector_bias: whether the projector's two layers have biases.
      projector_size: D, the decoder's width.
      image_token_id: the token that stands for an image in a prompt.

    Raises:
      ValueError: a value outside the ranges above.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    projector_size: int
    image_token_id: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    feature_layers: tuple[int, ...] = (-2,)
    keeps_class: bool = False
    projector_act: str = "gelu"
    projector_bias: bool = True

    def __post_init__(self):
        check_fields(self)
        multiple = f"a multiple of num_heads (num_attention_heads) = {self.num_heads}"
        expect(self.hidden_size % self.num_heads == 0, "hidden_size", multiple, self.hidden_size)
        multiple = f"a multiple of patch_size = {self.patch_size}"
        expect(self.image_size % self.patch_size == 0, "image_size", multiple, self.image_size)
        known = self.hidden_act in ("quick_gelu", "gelu")
        expect(known, "hidden_act", "'quick_gelu' or 'gelu'", self.hidden_act)
        expect(self.projector_act == "gelu", "projector_hidden_act", "'gelu'", self.projector_act)
        listed = isinstance(self.feature_layers, tuple) and bool(self.feature_layers)
        last = self.num_layers
        fits = listed and all(is_int(n, -last - 1) and n <= last for n in self.feature_layers)
        expected = f"layers from {-last - 1} to {last}"
        expect(fits, "vision_feature_layer", expected, self.feature_layers)

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers that each feature has passed."""
        return tuple(n % (self.num_layers + 1) for n in self.feature_layers)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def features(self) -> int:
        """Features, and so tokens, of an image."""
        return self.patches + self.keeps_class

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], projector_size: int) -> "VisionConfig":
        """Read the dictionary of a LLaVA `config.json`.

        Args:
          mapping: its keys.
          projector_size: width of the decoder.

        Raises:
          ValueError: one sentence that names the key, its value and what was expected.
        """
        given = mapping.get("vision_config")
        expect(isinstance(given, Mapping | None), "vision_config", "an object or null", given)
        keys = _CLIP | (_LARGE if given is None else dict(given))
        kind = keys["model_type"]
        expect(kind == "clip_vision_model", "vision_config.model_type", "'clip_vision_model'", kind)
        expect(keys["num_channels"] == 3, "vision_config.num_channels", "3", keys["num_channels"])
        layer = mapping.get("vision_feature_layer", -2)
        layers = layer if isinstance(layer, list | tuple) else [layer]
        whole = all(isinstance(n, int) for n in layers)
        expect(whole, "vision_feature_layer", "an integer or a list of them", layer)
        kept = mapping.get("vision_feature_select_strategy", "default")
        known = kept in ("default", "full")
        expect(known, "vision_feature_select_strategy", "'default' or 'full'", kept)
        token = mapping.get("image_token_index", mapping.get("image_token_id", 32000))
        sizes: dict[str, Any] = {
            field: positive_int(f"vision_config.{key}", keys[key]) for field, key in _SIZES.items()
        }
        eps = positive_float("vision_config.layer_norm_eps", keys["layer_norm_eps"])
        bias = boolean("multimodal_projector_bias", mapping.get("multimodal_projector_bias", True))
        return cls(
            **sizes,
            projector_size=projector_size,
            image_token_id=token_id("image_token_index", token),
            layer_norm_eps=eps,
            hidden_act=keys["hidden_act"],
            feature_layers=tuple(layers),
            keeps_class=kept == "full",
            projector_act=mapping.get("projector_hidden_act", "gelu"),
            projector_bias=bias,
        )


def vision_architecture(directory: str | Path) -> str | None:
    """Which of `KINDS` a `config.json` is of, as far as it can be read; None for another model."""
    path = Path(directory) / "config.json"
    try:
        name = _architecture(read_object(path))
    except ValueError:
        return None
    return name if name in KINDS else None


def _architecture(mapping: Mapping[str, Any]) -> Any:
    listed = mapping.get("architectures")
    if listed is None:
        return {kind: name for name, kind in KINDS.items()}.get(str(mapping.get("model_type")))
    return listed[0] if isinstance(listed, list | tuple) and listed else None


# architecture -> model_type
KINDS = {LLAVA: "llava", QWEN: "qwen2_5_vl"}


def decoder_keys(
    mapping: Mapping[str, Any], defaults: Mapping[str, Any], beside: Mapping[str, Any]
) -> dict[str, Any]:
    """The decoder's keys of a `config.json`: its `text_config`, or those `beside` the tower's.

    Raises:
      ValueError: quantized weights, a `text_config` that is no object.
    """
    quantized = mapping.get("quantization_config")
    expect(quantized is None, "quantization_config", "absent (weights as trained)", quantized)
    text = mapping.get("text_config")
    expect(isinstance(text, Mapping | None), "text_config", "an object or null", text)
    keys = {**defaults, **(beside if text is None else text)}
    if "tie_word_embeddings" in mapping:
        keys["tie_word_embeddings"] = mapping["tie_word_embeddings"]
    return keys


def load_vision_config(directory: str | Path) -> tuple[ModelConfig, VisionConfig]:
    """The decoder and the tower of a directory in the layout of the Hugging Face hub.

    Special tokens are read as by `load_config`.

    Raises:
      ValueError: a missing or unreadable file, or a key with a value that is not supported; the
        message names the file.
    """
    folder = Path(directory)
    with naming(folder / "config.json"):
        mapping = read_object(folder / "config.json")
        text = decoder_keys(mapping, {"model_type": "llama"}, {})
        with naming("text_config"):
            config = ModelConfig.from_hf(text)
        vision = VisionConfig.from_hf(mapping, config.hidden_size)
        below = f"a token of the vocabulary, below {config.vocab_size}"
        known = vision.image_token_id < config.vocab_size
        expect(known, "image_token_index", below, vision.image_token_id)
    return with_generation_config(folder, config), vision
