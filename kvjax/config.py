"""CompressionConfig: what to keep of a prompt's cache. Static, frozen, validated."""

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import Any, NoReturn

from kvjax.compression import allocators, row_budgets, scorers
from kvjax.methods import METHODS, Settings


class ConfigError(ValueError):
    """A setting that cannot be: one sentence with its name, its value and what was expected."""


@dataclass(frozen=True, kw_only=True)
class CompressionConfig(Settings):
    """A method with its numbers. Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      method: a label, usually the named method this was made from.
      budget: entries RETAINED per KV head, on average over heads and layers, the always-kept ones
        included: an int, or a float in (0, 1] for that fraction of each row's prompt (rounded
        down, at least 2). None for `full`, and for a `profile` that is taken as it is.
      scorer, layers, heads, sinks, recent, keep_ratio, output_aware, chunk, epsilon: see
        `kvjax.methods.Choices`. "global" and "joint" divide a budget among layers and heads at
        once, so they stand for both.
      window: observation window, in tokens, below the budget; None for min(32, budget // 2), and
        8 and 1 in place of 32 for "l2-window" and "tova", as in their papers.
      reduce: "mean" or "sum" of the window's queries (the same ranking inside a layer).
      pooling: smoothing of window scores along the sequence: "max", "average" (or "avg";
        zero-padded, always divided by `kernel`) or "none".
      kernel: width of the pooling, odd; SnapKV and Ada-KV use 7 with "max".
      group: "mean" or "max" over the query heads of a KV head.
      floor: Ada-KV's alpha in [0, 1], the share of the budget spread evenly over heads; with
        "joint" the share that no head falls below.
      head_cap: most entries of one head, always-kept ones included; None for no cap.
      beta: PyramidKV's steepness, >= 1.
      profile: fraction of the prompt that each layer retains (PrefixKV offline); needs
        layers="prefix".
      future: positions after the prompt over which expected attention averages.
      repeat: KVzip's instructions as token ids, before the first part of the prompt and before the
        others; None for those that a tokenizer makes of `kvjax.generation.request.INSTRUCTIONS`,
        and without a tokenizer for none.
      repeat_chunk: tokens of the prompt that KVzip repeats at once.
      layout: "padded" ([B, K, S, H] per layer, S for the longest head), "packed" (one pool of
        the budget, rounded up to pages) or None for packed, except for uniform budgets on a CPU.
      quantize: "int8" stores what is kept as 8-bit whole numbers with an fp32 scale for each key
        and each value, or None for the model's dtype. Packed layout only. A prompt that the budget
        holds whole is quantized too, alone as beside longer ones; `full` and a budget of 1.0, which
        evict nothing of any prompt, are not.
      sums: whether every entry that is kept carries the squared attention probabilities that it has
        received, which `Recompress(scorer="squared-sum")` goes on adding to: 4 bytes a slot, packed
        layout only. `generate` and `stream` set it under such a rule; `compress_prompt` and
        `prefill_prompts` have to be told. They begin with the prompt's last 8 queries, or the
        window of "l2-window".

    Raises:
      ConfigError: a value outside its range.
    """

    @classmethod
    def named(cls, name: str, budget: int | float | None = None, **settings: Any):
        """The named method (`kvjax.methods.METHODS`) with a budget and any other settings."""
        if name not in METHODS:
            raise ConfigError(f"method={name!r}, expected one of {', '.join(METHODS)}")
        row = dataclasses.asdict(METHODS[name])
        del row["paper"]
        if name == "full":
            budget = None
        return cls(method=name, budget=budget, **(row | settings))

    def __post_init__(self):
        # Hashable, as a static argument must be, and one spelling for what is the same.
        if isinstance(self.profile, list):
            object.__setattr__(self, "profile", tuple(self.profile))
        if self.pooling == "avg":
            object.__setattr__(self, "pooling", "average")
        if self.repeat is not None:
            object.__setattr__(self, "repeat", _instructions(self))
        by_head = [name for name, row in allocators.LAYERS.items() if row.by_head]
        choices = {
            "scorer": scorers.SCORERS,
            "layers": allocators.LAYERS,
            "heads": (*allocators.HEADS, *by_head),
            "reduce": ("mean", "sum"),
            "pooling": ("max", "average", "none"),
            "group": ("mean", "max"),
            "layout": ("padded", "packed", None),
            "quantize": ("int8", None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                _fail(self, name, f"one of {', '.join(map(str, allowed))}")
        if self.recent not in ("window", "half") and not _whole(self.recent, 1):
            _fail(self, "recent", "'window', 'half' or an integer of at least 1")
        least = {"sinks": 0, "kernel": 1, "beta": 1, "chunk": 1, "future": 1, "repeat_chunk": 16}
        for name, smallest in least.items():
            if not _whole(getattr(self, name), smallest):
                _fail(self, name, f"an integer of at least {smallest}")
        for both in by_head:
            if (self.layers == both) != (self.heads == both):
                _fail(self, "heads", f"{both!r} exactly where layers={both!r}")
        if self.kernel % 2 == 0:
            _fail(self, "kernel", "an odd integer")
        if self.quantize is not None and self.layout == "padded":
            _fail(self, "quantize", "None with layout='padded'")
        if not isinstance(self.sums, bool) or (self.sums and self.layout == "padded"):
            _fail(self, "sums", "True or False, and False with layout='padded'")
        for name in ("floor", "epsilon"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                _fail(self, name, "a number from 0 to 1")
        self._check_budget()
        self._check_profile()

    def _check_budget(self):
        budget = self.budget
        if budget is None:
            if self.compresses and self.profile is None:
                _fail(self, "budget", "a number of entries, or a fraction of the prompt")
        elif isinstance(budget, bool) or not isinstance(budget, int | float):
            _fail(self, "budget", "an integer, or a float in (0, 1]")
        elif isinstance(budget, float):
            if not (math.isfinite(budget) and 0 < budget <= 1):
                _fail(self, "budget", "a fraction above 0 and at most 1 (100 %)")
        elif budget < 2:
            _fail(self, "budget", "at least 2 entries")
        if self.window is not None:
            if not _whole(self.window, 1):
                _fail(self, "window", "an integer of at least 1")
            if isinstance(budget, int) and self.uses_window and self.window >= budget:
                _fail(self, "window", f"less than the budget of {budget}")
        if self.head_cap is not None:
            if not _whole(self.head_cap, 1):
                _fail(self, "head_cap", "an integer of at least 1")
            if not isinstance(budget, int) or self.layers != "uniform" or self.heads != "ada":
                _fail(self, "head_cap", "None unless heads='ada', layers='uniform', integer budget")
            elif self.head_cap < budget:
                _fail(self, "head_cap", f"at least the budget of {budget}")

    def _check_profile(self):
        if self.profile is None:
            return
        if self.layers != "prefix":
            _fail(self, "profile", "None unless layers='prefix'")
        if not self.profile or not all(0 <= share <= 1 for share in self.profile):
            _fail(self, "profile", "a retained fraction from 0 to 1 for each layer")
        if sum(self.profile) == 0:
            _fail(self, "profile", "at least one layer that retains something")

    @property
    def compresses(self) -> bool:
        """False for `full`, and for a budget of 100 %."""
        whole = isinstance(self.budget, float) and self.budget == 1
        return self.scorer != "none" and not whole

    @property
    def fraction(self) -> float:
        """The budget as a fraction of the prompt; a profile's own where no budget is given."""
        return row_budgets.fraction(self)

    @property
    def default_window(self) -> int:
        """The scorer's observation window, where `window` is None and the budget allows it."""
        return scorers.SCORERS[self.scorer].window

    @property
    def uses_window(self) -> bool:
        """Whether an observation window is scored from, or always kept."""
        return scorers.SCORERS[self.scorer].question or self.recent == "window"

    def keeps_all(self, bucket: int) -> bool:
        """Whether nothing could be evicted of a prompt of this bucket, so that none is scored."""
        return not self.compresses or (isinstance(self.budget, int) and self.budget >= bucket)

    def skips(self, bucket: int) -> bool:
        """Whether a prompt of this bucket is left alone: nothing evicted, quantized or summed."""
        return self.keeps_all(bucket) and not self.sums and not self.quantizes

    @property
    def quantizes(self) -> bool:
        """Whether entries become int8; they do not where no prompt's are evicted."""
        return self.compresses and self.quantize is not None


@dataclass(frozen=True, kw_only=True)
class Recompress:
    """When to compress while decoding, and to what. Static; for `generate(recompress=...)`.

    Attributes:
      every: tokens between two compressions, at least 2; so many slots the tail has.
      budget: entries kept per KV head, on average over heads and layers, of prompt and answer
        together, at least what is kept of the prompt; or None to keep the prompt's retained ratio
        while the answer grows, as PrefixKV does (for methods with `keep_ratio` and budgets that
        are fractions). A prompt so short that it keeps more than its fraction (at least 2 entries,
        and what is protected) grows by no more than the fraction of the answer and 2 a head.
      scorer: "window", attention from the last queries (for an answer that goes on), "key-diff",
        keys unlike the others (for questions yet to come: what the answer does not look at for a
        while is not forgotten), "squared-sum", KV-Compress's metric (squared attention
        probabilities, summed over the query heads of a group and over all queries since the
        prompt's window; on top of the prompt's own), or another that scores while decoding
        (`kvjax.compression.scorers.decoding_scorers`).
      window: last tokens, which are always kept and whose queries "window" scores by; None for
        min(32, every, budget // 2).
      sinks: first positions always kept; KV-Compress protects none.
      layers: "uniform", every layer goes on with the slots that it has, or "global", KV-Compress's
        one threshold over all layers and heads; needs scorer="squared-sum" and a budget.
      heads: "ada" or "uniform", how a layer's entries are divided among its heads (any of
        `kvjax.compression.allocators.HEADS` under which heads keep tokens of their own); "global"
        layers divide them among heads, too, and take no other.
      floor: Ada-KV's alpha, from 0 to 1; has no effect on "global" layers.

    Raises:
      ConfigError: a value outside its range.
    """

    every: int
    budget: int | None = None
    scorer: str = "window"
    window: int | None = None
    sinks: int = 4
    layers: str = "uniform"
    heads: str = "ada"
    floor: float = 0.2

    def __post_init__(self):
        least = {"every": 2, "budget": 4, "window": 1, "sinks": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is None and name in ("budget", "window"):
                continue
            if not _whole(value, smallest):
                _refuse(name, value, f"an integer of at least {smallest}")
        heads = [name for name, row in allocators.HEADS.items() if not row.shared]
        for name, allowed in (("heads", heads), ("scorer", scorers.decoding_scorers())):
            if (value := getattr(self, name)) not in allowed:
                _refuse(name, value, f"one of {', '.join(allowed)}")
        if self.layers not in ("uniform", "global"):
            _refuse("layers", self.layers, "one of uniform, global")
        if self.layers == "global" and not self.sums:
            _refuse("layers", self.layers, "'uniform' without scorer='squared-sum' and a budget")
        if self.layers == "global" and self.heads != "ada":
            _refuse("heads", self.heads, "'ada' with layers='global', whose threshold divides both")
        if not (isinstance(self.floor, int | float) and 0 <= self.floor <= 1):
            _refuse("floor", self.floor, "a number from 0 to 1")
        if self.window is not None:
            if self.window > self.every:
                _refuse("window", self.window, f"at most every={self.every}")
            if self.budget is not None and self.window + self.sinks >= self.budget:
                _refuse("window", self.window, f"with {self.sinks} sinks less than {self.budget}")

    @property
    def recent(self) -> int:
        """Last tokens always kept under a budget."""
        return self.window or min(32, self.every, (self.budget or 2) // 2)

    @property
    def queries(self) -> int:
        """Queries to remember; none where nothing is scored by them."""
        reads = self.budget is not None and scorers.SCORERS[self.scorer].decoding_queries
        return self.recent if reads else 0

    @property
    def sums(self) -> bool:
        """Whether squared attention probabilities are added up while decoding."""
        return self.budget is not None and scorers.SCORERS[self.scorer].decoding_sums


def _refuse(name: str, value: Any, expected: str):
    raise ConfigError(f"recompress.{name}={value!r}, expected {expected}")


def parse_budget(text: str) -> int | float:
    """A budget as typed: "1024" entries, or "20%" of the prompt.

    Raises:
      ConfigError: neither, or not in (0, 100 %].
    """
    try:
        if text.endswith("%"):
            fraction = float(text[:-1]) / 100
            if math.isfinite(fraction) and 0 < fraction <= 1:
                return fraction
        elif (entries := int(text)) >= 1:
            return entries
    except ValueError:
        pass
    raise ConfigError(f"budget={text!r}, expected a number of entries (N) or 0 < P <= 100 (P%)")


def check_config(config: Any) -> None:
    """Raise ConfigError unless this is a CompressionConfig; a method's name is none yet."""
    if not isinstance(config, CompressionConfig):
        example = config if isinstance(config, str) and config in METHODS else "snapkv"
        raise ConfigError(
            f"config={config!r}, expected a CompressionConfig, such as"
            f" CompressionConfig.named({example!r}, budget=1024)"
        )


def check_repeat(config: CompressionConfig, vocab_size: int) -> None:
    """Raise ConfigError where `repeat` has ids that are not in 0 .. vocab_size - 1."""
    for ids in config.repeat or ():
        for token in ids:
            if token >= vocab_size:
                _fail(config, "repeat", f"token ids of 0 to {vocab_size - 1}, got {token}")


def _instructions(config: CompressionConfig) -> tuple[tuple[int, ...], ...]:
    expected = "two sequences of token ids, each of at least 0"
    try:
        both = tuple(tuple(map(operator.index, ids)) for ids in config.repeat or ())
    except TypeError:
        _fail(config, "repeat", expected)
    if len(both) != 2 or any(token < 0 for ids in both for token in ids):
        _fail(config, "repeat", expected)
    return both


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _fail(config: CompressionConfig, name: str, expected: str) -> NoReturn:
    raise ConfigError(f"{name}={getattr(config, name)!r}, expected {expected}")
