"""The config of a decoder: sizes, rotary embedding, sliding windows, switches between families.

`from_hf` reads a Hugging Face `config.json`, in the spelling of older files (`rope_theta`,
`rope_scaling`) and of transformers 5 (`rope_parameters`). A missing key has the default of that
family's class in transformers. What is not implemented is an error, never an approximation.
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
    optional_token_id,
    positive_float,
    positive_int,
    read_object,
    token_id,
    token_ids,
)
from kvjax.models.generation_config import Stated, read_generation_config
from kvjax.models.rope_scaling import DEFAULT_THETA, DynamicNtk, LongRope, Scaling, read_rope

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_LLAMA: dict[str, Any] = _DEFAULTS | {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL: dict[str, Any] = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN: dict[str, Any] = _DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# architecture -> (model_type, what transformers' configuration class assumes for a missing key)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", _LLAMA),
    "MistralForCausalLM": ("mistral", _MISTRAL),
    "Qwen2ForCausalLM": ("qwen2", _QWEN),
    "Qwen3ForCausalLM": ("qwen3", _QWEN | {"head_dim": 128}),
}
_WIDTHS = ("vocab_size", "hidden_size", "intermediate_size")
# Every published config.json states these; a nested `text_config` may leave them to its class.
_STATED = (*_WIDTHS, "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder, validated and hashable (usable as a static argument of `jax.jit`).

    Attributes:
      architecture: one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM.
      vocab_size, hidden_size, intermediate_size, num_layers: V, D, F, L.
      num_heads, num_kv_heads, head_dim: N, K, H; N is a multiple of K and H is even.
      rms_norm_eps: added to the mean square, > 0.
      rope_theta: base of the rotary frequencies, > 0.
      rope_scaling: None for plain rotary embeddings.
      mrope_section: None, or of M-RoPE (Qwen2-VL, Wang et al. 2024, section 2.1): how many of the
        H / 2 rotated pairs turn with a token's time, how many with its row, how many with its
        column. Text has one position for all three.
      max_position_embeddings: tokens the model was trained for, with its scaling: what a file
        states, or the length before scaling times the factor where the file states that length
        (`rope_scaling.read_rope`).
      sliding_windows: one entry a layer: None, or w: a query at p sees keys p-w+1 .. p. The empty
        tuple stands for None in every layer.
      qkv_bias, o_bias, mlp_bias: which projections have biases.
      qk_norm: RMS norm of every query and key head before the rotary embedding (Qwen3).
      tie_word_embeddings: the output head is the embedding table.
      hidden_act: "silu", the only one implemented.
      bos_token_id: None if the model has none.
      eos_token_ids: generation stops at any of them; may be empty.
      max_context: the user's own limit in place of `max_position_embeddings`, or None. It changes
        nothing that is computed, so configs that differ in it alone are equal.
      stated_sampling: what the checkpoint's `generation_config.json` says of how tokens are drawn,
        pairs of a name and a value; `kvjax.generation.suggestion.chosen` reads it. Not compared
        either.
      context: follows from these: tokens of a prompt and its answer at most.
      rope_by_length: follows: whether rotary frequencies depend on how long a text is
        (`Cache.rope_length`).
      attention_factor: follows: what the rotary embedding multiplies queries and keys by, beside
        turning them.

    Raises:
      ValueError: a value outside the ranges above.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = DEFAULT_THETA
    rope_scaling: Scaling | None = None
    mrope_section: tuple[int, int, int] | None = None
    max_position_embeddings: int = 2048
    sliding_windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    # Neither is shown: a cache's origin goes by what is (`kvjax.cache.origin`).
    max_context: int | None = dataclasses.field(default=None, repr=False, compare=False)
    stated_sampling: Stated = dataclasses.field(default=(), repr=False, compare=False)
    context: int = dataclasses.field(init=False, repr=False, compare=False)
    rope_by_length: bool = dataclasses.field(init=False, repr=False, compare=False)
    attention_factor: float = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        known = self.architecture in tuple(_FAMILIES)
        expect(known, "architecture", f"one of {', '.join(_FAMILIES)}", self.architecture)
        check_fields(self)
        multiple = f"a multiple of num_kv_heads (num_key_value_heads) = {self.num_kv_heads}"
        divides = self.num_heads % self.num_kv_heads == 0
        expect(divides, "num_heads (num_attention_heads)", multiple, self.num_heads)
        expect(self.head_dim % 2 == 0, "head_dim", "even", self.head_dim)
        expect(self.hidden_act == "silu", "hidden_act", "'silu'", self.hidden_act)
        self._check_scaling()
        if self.mrope_section is not None:
            pairs = self.head_dim // 2
            listed = isinstance(self.mrope_section, tuple) and len(self.mrope_section) == 3
            fits = listed and all(is_int(n, 0) for n in self.mrope_section)
            fits = fits and sum(self.mrope_section) == pairs
            expected = f"three integers >= 0 that sum up to head_dim / 2 = {pairs}"
            expect(fits, "mrope_section", expected, self.mrope_section)
        optional_token_id("bos_token_id", self.bos_token_id)
        for name in ("eos_token_ids", "sliding_windows"):
            value = getattr(self, name)
            expect(isinstance(value, tuple), name, "a tuple", value)
        for token in self.eos_token_ids:
            token_id("eos_token_ids", token)
        windows = self.sliding_windows or (None,) * self.num_layers
        per_layer = f"one entry for each of the {self.num_layers} layers"
        expect(len(windows) == self.num_layers, "sliding_windows", per_layer, windows)
        for window in windows:
            if window is not None:
                positive_int("sliding_windows", window)
        object.__setattr__(self, "sliding_windows", windows)
        if self.max_context is not None:
            positive_int("max_context", self.max_context)
        scaling = self.rope_scaling
        derived = {
            "context": self.max_context or self.max_position_embeddings,
            "rope_by_length": scaling is not None and scaling.by_length,
            "attention_factor": 1.0 if scaling is None else scaling.attention_factor,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check_scaling(self):
        scaling, pairs = self.rope_scaling, self.head_dim // 2
        known = isinstance(scaling, Scaling | None)
        expect(known, "rope_scaling", "a scaling of kvjax.models.rope_scaling or None", scaling)
        if isinstance(scaling, LongRope):
            expected = f"a list of head_dim / 2 = {pairs} numbers"
            fits = len(scaling.short_factor) == pairs
            expect(fits, "short_factor", expected, scaling.short_factor)
        if isinstance(scaling, DynamicNtk):
            expect(pairs > 1, "head_dim", "more than 2 (rope_type is 'dynamic')", self.head_dim)

    @property
    def group_size(self) -> int:
        """G = N / K, query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> "ModelConfig":
        """Read the dictionary of a Hugging Face `config.json`.

        Args:
          mapping: its keys; the family is `architectures[0]`, or follows from `model_type` where
            that key is missing or null.

        Raises:
          ValueError: one sentence that names the key, its value and what was expected.
        """
        architecture = _architecture(mapping)
        keys = _FAMILIES[architecture][1] | dict(mapping)
        quantized = keys.get("quantization_config")
        expect(quantized is None, "quantization_config", "absent (weights as trained)", quantized)
        family = _FAMILIES[architecture][0]
        attention_bias = boolean("attention_bias", keys.get("attention_bias", False))
        o_bias = family in ("llama", "qwen3") and attention_bias
        rope_theta, rope_scaling, context = read_rope(keys)
        expect(keys["hidden_act"] == "silu", "hidden_act", "'silu'", keys["hidden_act"])
        sizes: dict[str, Any] = {name: positive_int(name, keys[name]) for name in _WIDTHS}
        return cls(
            architecture=architecture,
            **sizes,
            max_position_embeddings=context,
            **_head_sizes(keys),
            num_layers=positive_int("num_hidden_layers", keys["num_hidden_layers"]),
            rms_norm_eps=positive_float("rms_norm_eps", keys["rms_norm_eps"]),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_windows=_sliding_windows(family, keys),
            qkv_bias=family == "qwen2" or o_bias,
            o_bias=o_bias,
            mlp_bias=family == "llama" and boolean("mlp_bias", keys.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            tie_word_embeddings=boolean("tie_word_embeddings", keys["tie_word_embeddings"]),
            bos_token_id=optional_token_id("bos_token_id", keys.get("bos_token_id")),
            eos_token_ids=token_ids("eos_token_id", keys.get("eos_token_id")),
        )


def _architecture(mapping: Mapping[str, Any]) -> str:
    model_type, listed = mapping.get("model_type"), mapping.get("architectures")
    name: Any = listed[0] if isinstance(listed, list | tuple) and listed else None
    by_type = {kind: name for name, (kind, _) in _FAMILIES.items()}
    if listed is None:
        expected = f"one of {', '.join(by_type)} (as architectures is missing)"
        expect(model_type in tuple(by_type), "model_type", expected, model_type)
        return by_type[str(model_type)]
    known = f"a list of one of {', '.join(_FAMILIES)}"
    expect(name in tuple(_FAMILIES), "architectures", known, listed)
    # transformers goes by model_type, others by architectures: a disagreement has two readings.
    same = model_type in (None, _FAMILIES[name][0])
    expect(same, "model_type", f"{_FAMILIES[name][0]!r} (architectures is {listed})", model_type)
    return name


def _head_sizes(keys: Mapping[str, Any]) -> dict[str, Any]:
    num_heads = positive_int("num_attention_heads", keys["num_attention_heads"])
    num_kv_heads, head_dim = keys.get("num_key_value_heads"), keys.get("head_dim")
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if head_dim is None:
        hidden = positive_int("hidden_size", keys["hidden_size"])
        expected = f"a multiple of num_attention_heads = {num_heads} (head_dim is not given)"
        expect(hidden % num_heads == 0, "hidden_size", expected, hidden)
        head_dim = hidden // num_heads
    positive_int("num_key_value_heads", num_kv_heads)
    positive_int("head_dim", head_dim)
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def _sliding_windows(family: str, keys: Mapping[str, Any]) -> tuple[int | None, ...]:
    num_layers = positive_int("num_hidden_layers", keys["num_hidden_layers"])
    if family == "llama":
        return (None,) * num_layers
    window, layer_types, first = keys.get("sliding_window"), keys.get("layer_types"), 0
    if family != "mistral":
        first = keys["max_window_layers"]
        expect(is_int(first, 0), "max_window_layers", "an integer >= 0", first)
        if not boolean("use_sliding_window", keys["use_sliding_window"]):
            window = None
    if window is not None:
        positive_int("sliding_window", window)
    if layer_types is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    listed = isinstance(layer_types, list | tuple) and len(layer_types) == num_layers
    expect(listed, "layer_types", f"a list of {num_layers} names, one a layer", layer_types)
    for kind in layer_types:
        known = kind in ("full_attention", "sliding_attention")
        expect(known, "layer_types", "'full_attention' or 'sliding_attention'", kind)
    if "sliding_attention" in layer_types:
        enabled = "a positive integer, and enabled, as layer_types has 'sliding_attention'"
        expect(window is not None, "sliding_window", enabled, keys.get("sliding_window"))
    if family == "mistral" and window is not None:
        # transformers' Mistral ignores layer_types, so a full layer would have two readings.
        same = "full_attention" not in layer_types
        expect(same, "layer_types", "'sliding_attention' in every layer (Mistral)", layer_types)
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def load_config(directory: str | Path) -> ModelConfig:
    """Read `config.json`, and `generation_config.json` where there is one.

    As in transformers' `generate`, `bos_token_id` and `eos_token_id` of `generation_config.json`
    take precedence where they are not null: chat models list there every id that ends an answer.
    What it says of sampling is kept for those who ask for it (`ModelConfig.stated_sampling`).

    Args:
      directory: a folder in the layout of the Hugging Face hub.

    Raises:
      ValueError: a missing or unreadable file, or a key that `ModelConfig.from_hf` rejects; the
        message names the file.
    """
    folder = Path(directory)
    expect(folder.is_dir(), "directory", "an existing folder with a config.json", str(folder))
    path = folder / "config.json"
    with naming(path):
        mapping = read_object(path)
        _architecture(mapping)  # of all that may be wrong with a file, the first to tell
        for key in _STATED:
            if key not in mapping:
                raise ValueError(f"{key} is missing, expected a positive integer")
        config = ModelConfig.from_hf(mapping)
    return with_generation_config(folder, config)


def with_generation_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """The config with what `generation_config.json` states, where there is one."""
    stated = read_generation_config(folder)
    return dataclasses.replace(config, **stated) if stated else config
