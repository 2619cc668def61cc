"""What a server offers: methods, buckets and budgets, and the pages that a request can need.

All of it is known from lengths alone, before anything runs on the device.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvjax.compression.capacity import check_prompt, layer_capacity, most_kept
from kvjax.compression.room import check_held, slots_needed, widest_layer
from kvjax.compression.row_budgets import largest
from kvjax.config import CompressionConfig, ConfigError, Recompress, check_config
from kvjax.exact import MOST
from kvjax.generation.request import FULL, instructed
from kvjax.model_interface import ModelShape
from kvjax.serve.pressure import Sizes
from kvjax.spelling import parse_method

Method = CompressionConfig | str
# Tokens of an answer that are not in pages yet, where nothing compresses it.
TAIL = 32


@dataclass(frozen=True)
class Choice:
    """How one prompt is read.

    Attributes:
      bucket: that it is padded to.
      config: what is kept of it; with the bucket this says which program runs.
      budget: entries a head that are kept at most, as a run-time number.
      entries: kept of all layers and heads, at most.
    """

    bucket: int
    config: CompressionConfig
    budget: int
    entries: int


@dataclass(frozen=True, kw_only=True)
class Menu:
    """Methods and sizes of a server.

    Attributes:
      shape: of the model.
      methods: by name; all quantize or none does.
      buckets: lengths that prompts are padded to, rising.
      question_buckets: those of questions about a context; () for no contexts.
      max_new_tokens: of an answer at most.
      tail_slots: tokens of an answer that are not in pages yet.
      recompress: how answers are compressed while they are drawn, or None.
      page: slots of a page.
      floor: entries a head that are left of a row when pages run short; None where it keeps what
        the rule says.
    """

    shape: ModelShape
    methods: Mapping[str, CompressionConfig]
    buckets: tuple[int, ...]
    question_buckets: tuple[int, ...]
    max_new_tokens: int
    tail_slots: int
    recompress: Recompress | None
    page: int
    floor: int | None = None

    def __post_init__(self):
        kinds = {config.quantize for config in self.methods.values()}
        whole = [name for name, config in self.methods.items() if not config.compresses]
        if len(kinds) > 1 or (kinds == {"int8"} and whole):
            raise ValueError(
                f"methods={list(self.methods)} store entries in several dtypes, expected all of"
                " them to quantize or none"
            )
        for name in ("buckets", "question_buckets"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or any(size < 1 for size in sizes):
                raise ValueError(f"{name}={sizes!r}, expected rising lengths of at least 1")
        if not self.buckets:
            raise ValueError("buckets=(), expected at least one length")

    @property
    def quantize(self) -> bool:
        """Whether entries are int8."""
        return any(config.quantize for config in self.methods.values())

    @property
    def sums(self) -> bool:
        """Whether entries have sums of squared attention probabilities."""
        return self.recompress is not None and self.recompress.sums

    @property
    def _heads(self) -> int:
        return self.shape.num_layers * self.shape.num_kv_heads

    # ------------------------------------------------------------------ programs
    def variants(self) -> list[tuple[int, CompressionConfig]]:
        """Bucket and config of every program that reads prompts."""
        found: dict[tuple[int, CompressionConfig], None] = {}
        for bucket in self.buckets:
            for config in self.methods.values():
                found[bucket, _canonical(config, bucket)] = None
                if (less := _below(config, bucket)) is not None:
                    found[bucket, less] = None
        return list(found)

    def choose(self, method: str | None, length: int, budget: int | float | None) -> Choice:
        """How a prompt is read.

        Args:
          method: a name, or None for the first.
          length: tokens of the prompt.
          budget: entries a head or fraction of the prompt, at most what the method keeps; None for
            all of that.

        Raises:
          ValueError: another method, a longer prompt, a larger budget.
        """
        name = next(iter(self.methods)) if method is None else method
        if name not in self.methods:
            raise ValueError(f"method={name!r}, expected one of {', '.join(self.methods)}")
        bucket = self.bucket_of(length)
        config = self.methods[name]
        chosen, most = _canonical(config, bucket), MOST
        if budget is not None:
            config, most = _reduced(config, name, length, budget)
            below = _below(self.methods[name], bucket)
            if most < length and below is not None:
                chosen = below
        check_prompt(config, length)
        windows, kv_heads = self.shape.sliding_windows, self.shape.num_kv_heads
        entries = most_kept(config, bucket, length, windows, kv_heads)
        if self.recompress is not None:
            check_held(self.recompress, self._heads, entries)
        return Choice(bucket, chosen, most, entries)

    def bucket_of(self, length: int) -> int:
        """The bucket of a prompt; ValueError where there is none."""
        return _bucket(self.buckets, length, "prompt")

    def question_bucket(self, length: int) -> int:
        """The bucket of a question; ValueError where there is none."""
        return _bucket(self.question_buckets, length, "question")

    # ------------------------------------------------------------------ pages
    def growth(self, new_tokens: int) -> int:
        """Tokens of an answer that come to lie in pages, beside the prompt's entries."""
        fed = new_tokens - 1  # the last one is not
        return fed if self.recompress is None and fed > self.tail_slots else 0

    @property
    def most(self) -> int:
        """Entries of all layers and heads that `recompress` keeps of a row."""
        return slots_needed(0, self._heads, self.recompress, 0, 1.0) if self.recompress else 0

    def sizes(self, width: int) -> Sizes | None:
        """What rows hold that are evicted under pressure, of `width` pages a layer; else None."""
        if self.floor is None:
            return None
        return Sizes(
            page=self.page, layers=self.shape.num_layers, width=width, heads=self._heads,
            tail=self.tail_slots, most=self.most, floor=self._heads * self.floor,
        )  # fmt: skip

    def pages(self, entries: int, more: int) -> int:
        """Pages of a row at most: what is kept, and `more` tokens of every head behind it.

        Every layer begins with a page of its own.
        """
        slots = entries + self._heads * more
        if self.recompress is not None:
            slots = self.most
        return slots // self.page + self.shape.num_layers

    def forked_pages(self, more: int) -> int:
        """Pages at most that a row has of its own, which shares a context's entries."""
        each = self.shape.num_kv_heads * more + self.page - 1
        return self.shape.num_layers * (each // self.page + 1)

    @property
    def widest(self) -> int:
        """Pages of a layer at most, of any request."""
        kv_heads, windows = self.shape.num_kv_heads, self.shape.sliding_windows
        if (rule := self.recompress) is not None:
            sizes = [widest_layer(c, t, rule, windows, kv_heads) for t, c in self.variants()]
            return -(-max(sizes) // self.page)
        most = 0
        for bucket, config in self.variants():
            for index in range(len(windows)):
                if config.keeps_all(bucket):
                    most = max(most, bucket)
                else:
                    most = max(most, layer_capacity(config, bucket, index, windows))
        slots = kv_heads * (most + self.growth(self.max_new_tokens))
        if self.question_buckets:
            slots = kv_heads * (most + self.question_buckets[-1] + self.max_new_tokens)
        return -(-slots // self.page)

    @property
    def largest_row(self) -> int:
        """Pages of a row at most, of any request that has no context."""
        more, found = self.growth(self.max_new_tokens), 0
        for bucket, config in self.variants():
            windows, kv_heads = self.shape.sliding_windows, self.shape.num_kv_heads
            entries = most_kept(config, bucket, bucket, windows, kv_heads)
            found = max(found, self.pages(entries, more))
        if self.question_buckets:
            found += self.forked_pages(self.question_buckets[-1] + self.max_new_tokens)
        return found


def tail_slots(slots: int | None, steps: int, recompress: Recompress | None) -> int:
    """Slots of a row's tail, which whole dispatches of so many steps fill.

    Raises:
      ValueError: no multiple of the steps, or a rule that no server has.
    """
    if recompress is not None:
        if recompress.budget is None:
            raise ValueError("recompress.budget=None, expected a number of entries a head")
        if recompress.every % steps or slots not in (None, recompress.every):
            raise ValueError(
                f"recompress.every={recompress.every}, expected a multiple of decode_steps={steps}"
                " and no other tail_slots"
            )
        return recompress.every
    found = -(-TAIL // steps) * steps if slots is None else slots
    if found < steps or found % steps:
        raise ValueError(f"tail_slots={found!r}, expected a multiple of decode_steps={steps}")
    return found


def named_methods(
    methods: Method | Mapping[str, Method],
    budget: int | float | None,
    tokenizer: Any,
    vocab_size: int,
    recompress: Recompress | None = None,
) -> dict[str, CompressionConfig]:
    """Configs by name, as a server runs them: packed, and without a ratio that answers keep.

    Arguments as of `Engine`.
    """
    sums = recompress is not None and recompress.sums
    if isinstance(methods, Mapping):
        given = dict(methods)
    else:
        given = {methods if isinstance(methods, str) else methods.method: methods}
    if not given:
        raise ValueError("methods={}, expected at least one")
    found = {}
    for name, method in given.items():
        config = parse_method(method, budget) if isinstance(method, str) else method
        check_config(config)
        config = instructed(config, tokenizer, vocab_size)
        if config.compresses:
            config = dataclasses.replace(config, layout="packed")
        found[name] = dataclasses.replace(config, keep_ratio=False, sums=sums)
    return found


def _bucket(buckets: Sequence[int], length: int, what: str) -> int:
    found = next((bucket for bucket in buckets if bucket >= length), None)
    if found is None:
        most = buckets[-1] if buckets else 0
        raise ValueError(f"{what} of {length} tokens, expected at most {most}")
    return found


def _canonical(config: CompressionConfig, bucket: int) -> CompressionConfig:
    """The config; where it leaves a prompt alone, the one that all such share."""
    if config.keeps_all(bucket) and not config.quantizes:
        return dataclasses.replace(FULL, sums=config.sums)
    return config


def _below(config: CompressionConfig, bucket: int) -> CompressionConfig | None:
    """What reads a bucket that the config keeps whole, where a request keeps less of it."""
    if not isinstance(config.budget, int) or config.profile is not None:
        return None
    if not config.keeps_all(bucket) or bucket < 3:
        return None
    try:
        return dataclasses.replace(config, budget=bucket - 1)
    except ConfigError:  # its window needs a larger budget
        return None


def _reduced(
    config: CompressionConfig, name: str, length: int, budget: int | float
) -> tuple[CompressionConfig, int]:
    """The config with a request's budget, and that budget in entries a head."""
    if not config.compresses or config.profile is not None:
        raise ValueError(f"budget={budget!r} with method {name!r}, expected None")
    asked = dataclasses.replace(config, budget=budget)
    have, wanted = largest(config, length).base, largest(asked, length).base
    if wanted > have:
        raise ValueError(
            f"budget={budget!r} is {wanted} entries a head of {length} tokens, expected at most"
            f" the {have} of method {name!r}"
        )
    return asked, wanted
