"""What a checkpoint's `generation_config.json` states: special tokens, and how tokens are drawn."""

import json
from pathlib import Path
from typing import Any

from kvjax.models.checkpoints.checks import naming, optional_token_id, read_object, token_ids

Stated = tuple[tuple[str, bool | int | float | str | None], ...]
# What transformers' `generate` draws tokens by, and the value that has no effect (None never has).
NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "dola_layers": None,
    "watermarking_config": None,
}


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Fields of `ModelConfig` that the file states; none where there is no file.

    Raises:
      ValueError: the file cannot be read, or its special tokens are none; the message names it.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    with naming(path):
        mapping = read_object(path)
        found: dict[str, Any] = {
            "bos_token_id": optional_token_id("bos_token_id", mapping.get("bos_token_id")),
            "eos_token_ids": token_ids("eos_token_id", mapping.get("eos_token_id")),
        }
    stated = {name: value for name, value in found.items() if value not in (None, ())}
    return stated | {"stated_sampling": _sampling(mapping)}


def _sampling(mapping: dict[str, Any]) -> Stated:
    """What has an effect on how tokens are drawn, in the order of `NEUTRAL`.

    Values are not checked here: a checkpoint loads whatever it suggests. Lists and objects are kept
    as their text, so that a config can be hashed.
    """
    named = ((name, mapping.get(name)) for name in NEUTRAL)
    return tuple(
        (name, json.dumps(value) if isinstance(value, list | dict) else value)
        for name, value in named
        if value not in (None, NEUTRAL[name], [], {})
    )
