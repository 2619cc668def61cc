"""Prompts that are read once and compressed many times: by method, by budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from kvjax.cache.origin import fingerprint
from kvjax.compression.compress import probe_request
from kvjax.config import CompressionConfig
from kvjax.generation.prefill import Prefilled
from kvjax.inputs.prompts import ModelInputs
from kvjax.model_interface import Model, ProbeRequest


@dataclass(frozen=True)
class PrefilledPrompts:
    """What `kvjax.prefill_prompts` gives, in place of prompts to `generate` and its relatives.

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
                " among the configs of prefill_prompts, with the same settings"
            )


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
    asked = [probe_request(config, tokens) for config in configs]
    request = reduce(or_, asked, ProbeRequest())
    for config, wanted in zip(configs, asked, strict=True):
        if not serves(request, wanted):
            raise ValueError(
                f"{config.method!r} repeats prompts or expects queries in another way than a config"
                " before it, expected configs that one prefill serves"
            )
    return request


def by_prefill(configs: Sequence[CompressionConfig], tokens: int) -> list[list[int]]:
    """Numbers of the configs that one prefill serves, in as many groups as prefills are needed."""
    groups: list[list[int]] = []
    requests: list[ProbeRequest] = []
    for number, config in enumerate(configs):
        wanted = probe_request(config, tokens)
        for group, request in enumerate(requests):
            both = request | wanted
            members = [configs[other] for other in groups[group]]
            if all(serves(both, probe_request(one, tokens)) for one in (*members, config)):
                groups[group].append(number)
                requests[group] = both
                break
        else:
            groups.append([number])
            requests.append(wanted)
    return groups
