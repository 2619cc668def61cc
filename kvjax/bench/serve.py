"""Measure a server: tokens a second from one amount of cache memory, by method.

Every method gets the same bytes, tails counted, as many rows as then fit at once, and the same
prompts. Reading prompts costs every method the same, so it is told apart: the engine's own clock
says when each dispatch was done.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from kvjax.bench.load import Load, latencies, timelines
from kvjax.config import Recompress
from kvjax.models.decoder import Decoder
from kvjax.serve import Engine
from kvjax.serve.clock import Decoding, Spent
from kvjax.serve.device import page_of
from kvjax.serve.fit import request_bytes
from kvjax.serve.menu import Menu, named_methods, tail_slots

# Tokens of an answer that stay in the tail, where nothing else is asked for.
LONGEST_TAIL = 128
# Dispatches of nearly all rows stand for those of all.
_NEARLY = 0.9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server is measured with.

    Attributes:
      model: as it was named.
      methods: the first is what the others are compared with.
      budget: entries a head that all but `full` keep (T).
      requests: prompts in all.
      lengths: tokens of prompts, in turn.
      new_tokens: of an answer.
      cache_bytes: of pages and tails; None for what `full_rows` take.
      full_rows: whole caches of the longest prompt and its answer that the memory holds.
      rate: requests a second, at random times; None for all at once.
      decode_steps: tokens of every row between two looks of the host.
      reads: prompts between two dispatches at most.
      tail: slots of it; None for the whole answer, or 32 where it is longer than 128.
      recompress_every: tokens after which an answer is compressed again to the budget, or None.
      seed: of random prompts and times.
    """

    model: str
    methods: tuple[str, ...]
    budget: int
    requests: int
    lengths: tuple[int, ...]
    new_tokens: int
    cache_bytes: int | None = None
    full_rows: int = 4
    rate: float | None = None
    decode_steps: int = 8
    reads: int = 1
    tail: int | None = None
    recompress_every: int | None = None
    seed: int = 0

    def recompress(self, method: str) -> Recompress | None:
        """How a method's answers are compressed; those of `full` never are."""
        if self.recompress_every is None or method == "full":
            return None
        return Recompress(every=self.recompress_every, budget=self.budget)

    def menu(self, model: Decoder, method: str) -> Menu:
        """What the engine of one method offers.

        Raises:
          ValueError: a method, tail or rule that there is not.
        """
        tail, rule = self.tail, self.recompress(method)
        fed = self.new_tokens - 1
        if tail is None and rule is None and fed <= LONGEST_TAIL:
            tail = max(1, -(-fed // self.decode_steps)) * self.decode_steps
        budget = None if method == "full" else self.budget
        return Menu(
            shape=model.config,
            methods=named_methods(method, budget, None, model.config.vocab_size),
            buckets=tuple(sorted(set(self.lengths))),
            question_buckets=(),
            max_new_tokens=self.new_tokens,
            tail_slots=tail_slots(None if rule else tail, self.decode_steps, rule),
            recompress=rule,
            page=page_of(model),
        )


@dataclass(frozen=True)
class Share:
    """What one method gets of the memory: rows, and bytes of its largest request."""

    rows: int
    request_bytes: int


def memory(model: Decoder, settings: Settings) -> int:
    """Bytes of pages and tails: as given, or those of so many whole caches."""
    if settings.cache_bytes is not None:
        return settings.cache_bytes
    menu = settings.menu(model, "full")
    longest, itemsize = max(settings.lengths), _itemsize(model)
    return settings.full_rows * request_bytes(menu, longest, settings.new_tokens, itemsize)


def share(model: Decoder, settings: Settings, method: str, size: int) -> Share:
    """Rows that fit at once, of requests as they come on average.

    Raises:
      ValueError: memory that does not hold the longest request.
    """
    menu, itemsize = settings.menu(model, method), _itemsize(model)
    each = [
        request_bytes(menu, length, settings.new_tokens, itemsize) for length in settings.lengths
    ]
    if size < max(each):
        raise ValueError(
            f"cache of {size} bytes with method {method!r}, expected at least the {max(each)} of a"
            f" request of {max(settings.lengths)} tokens with an answer of {settings.new_tokens}"
        )
    rows = min(settings.requests, int(size * len(each) // sum(each)))
    return Share(max(1, rows), max(each))


def _itemsize(model: Decoder) -> int:
    return jnp.dtype(model.embed.table_VD.dtype).itemsize


def measure(model: Decoder, settings: Settings, load: Load) -> list[dict[str, Any]]:
    """One row a method, in order: seconds, tokens, rows, what the arithmetic allows."""
    size = memory(model, settings)
    shares = [share(model, settings, method, size) for method in settings.methods]
    rows = []
    for method, mine in zip(settings.methods, shares, strict=True):
        rows.append(_measured(model, settings, load, method, size, mine))
        add_ratios(rows)
    return rows


def _measured(
    model: Decoder, settings: Settings, load: Load, method: str, size: int, mine: Share
) -> dict[str, Any]:
    menu = settings.menu(model, method)
    with (
        tqdm(total=len(load.prompts), desc=f"serve, {method}", unit="answer", disable=None) as bar,
        Engine(
            model, None, menu.methods, cache_bytes=size, rows=mine.rows, buckets=menu.buckets,
            max_new_tokens=settings.new_tokens, decode_steps=settings.decode_steps,
            tail_slots=menu.tail_slots, recompress=menu.recompress,
            reads=min(settings.reads, mine.rows),
        ) as engine,
    ):  # fmt: skip
        answered = timelines(engine, load, lambda: bar.update(1))
        stats = engine.stats()
    seconds = max(one.steps[-1][0] for one in answered)
    read = sum(map(len, load.prompts))
    tokens = sum(count for one in answered for _, count in one.steps)
    return {
        "method": method,
        "kept": None if method == "full" else settings.budget,
        "cache_bytes": size,
        "request_bytes": mine.request_bytes,
        "tail_slots": menu.tail_slots,
        "rows": mine.rows,
        "requests": len(answered),
        "prompt_tokens": read,
        "output_tokens": tokens,
        "seconds": seconds,
        "evictions": stats.evictions,
        **rates(stats.spent, tokens, seconds),
        "all_per_second": (read + tokens) / seconds,  # as KV-Compress counts
        "requests_per_second": len(answered) / seconds,
        **latencies(answered),
    }


def rates(spent: Spent, tokens: int, seconds: float) -> dict[str, Any]:
    """Tokens a second, and what the arithmetic allows.

    The bound has all rows drawing from the first token to the last: tokens a second of decoding are
    those of the dispatches with (nearly) all rows, and the whole run takes as long as reading all
    prompts and drawing all tokens at that rate. What is missing to it are rows that wait for a
    prompt, and the last answers.
    """
    most = max((one.rows for one in spent.decoding), default=0)
    decoding = sum(one.seconds for one in spent.decoding)
    drawn = sum(one.tokens for one in spent.decoding)
    busy = [one for one in spent.decoding if one.rows >= _NEARLY * most]
    fastest = max(_rate(busy), _rate(spent.decoding))
    ideal = spent.reading + (drawn / fastest if fastest else 0.0)
    return {
        "most_rows": most,
        "prefill_seconds": spent.reading,
        "decode_seconds": decoding,
        "prefill_seconds_a_prompt": spent.reading / max(1, spent.prompts),
        "output_per_second": tokens / seconds,
        "output_per_decode_second": drawn / decoding if decoding else 0.0,
        "decode_bound": fastest,
        "whole_bound": tokens / ideal,
        "by_rows": [dataclasses.asdict(one) for one in spent.decoding],
    }


def _rate(decoding: Sequence[Decoding]) -> float:
    """Tokens a second of these dispatches; 0 where there are none."""
    seconds = sum(one.seconds for one in decoding)
    return sum(one.tokens for one in decoding) / seconds if seconds else 0.0


_RATIOS = {
    "rows_of_first": "most_rows",
    "decode_of_first": "output_per_decode_second",
    "whole_of_first": "output_per_second",
    "decode_bound_of_first": "decode_bound",
    "whole_bound_of_first": "whole_bound",
}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each row beside the first one, and beside its own bound."""
    for row in rows:
        for name, of in _RATIOS.items():
            row[name] = row[of] / rows[0][of] if rows[0][of] else None
        row["of_decode_bound"] = _part(row["output_per_decode_second"], row["decode_bound"])
        row["of_whole_bound"] = _part(row["output_per_second"], row["whole_bound"])


def _part(value: float, bound: float) -> float | None:
    return value / bound if bound else None
