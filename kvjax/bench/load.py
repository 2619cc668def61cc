"""Requests to a server as clients make them, and when their tokens came.

All at once, as KV-Compress measures (arXiv 2410.00161, section 4), or one after the other at random
times. Answers do not end before their length.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from kvjax.serve import Engine


@dataclass(frozen=True)
class Load:
    """Prompts and when they come.

    Attributes:
      prompts: token ids.
      arrivals: seconds after the beginning, rising, one a prompt.
      new_tokens: of every answer.
    """

    prompts: tuple[list[int], ...]
    arrivals: tuple[float, ...]
    new_tokens: int


@dataclass(frozen=True)
class Timeline:
    """One answer as its client sees it.

    Attributes:
      arrival: of the request, seconds after the beginning.
      steps: seconds after the beginning and tokens of each piece of the answer.
    """

    arrival: float
    steps: tuple[tuple[float, int], ...]


def load_of(
    ids: Sequence[int] | None,
    vocab_size: int,
    *,
    count: int,
    lengths: Sequence[int],
    new_tokens: int,
    rate: float | None,
    seed: int,
) -> Load:
    """Prompts of these lengths in turn, each another piece of a text.

    Args:
      ids: of the text, or None for random ones.
      vocab_size: of random ones.
      count: prompts.
      lengths: tokens of the first, the second and so on; then from the beginning again.
      new_tokens: of every answer.
      rate: requests a second that come independently of each other (Poisson); None for all at once.
      seed: of random ids and times.

    Raises:
      ValueError: a text of fewer tokens than all prompts have together.
    """
    rng = np.random.default_rng(seed)
    sizes = [lengths[index % len(lengths)] for index in range(count)]
    if ids is None:
        ids = rng.integers(3, vocab_size, sum(sizes)).tolist()
    elif len(ids) < sum(sizes):
        raise ValueError(
            f"the text has {len(ids)} tokens, expected at least {sum(sizes)} for {count} prompts"
        )
    ends = np.cumsum(sizes).tolist()
    prompts = tuple(list(ids[end - size : end]) for end, size in zip(ends, sizes, strict=True))
    waits = np.zeros(count) if rate is None else rng.exponential(1 / rate, count)
    arrivals = np.cumsum(waits) - waits[0]
    return Load(prompts, tuple(arrivals.tolist()), new_tokens)


def text_ids(path: Path, tokenizer: Any) -> list[int]:
    """Token ids of a text file, without special ones."""
    if tokenizer is None:
        raise ValueError(f"--text {path} beside a model without a tokenizer, expected no --text")
    return cast(list[int], tokenizer(path.read_text(), add_special_tokens=False)["input_ids"])


def timelines(engine: Engine, load: Load, finished: Callable[[], Any]) -> list[Timeline]:
    """Make all requests and wait for their answers; `finished` is called after each."""
    return asyncio.run(_all(engine, load, finished))


async def _all(engine: Engine, load: Load, finished: Callable[[], Any]) -> list[Timeline]:
    began = time.perf_counter()
    both = zip(load.prompts, load.arrivals, strict=True)
    asked = [_one(engine, prompt, at, began, load.new_tokens, finished) for prompt, at in both]
    return await asyncio.gather(*asked)


async def _one(
    engine: Engine,
    prompt: list[int],
    arrival: float,
    began: float,
    new_tokens: int,
    finished: Callable[[], Any],
) -> Timeline:
    await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
    answer: Any = engine.submit(prompt, max_new_tokens=new_tokens, ignore_eos=True)
    steps = []
    async with aclosing(answer):
        async for step in answer:
            if step.tokens:
                steps.append((time.perf_counter() - began, len(step.tokens)))
    finished()
    return Timeline(arrival, tuple(steps))


def latencies(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Seconds as clients see them: to the first token, a token, and between two pieces.

    Tokens come in pieces, one a dispatch: `inter_token` divides the time since the piece before by
    its tokens, and counts it for each of them; `wait` is that time itself.
    """
    first = [one.steps[0][0] - one.arrival for one in timelines]
    tokens: list[float] = []
    waits: list[float] = []
    for one in timelines:
        for (before, _), (now, count) in zip(one.steps, one.steps[1:], strict=False):
            tokens += [(now - before) / count] * count
            waits.append(now - before)
    found = {}
    for name, values in (("ttft", first), ("inter_token", tokens), ("wait", waits)):
        for share in (50, 99):
            found[f"{name}_p{share}"] = float(np.percentile(values, share)) if values else 0.0
    return found | {"wait_most": max(waits, default=0.0)}
