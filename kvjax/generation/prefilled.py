"""Prompts that are read once and compressed many times: by method, by budget."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from kvjax.cache.origin import fingerprint
from kvjax.compression.compress import probe_request
from kvjax.config import CompressionConfig
from kvjax.generation.prefill import Prefilled
from kvjax.inputs.prompts import ModelInputs
from kvjax.model_interface import Model, ProbeRequest

_MOST = 0.999  # of a prompt: nothing is kept whole, and windows are as wide as they get


@dataclass(frozen=True)
class PrefilledPrompts:
    """What `kvjax.prefill_prompts` gives: prompts for `generate`, `stream`, `compress_prompt`.

    It holds every layer's keys and values, whole: as much memory as the full cache.

    Attributes:
      inputs: the prompts as tokens.
      arrays: keys, values, probes and the logits after each prompt.
      request: what the probes hold.
      origin: of the model that read them.
    """

    inputs: ModelInputs
    arrays: Prefilled
    request: ProbeRequest
    origin: str

    def check(self, model: Model, config: CompressionConfig):
        """Raise ValueError where another model read them, or `config` looks at something else."""
        if self.origin != fingerprint(model):
            raise ValueError("the prompts were prefilled by another model, expected this one")
        wanted = probe_request(config, self.arrays.keys[0].shape[1])
        if not serves(self.request, wanted):
            raise ValueError(
                f"the prompts were prefilled without what {config.method!r} reads, expected it"
                " among the configs of prefill_prompts, with the same settings and tokenizer"
                + (" and sums=True" if config.sums else "")
            )

    def check_following(self, more: int | Sequence[int] | np.ndarray):
        """Raise ValueError where rotary frequencies were chosen for another text than what follows.

        `more` tokens follow each prompt; only models that scale frequencies by length look at it.
        """
        if self.arrays.rope_length is None:
            return
        wanted_B = np.asarray(self.arrays.lengths) + np.asarray(more)
        if (np.asarray(self.arrays.rope_length) != wanted_B).any():
            raise ValueError(
                f"the prompts were prefilled for other texts than {np.max(more)} tokens more,"
                " expected them as prefill_prompts(max_new_tokens=)"
            )


def refuse_beside(**given: Any) -> None:
    """Raise ValueError where what belongs to reading prompts is given beside prefilled ones."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is given beside prefilled prompts, expected it without them")


def serves(request: ProbeRequest, wanted: ProbeRequest) -> bool:
    """Whether a probe that answers `request` answers `wanted`, too."""
    both = request | wanted
    same_way = wanted.repeat in (None, both.repeat)
    if wanted.future:
        same_way &= (wanted.future, wanted.skipped) == (both.future, both.skipped)
    return both == request and same_way


def shared_request(configs: Sequence[CompressionConfig], tokens: int) -> ProbeRequest:
    """What all of `configs` read of a bucket of `tokens`.

    Raises:
      ValueError: two that repeat prompts, or expect queries, in different ways.
    """
    asked = [probe_request(_at_any_budget(config), tokens) for config in configs]
    request = reduce(or_, asked, ProbeRequest())
    for config, wanted in zip(configs, asked, strict=True):
        if not serves(request, wanted):
            raise ValueError(
                f"{config.method!r} repeats prompts or expects queries in another way than a config"
                " before it, expected configs that one prefill serves"
            )
    return request


def _at_any_budget(config: CompressionConfig) -> CompressionConfig:
    """The config at a budget at which it reads all that it reads at any other."""
    return dataclasses.replace(config, budget=_MOST) if config.compresses else config


def by_prefill(configs: Sequence[CompressionConfig], tokens: int) -> list[list[int]]:
    """Numbers of the configs that one prefill serves, in as many groups as prefills are needed."""
    asked = [probe_request(_at_any_budget(config), tokens) for config in configs]
    groups: list[list[int]] = []
    for number, wanted in enumerate(asked):
        for group in groups:
            both = reduce(or_, (asked[other] for other in group), wanted)
            if all(serves(both, asked[other]) for other in (*group, number)):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups
