"""prefill_prompts(): prompts read once, to be compressed with each of several configs."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from kvjax.cache.origin import fingerprint
from kvjax.config import CompressionConfig, check_config
from kvjax.exact import always_32_bits
from kvjax.generation import prefill
from kvjax.generation.prefill import Prefilled, rope_lengths
from kvjax.generation.prefilled import PrefilledPrompts, shared_request
from kvjax.generation.programs import Program
from kvjax.generation.request import FULL, check_rows, following, instructed
from kvjax.inputs.multimodal import Pictures
from kvjax.inputs.prompts import Prompts, pad
from kvjax.inputs.read import read
from kvjax.model_interface import Images, Model, ProbeRequest
from kvjax.sharding import place


@always_32_bits
def prefill_prompts(
    model: Model,
    prompts: Prompts,
    configs: Sequence[CompressionConfig],
    *,
    tokenizer: Any = None,
    attention_mask: np.ndarray | None = None,
    images: Pictures | None = None,
    max_new_tokens: int | Sequence[int] = 0,
    mesh: Mesh | None = None,
) -> PrefilledPrompts:
    """Read prompts once, to compress them with each of several configs.

    `generate`, `stream` and `compress_prompt` take the result in place of prompts, `score` as
    `prefilled=`, and give what they would give for the prompts themselves. It holds every key and
    value.

    Args:
      configs: all that are going to be used; other budgets of the same methods may join.
      max_new_tokens: as in `compress_prompt`.
      Others: as in `generate`.

    Raises:
      ValueError: as `generate`; configs that repeat the prompt, or expect queries, in two ways.
    """
    inputs = read(model, prompts, images, tokenizer=tokenizer, attention_mask=attention_mask)
    model = place(model, mesh)
    vocabulary = model.config.vocab_size
    check_rows(model, inputs.rows, FULL)
    for config in configs:
        check_config(config)
    configs = [instructed(config, tokenizer, vocabulary) for config in configs]
    tokens, lengths = pad(inputs.rows)
    request = shared_request(configs, tokens.shape[1])
    rope_length = rope_lengths(model, lengths, following(max_new_tokens, len(lengths)))
    prompt = tokens, lengths, inputs.images(tokens), rope_length
    arrays = prefill_program(model, *prompt, request=request)
    return PrefilledPrompts(inputs, arrays, request, fingerprint(model))


@partial(Program, static_argnames="request")
def prefill_program(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    images: Images | None = None,
    rope_length: Int[Array, " B"] | None = None,
    *,
    request: ProbeRequest,
) -> Prefilled:
    """Prompts that are going to be compressed more than once."""
    return prefill.prefill_in_groups(model, tokens, lengths, request, images, rope_length)
