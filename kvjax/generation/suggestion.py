"""How a checkpoint wants its answers drawn: what its `generation_config.json` states, as rules."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kvjax.generation.sampling import Sampling

# What a checkpoint may suggest that `Sampling` has.
_KNOWN = tuple(field.name for field in dataclasses.fields(Sampling))


def chosen(sampling: Sampling | str | None, stated: Sequence[tuple[str, Any]] = ()) -> Sampling:
    """The rules that a call asks for.

    Args:
      sampling: None for greedy, "model" for what the checkpoint suggests.
      stated: of `ModelConfig.stated_sampling`. As in transformers, temperature, top-k, top-p and
        min-p have an effect where `do_sample` is true alone, and temperature is then 1 where it is
        missing. What else is missing is off: also top-k, which transformers has at 50.

    Raises:
      ValueError: anything else, or a suggestion that is out of range or not implemented.
    """
    if sampling is None:
        return Sampling()
    if isinstance(sampling, Sampling):
        return sampling
    if sampling != "model":
        raise ValueError(f"sampling={sampling!r}, expected a kvjax.Sampling, 'model' or None")
    rules = dict(stated)
    draws = rules.pop("do_sample", False)
    for name, value in rules.items():
        if name not in _KNOWN:
            raise ValueError(
                f"sampling='model': the checkpoint sets {name}={value!r}, which is not implemented,"
                f" expected some of {', '.join(_KNOWN)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"sampling='model': {name}={value!r}, expected a number")
    if not draws:
        penalty = rules.get("repetition_penalty", 1.0)
        return Sampling(repetition_penalty=penalty)
    return Sampling(**{"temperature": 1.0} | rules)


def suggestion(stated: Sequence[tuple[str, Any]]) -> str | None:
    """What a checkpoint that wants its answers drawn says of how, in words; None if it does not."""
    if dict(stated).get("do_sample") is not True:
        return None
    return ", ".join(f"{name}={value}" for name, value in stated if name in _KNOWN) or None
