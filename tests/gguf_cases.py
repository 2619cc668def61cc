"""Tiny GGUF files: random tensors under Hugging Face's names, written by `gguf.GGUFWriter`."""

from pathlib import Path

import gguf
import numpy as np

from kvjax.models.checkpoints.weights import tensor_specs
from kvjax.models.config import ModelConfig

D, F, L, N, K, H, V = 32, 64, 2, 4, 2, 8, 300
SIZES = {
    "context_length": 128, "embedding_length": D, "feed_forward_length": F, "block_count": L,
    "attention.head_count": N, "attention.head_count_kv": K, "attention.key_length": H,
}  # fmt: skip
HF = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
    "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H, "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": [2, 0],
}  # fmt: skip
# (llama.cpp's architecture, what else its metadata say, config.json beyond HF)
CASES = {
    "llama": ("llama", {}, {"model_type": "llama"}),
    "tied": ("llama", {}, {"model_type": "llama", "tie_word_embeddings": True}),
    "biases": ("llama", {}, {"model_type": "llama", "attention_bias": True, "mlp_bias": True}),
    "mistral": (
        "llama",
        {"attention.sliding_window": 8},
        {"model_type": "mistral", "sliding_window": 8},
    ),
    "qwen2": ("qwen2", {}, {"model_type": "qwen2"}),
    "qwen3": ("qwen3", {}, {"model_type": "qwen3"}),
}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
BYTES = [chr(point) for point in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + extra) for extra in range(256 - len(BYTES))]  # GPT-2's letters for bytes
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "1 2", "Ã ©", "ā Ă"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES]
TOKENS += [merge.replace(" ", "") for merge in MERGES]
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(TOKENS) - 3)],
    "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
}  # fmt: skip


def tensors(case: str) -> dict[str, np.ndarray]:
    """A random checkpoint of the case under Hugging Face's names, fp32."""
    config = ModelConfig.from_hf(HF | CASES[case][2])
    rng = np.random.default_rng(0)
    shapes = {name: spec.file_shape for name, spec in tensor_specs(config).items()}
    return {name: rng.normal(0, 0.2, one).astype(np.float32) for name, one in shapes.items()}


def their_name(name: str) -> str:
    stem, ending = name.rsplit(".", 1)
    if stem in NAMES:
        return f"{NAMES[stem]}.{ending}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{ending}"


def interleaved(array: np.ndarray) -> np.ndarray:
    """Rows as llama.cpp stores q and k of Llama: components 0, H/2, 1, H/2 + 1, .. of each head."""
    order = [head + half + i for head in range(0, len(array), H) for i in range(H // 2)
             for half in (0, H // 2)]  # fmt: skip
    return array[order]


def stored(case: str) -> dict[str, np.ndarray]:
    """The case's tensors as a GGUF file has them."""
    moved = {}
    for name, array in tensors(case).items():
        turned = CASES[case][0] == "llama" and ("q_proj" in name or "k_proj" in name)
        moved[their_name(name)] = interleaved(array) if turned else array
    return moved


def write(
    path: Path,
    case: str = "llama",
    change: dict | None = None,
    arrays: dict[str, np.ndarray] | None = None,
    **options,
) -> Path:
    """A file of the case; `change` has metadata instead of its own, None to leave one out."""
    family, more, _ = CASES[case]
    metadata = {f"{family}.{name}": value for name, value in (SIZES | more).items()}
    metadata[f"{family}.attention.layer_norm_rms_epsilon"] = 1e-5
    metadata[f"{family}.rope.freq_base"] = 5000.0
    metadata |= VOCABULARY | (change or {})
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", family), **options)
    for name, value in metadata.items():
        add(writer, name, value)
    for name, array in (stored(case) if arrays is None else arrays).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, name: str, value) -> None:
    if value is None:
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array}
    kinds[type(value)](name, value)
