"""Requests to an engine all at once, each alone, and `kvjax.generate` beside both."""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import kvjax
from kvjax import CompressionConfig
from kvjax.serve import Engine
from kvjax.serve.job import Answer, together

# Tokens at a place that an engine has to tell, so that the margin is known.
LIKELIEST = 2


@dataclass(frozen=True)
class Asked:
    """One request: token ids, how they are read, and how many tokens are drawn."""

    tokens: list[int]
    method: str | None
    new_tokens: int
    seed: int = 0
    context: str | None = None

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of `Engine.submit`."""
        return {
            "prompt": self.tokens, "method": self.method, "max_new_tokens": self.new_tokens,
            "seed": self.seed, "context": self.context, "logprobs": LIKELIEST, "ignore_eos": True,
        }  # fmt: skip


def asked_of(methods: Sequence[str], lengths: Sequence[int], new_tokens: int) -> list[Asked]:
    """A prompt of each length for each method, no two of them alike.

    No token comes twice as long as there are others: keys of one token have one norm, whatever its
    position, and which of them goes by its norm is then decided by how a program rounds.
    """
    rng = np.random.default_rng(len(methods) + sum(lengths))
    found = []
    for seed, (length, method) in enumerate(itertools.product(lengths, methods)):
        rounds = [3 + rng.permutation(77) for _ in range(-(-length // 77))]
        tokens = np.concatenate(rounds)[:length].tolist()
        found.append(Asked(tokens, method, new_tokens, seed))
    return found


def at_once(engine: Engine, requests: Sequence[Asked]) -> list[Answer]:
    """All answers of requests that are all there before the first is answered."""

    async def one(asked: Asked) -> Answer:
        return together([step async for step in engine.submit(**asked.call)])

    async def every() -> list[Answer]:
        return await asyncio.gather(*map(one, requests))

    return asyncio.run(every())


def alone(engine: Engine, requests: Sequence[Asked]) -> list[Answer]:
    """The same, one after another."""
    return [answer for asked in requests for answer in at_once(engine, [asked])]


def generated(
    model: Any, requests: Sequence[Asked], methods: dict[str, CompressionConfig], **call: Any
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of `kvjax.generate`, all prompts of a method together."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, asked in enumerate(requests):
        groups[asked.method, asked.new_tokens].append(place)
    found: dict[int, tuple[list[int], list[float]]] = {}
    for (method, new_tokens), places in groups.items():
        out = kvjax.generate(
            model, [requests[place].tokens for place in places], methods[method],
            seed=[requests[place].seed for place in places],
            max_new_tokens=new_tokens, eos_ids=(), **call,
        )  # fmt: skip
        rows = zip(out.tokens, out.log_probs, strict=True)
        found |= {place: row for place, row in zip(places, rows, strict=True)}
    return [found[place] for place in range(len(requests))]


def agreeing(
    answer: Answer, tokens: Sequence[int], log_probs: Sequence[float], most: int, hair: float
) -> int:
    """Tokens of an answer that are those of `generate`, of the first `most`.

    None is another but where the two likeliest are as likely to within `hair`; what follows is then
    of another text.
    """
    rows = zip(answer.tokens[:most], tokens, log_probs, strict=False)
    for place, (mine, theirs, log_prob) in enumerate(rows):
        if mine != theirs:
            first, second = sorted(answer.top[place].values(), reverse=True)
            assert first - second <= hair, f"token {place} is {mine}, {theirs} of `generate`"
            return place
        np.testing.assert_allclose(answer.log_probs[place], log_prob, atol=10 * hair)
    return most


def swap_often(engine: Engine, monkeypatch: Any, every: int = 3, rows: int = 2) -> None:
    """Every so many rounds take the newest rows out to the host's memory; they come back."""
    loop, rounds = engine._loop, itertools.count(1)
    admit = loop._admit

    def after_swaps() -> Any:
        if next(rounds) % every == 0:
            for job in list(loop._scheduler.running.values())[: -rows - 1 : -1]:
                loop.swap_out(job)
        return admit()

    monkeypatch.setattr(loop, "_admit", after_swaps)
