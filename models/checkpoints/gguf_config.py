"""The config of a GGUF file's model, from its metadata: what would be its `config.json`.

Names and meaning of metadata are llama.cpp's (github.com/ggml-org/llama.cpp,
`gguf-py/gguf/constants.py`, `conversion/` and `src/llama-model.cpp`). What is not implemented is an
error, never an approximation: so is a setting whose meaning is not known here.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from kvjax.inputs.gguf_tokenizer import special_tokens
from kvjax.models.checkpoints.checks import boolean, expect, positive_float, positive_int
from kvjax.models.checkpoints.gguf_file import Gguf, TensorFile

# llama.cpp's architecture -> Hugging Face's; "llama" with a sliding window is Mistral.
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
FREQUENCIES = "rope_freqs.weight"
# What a file may say of its architecture: what is read here, and what changes nothing.
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "attention.causal", "expert_count", "expert_used_count", "tensor_data_layout",
}  # fmt: skip
# What may be a list of values, one for each layer; they have to agree.
_BY_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
# Llama 3's own numbers, which all of its published models share; the factor differs.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTH = 8192


def hf_config(source: Gguf) -> dict[str, Any]:
    """The `config.json` of a file's model, in the spelling that all versions of transformers read.

    Raises:
      ValueError: an architecture or a setting that is not supported, by name.
    """
    metadata = source.metadata
    kind = metadata.get("general.type", "model")
    expect(isinstance(kind, str) and kind == "model", "general.type", "'model'", kind)
    family = metadata.get("general.architecture", "")
    known = isinstance(family, str) and family in _ARCHITECTURES
    expect(known, "general.architecture", f"one of {', '.join(_ARCHITECTURES)}", family)
    prefix = f"{family}."
    keys = {name[len(prefix) :]: one for name, one in metadata.items() if name.startswith(prefix)}
    for name in sorted(keys.keys() - _READ):
        raise ValueError(f"{prefix}{name} is {keys[name]!r}, expected no such setting")
    for name, value in keys.items():
        one = name in _BY_LAYER or isinstance(value, bool | int | float | str)
        expect(one, f"{prefix}{name}", "one value", value)
    for name, only in (("expert_count", 0), ("expert_used_count", 0), ("attention.causal", True)):
        found = keys.get(name, only)
        expect(found == only, f"{prefix}{name}", repr(only), found)
    architecture, model_type = _ARCHITECTURES[family]
    bos, ends = special_tokens(metadata)
    config: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": ends}
    sizes = _sizes(source, prefix, keys)
    config |= sizes | _rope(source, prefix, keys, sizes["head_dim"] // 2)
    config |= _biases(source, family)
    window = keys.get("attention.sliding_window", 0)
    if window:
        name = f"{prefix}attention.sliding_window"
        # Qwen's windows are of some layers, and the file does not say which.
        expect(family == "llama", name, "absent", window)
        architecture, model_type = "MistralForCausalLM", "mistral"
        config["sliding_window"] = positive_int(name, window)
    about = {"architectures": [architecture], "model_type": model_type, "hidden_act": "silu"}
    return about | config


def _sizes(source: Gguf, prefix: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    def positive(name: str, default: Any = None) -> int:
        value = keys.get(name, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        return positive_int(f"{prefix}{name}", value)

    heads, width = positive("attention.head_count"), positive("embedding_length")
    kv_heads = positive("attention.head_count_kv", heads)
    multiple = f"a multiple of {prefix}attention.head_count_kv = {kv_heads}"
    expect(heads % kv_heads == 0, f"{prefix}attention.head_count", multiple, heads)
    head_dim = positive("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        value = positive(name, head_dim)
        expect(value == head_dim, f"{prefix}{name}", f"{head_dim}, as keys have", value)
    table = source.tensors.get("token_embd.weight")
    if table is None:
        raise ValueError("lacks tensor 'token_embd.weight', expected in every model")
    tokens = source.metadata.get("tokenizer.ggml.tokens")
    count, most = len(tokens) if isinstance(tokens, list) else 0, table.shape[0]
    listed = f"at most the {most} rows of token_embd.weight"
    expect(count <= most, "the number of tokenizer.ggml.tokens", listed, count)
    epsilon = "attention.layer_norm_rms_epsilon"
    return {
        "vocab_size": table.shape[0],
        "hidden_size": width,
        "intermediate_size": positive("feed_forward_length"),
        "num_hidden_layers": positive("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positive("context_length"),
        "rms_norm_eps": positive_float(f"{prefix}{epsilon}", keys.get(epsilon)),
        "tie_word_embeddings": "output.weight" not in source.tensors,
    }


def _biases(source: Gguf, family: str) -> dict[str, Any]:
    """Which projections have biases, where the family leaves it open: by the first layer's."""
    found = {name: f"blk.0.{name}.bias" in source.tensors for name in ("attn_q", "ffn_up")}
    if family == "qwen2":
        return {}
    bias = {"attention_bias": found["attn_q"]}
    return bias | ({"mlp_bias": found["ffn_up"]} if family == "llama" else {})


def _rope(source: Gguf, prefix: str, keys: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """The base of the frequencies of a head's rotated pairs, and their scaling."""
    name = f"{prefix}rope.freq_base"
    theta = positive_float(name, keys.get("rope.freq_base", 10000.0))
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0))
    kind = keys.get("rope.scaling.type", "linear" if factor else "none")
    known = kind in ("none", "linear", "yarn")
    expect(known, f"{prefix}rope.scaling.type", "'none', 'linear' or 'yarn'", kind)
    boolean(f"{prefix}rope.scaling.finetuned", keys.get("rope.scaling.finetuned", True))
    scaling: dict[str, Any] | None = None
    if kind == "yarn" or (kind == "linear" and factor not in (0, 1)):
        factor = positive_float(f"{prefix}rope.scaling.factor", factor)
        scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn" and scaling is not None:
        scaling |= {
            hf: keys[f"rope.scaling.{name}"]
            for name, hf in (
                ("original_context_length", "original_max_position_embeddings"),
                ("yarn_attn_factor", "attention_factor"),
                ("yarn_beta_fast", "beta_fast"),
                ("yarn_beta_slow", "beta_slow"),
            )
            if f"rope.scaling.{name}" in keys
        }
    if FREQUENCIES in source.tensors:
        factors = _frequency_factors(source, pairs)
        if not (factors == 1).all():
            expect(
                scaling is None, f"{prefix}rope.scaling.type", f"none beside {FREQUENCIES}", kind
            )
            scaling = llama3_scaling(factors, theta)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _frequency_factors(source: Gguf, pairs: int) -> Float[np.ndarray, " half"]:
    tensor = source.tensors[FREQUENCIES]
    expect(tensor.dtype == "F32", f"the type of {FREQUENCIES}", "F32", tensor.dtype)
    fits = tensor.shape == (pairs,)
    expect(fits, f"the shape of {FREQUENCIES}", f"({pairs},), half of a head", tensor.shape)
    with TensorFile(tensor.path, source.tensors, {}) as file:
        factors = np.array(file.get_tensor(FREQUENCIES)[:])
    positive = bool((np.isfinite(factors) & (factors >= 1)).all())
    expect(positive, FREQUENCIES, "factors of at least 1", factors.tolist())
    return factors


def llama3_scaling(factors: Float[np.ndarray, " half"], theta: float) -> dict[str, Any]:
    """Llama 3's scaling, from the factors by which llama.cpp divides the frequencies.

    A file has the factors alone. Between long waves, which are divided by `factor`, and short ones,
    which are kept, 1 / factors is a line in the frequency; the line says where the band begins and
    ends. The numbers of Llama 3 itself are tried first, for most bands hold few frequencies.

    Args:
      factors: one for each pair of a head's components, at least 1.
      theta: base of the frequencies.

    Returns:
      `rope_scaling` of a `config.json`.

    Raises:
      ValueError: factors that no such scaling has.
    """
    half = len(factors)
    waves = 2 * math.pi * theta ** (np.arange(half) / half)
    factor = float(str(factors.max()))
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    scaling["original_max_position_embeddings"] = _LLAMA3_LENGTH
    if _explains(scaling, factors, waves):
        return scaling
    band = (factors > 1.001) & (factors < 0.999 * factor)  # fp32 puts some of the rest beside it
    if band.sum() > 1:
        blend = (1 / factors[band] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(1 / waves[band], blend.astype(np.float64), 1)
        if slope > 0 > start:
            scaling["original_max_position_embeddings"] = round(slope / -start)
            scaling["high_freq_factor"] = float(f"{(1 - start) / -start:.6g}")
            if _explains(scaling, factors, waves):
                return scaling
    raise ValueError(
        f"{FREQUENCIES} must be the factors of Llama 3's scaling, got {factors.tolist()}"
    )


def _explains(
    scaling: Mapping[str, Any], factors: Float[np.ndarray, " half"], waves: np.ndarray
) -> bool:
    """Whether this scaling has these factors, as far as fp32 tells."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = (scaling["original_max_position_embeddings"] / waves - low) / (high - low)
    blend = np.clip(blend, 0, 1)
    expected = 1 / ((1 - blend) / scaling["factor"] + blend)
    return bool(np.allclose(expected, factors, rtol=1e-4))
