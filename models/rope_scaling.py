"""Length scaling of rotary embeddings: its kinds, and what a `config.json` says of it.

Names, defaults and precedence are those of transformers 5 (modeling_rope_utils); the
frequencies themselves are in `layers.py`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from kvjax.models.checkpoints.checks import (
    boolean,
    check_fields,
    expect,
    positive_float,
    positive_int,
)

DEFAULT_THETA = 10000.0
KINDS = ("linear", "llama3", "yarn", "dynamic", "longrope")
_ORIGINAL = "original_max_position_embeddings"
# transformers takes `value or default` of these.
_ZERO_IS_NULL = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained on.

    Attributes:
      kind: "linear" (all frequencies divided by `factor`) or "llama3" (only the low ones).
      factor: the divisor, > 0.
      low_freq_factor: llama3 only: wavelengths above `original / low_freq_factor` are divided.
      high_freq_factor: llama3 only: wavelengths below `original / high_freq_factor` are kept;
        more than `low_freq_factor`.
      original_max_position_embeddings: llama3 only: the `original` of the two lines above, tokens.

    Raises:
      ValueError: a number that is not positive, an unknown kind, or high <= low.
    """

    by_length: ClassVar[bool] = False
    attention_factor: ClassVar[float] = 1.0

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        known = self.kind in ("linear", "llama3")
        expect(known, "kind", "'linear' or 'llama3'", self.kind)
        check_fields(self)
        low, high = self.low_freq_factor, self.high_freq_factor
        expect(high > low, "high_freq_factor", f"more than low_freq_factor = {low!r}", high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow pairs are divided, fast ones kept.

    Attributes:
      factor: the divisor, > 0.
      original_max_position_embeddings: tokens that the model was first trained on.
      attention_factor: what queries and keys are both multiplied by, > 0.
      beta_fast: pairs that turn more often than this within `original` are kept.
      beta_slow: pairs that turn less often than this are divided; between the two a blend. At most
        `beta_fast`.
      truncate: whether the blend begins and ends at whole pairs.

    Raises:
      ValueError: a number that is not positive, beta_slow > beta_fast.
    """

    by_length: ClassVar[bool] = False

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    kind: Literal["yarn"] = dataclasses.field(default="yarn", init=False)

    def __post_init__(self):
        check_fields(self)
        slow, fast = self.beta_slow, self.beta_fast
        expect(fast >= slow, "beta_fast", f"at least beta_slow = {slow!r}", fast)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNtk:
    """Dynamic NTK scaling: a longer text has a larger base, and so slower pairs.

    Attributes:
      factor: with a text of n tokens, n > `original`, the base is multiplied by
        `(factor * n / original - (factor - 1)) ** (H / (H - 2))`; > 0.
      original_max_position_embeddings: the `original` above, tokens; shorter texts are not scaled.

    Raises:
      ValueError: a number that is not positive.
    """

    by_length: ClassVar[bool] = True
    attention_factor: ClassVar[float] = 1.0

    factor: float
    original_max_position_embeddings: int
    kind: Literal["dynamic"] = dataclasses.field(default="dynamic", init=False)

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor for each pair, two sets of them.

    Attributes:
      short_factor: divisors for texts of at most `original` tokens, H / 2 of them, each > 0.
      long_factor: divisors for longer texts.
      original_max_position_embeddings: the `original` above, tokens.
      attention_factor: what queries and keys are both multiplied by, > 0; the same for both sets.

    Raises:
      ValueError: a number that is not positive, sets of two sizes.
    """

    by_length: ClassVar[bool] = True

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float
    kind: Literal["longrope"] = dataclasses.field(default="longrope", init=False)

    def __post_init__(self):
        check_fields(self)
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            expect(isinstance(factors, tuple), name, "a tuple of numbers", factors)
            _factors(name, factors)
        pairs = len(self.short_factor)
        same = len(self.long_factor) == pairs
        expect(same, "long_factor", f"as long as short_factor ({pairs})", self.long_factor)


Scaling = RopeScaling | Yarn | DynamicNtk | LongRope
_CLASSES: dict[str, Any] = {"yarn": Yarn, "dynamic": DynamicNtk, "longrope": LongRope}


def scaling_of(fields: Mapping[str, Any]) -> Scaling:
    """The scaling whose fields these are: `dataclasses.asdict` in reverse, also by way of JSON."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    if values["kind"] in _CLASSES:
        return _CLASSES[values.pop("kind")](**values)
    return RopeScaling(**values)


def _factors(name: str, value: Any) -> tuple[float, ...]:
    expect(isinstance(value, list | tuple) and bool(value), name, "a list of numbers", value)
    return tuple(positive_float(name, factor) for factor in value)


# ---------------------------------------------------------------------------- config.json
def read_rope(keys: Mapping[str, Any]) -> tuple[float, Scaling | None, int]:
    """The base of the frequencies, their scaling, and the context that it is meant for.

    Args:
      keys: of a Hugging Face `config.json`, with the defaults of its family.

    Raises:
      ValueError: one sentence that names the key, its value and what was expected.
    """
    source = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    given = keys.get(source) or {}
    expect(isinstance(given, Mapping), source, "an object or null", given)
    if any(isinstance(value, Mapping) for value in given.values()):
        # One entry a layer type. The decoder has one rotary embedding, so they have to agree.
        entries = list(given.values())
        same = all(entry == entries[0] for entry in entries)
        expect(same, source, "the same for every layer type", given)
        given = entries[0]
    outer = {key: keys[key] for key in ("rope_theta", "partial_rotary_factor") if key in keys}
    given = outer | dict(given)
    partial = given.get("partial_rotary_factor")
    expect(partial in (None, 1), "partial_rotary_factor", "1", partial)
    theta = positive_float("rope_theta", given.get("rope_theta", DEFAULT_THETA))
    stated = positive_int("max_position_embeddings", keys["max_position_embeddings"])
    kind = given.get("rope_type", given.get("type"))
    if kind in (None, "default"):
        return theta, None, stated
    known = "'default', " + ", ".join(map(repr, KINDS[:-1])) + f" or {KINDS[-1]!r}"
    expect(kind in KINDS, f"{source}.rope_type", known, kind)
    original = keys.get(_ORIGINAL, given.get(_ORIGINAL, stated))
    if kind not in ("linear", "dynamic"):
        original = positive_int(_ORIGINAL, original)
    if kind == "yarn":
        return theta, *_yarn(given, source, original, stated)
    if kind == "longrope":
        return theta, *_longrope(given, source, original, stated)
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    numbers: dict[str, Any] = {n: positive_float(f"{source}.{n}", given.get(n)) for n in needed}
    if kind == "llama3":  # such files state the whole length
        return theta, RopeScaling(kind, **numbers, **{_ORIGINAL: original}), stated
    # These state the length before scaling.
    context = int(stated * max(numbers["factor"], 1.0))
    if kind == "dynamic":
        return theta, DynamicNtk(**numbers, original_max_position_embeddings=stated), context
    return theta, RopeScaling(kind, **numbers), context


def _yarn(given: Mapping[str, Any], source: str, original: int, stated: int) -> tuple[Yarn, int]:
    """YaRN and its context: published files state either length as max_position_embeddings."""
    factor = given.get("factor")
    if "factor" in given and factor is None:
        factor = stated / original
    factor = positive_float(f"{source}.factor", factor)
    names = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers: dict[str, Any] = _stated(given, names, source)
    mscale, mscale_all_dim = numbers.pop("mscale", None), numbers.pop("mscale_all_dim", None)

    def scaled(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    inferred = scaled(1.0)
    if mscale is not None and mscale_all_dim is not None:
        inferred = scaled(mscale) / scaled(mscale_all_dim)
    scaling = Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        truncate=boolean(f"{source}.truncate", given.get("truncate", True)),
        **{"attention_factor": inferred} | numbers,
    )
    return scaling, max(stated, int(original * factor))


def _longrope(
    given: Mapping[str, Any], source: str, original: int, stated: int
) -> tuple[LongRope, int]:
    """LongRoPE and its context."""
    numbers = _stated(given, ("factor", "attention_factor"), source)
    factor, attention = numbers.get("factor", stated / original), numbers.get("attention_factor")
    if attention is None:
        attention = 1.0
        if factor > 1:
            expect(original > 1, _ORIGINAL, "more than 1", original)
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
    scaling = LongRope(
        short_factor=_factors(f"{source}.short_factor", given.get("short_factor")),
        long_factor=_factors(f"{source}.long_factor", given.get("long_factor")),
        original_max_position_embeddings=original,
        attention_factor=attention,
    )
    return scaling, max(stated, int(original * factor))


def _stated(given: Mapping[str, Any], names: tuple[str, ...], source: str) -> dict[str, float]:
    """Those numbers that are neither missing nor null, nor 0 where 0 means null."""
    found = {name: given[name] for name in names if given.get(name) is not None}
    found = {name: x for name, x in found.items() if x != 0 or name not in _ZERO_IS_NULL}
    return {name: positive_float(f"{source}.{name}", value) for name, value in found.items()}
