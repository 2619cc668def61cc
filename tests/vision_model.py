"""What tests of vision-language models share: a small random LLaVA, and logits step by step."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from kvjax import CompressionConfig, tiny
from kvjax.cache.state import with_room
from kvjax.generation import prefill
from kvjax.model_interface import ProbeRequest, encode_images
from kvjax.models.vision.config import VisionConfig, load_vision_config
from kvjax.models.vision.weights import NAMINGS, llava_specs

FULL = CompressionConfig.named("full")


def write_llava(folder: Path, *, size: int = 56, patch: int = 14, layers: int = 2) -> Path:
    """A Hugging Face directory with the bundled model's tokenizer.

    Images have `size` pixels in patches of `patch`; the last token is `<image>`.
    """
    folder.mkdir(parents=True)
    tokenizer = json.loads((tiny.WEIGHTS / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    image = len(vocab) + sum(one["id"] >= len(vocab) for one in tokenizer["added_tokens"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": image, "content": "<image>", "special": True} | flags
    tokenizer["added_tokens"].append(token)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image,
        "text_config": {
            "model_type": "llama",
            "vocab_size": image + 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": size,
            "patch_size": patch,
        },
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }
    template = (
        "{% for m in messages %}{% for part in m['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{% endfor %}"
    )
    settings = json.loads((tiny.WEIGHTS / "tokenizer_config.json").read_text())
    for name, value in {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings | {"chat_template": template},
        "config.json": config,
        "preprocessor_config.json": processor,
    }.items():
        (folder / name).write_text(json.dumps(value))
    rng = np.random.default_rng(0)
    text, vision = load_vision_config(folder)
    assert isinstance(vision, VisionConfig)
    specs, _ = llava_specs(text, vision, NAMINGS[0])
    tensors = {
        name: (0.3 * rng.normal(size=spec.file_shape)).astype(np.float32)
        for name, spec in specs.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@jax.jit
def forced(model, tokens, lengths, images, steps):
    """Logits of every position of the prompt, and after it and each of the given tokens."""
    seen = encode_images(model, images)
    x = seen.put(model.embed(tokens))
    for layer in model.layers:
        x, *_ = layer.prefill(x, lengths, ProbeRequest(), seen.rotary)
    key = jax.random.key(0)
    last, cache = prefill.prefill_compress(model, tokens, lengths, key, FULL, images)

    def step(cache, token):
        x, cache = model.extend(token[:, None], jnp.ones_like(lengths), cache)
        return cache, model.logits(x[:, 0])

    _, later = jax.lax.scan(step, with_room(cache, len(steps)), steps)
    return model.logits(x), last, later
