"""One row of the plan: a model on a slice, one method, and the most that fits."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from kvjax.inputs.prompts import bucket
from kvjax.plan import held
from kvjax.plan.limits import Limit, bisected, largest
from kvjax.plan.program import Ask, Compiled

Compiler = Callable[[Ask], Compiled]
Limits = Literal["verified", "fit", "none"]
# Values that limits are looked for in: rows a part of the batch, and tokens of a prompt.
MOST_ROWS, MOST_TOKENS = 4096, 2**20 - 2**16


@dataclass(frozen=True)
class Row:
    """What is known of an `Ask`; bytes are those of one device.

    Attributes:
      compiled: whether a compiler said so; else `temporaries` and `total` are estimates.
      layers: depths that it was asked about, where not about the model's own (`by_depth`).
      held: weights, pool and tail, exactly.
      temporaries: what `generate` needs beside its arguments and results, pool and tail included.
      total: all of it; of what does not fit as the compiler refuses it.
      short: bytes that are missing; 0 where it fits.
      kernels: custom calls in the program.
      collectives: of one decode step: how many, and bytes of their results.
      step: of one decode step, from shapes.
      cost: bytes and flops of one as the compiler counts them, where asked for.
      batch, prompt: the largest that fit, all else being equal; None where not asked for.
      seconds: that lowering and compiling the row's own program took.
    """

    ask: Ask
    compiled: bool
    layers: tuple[int, ...]
    held: held.Held
    temporaries: int
    total: int
    short: int
    kernels: tuple[str, ...]
    collectives: tuple[int, int]
    step: held.Step
    cost: tuple[float, float] | None
    batch: Limit | None
    prompt: Limit | None
    seconds: float

    @property
    def working(self) -> int:
        """Bytes of temporaries beside pool and tail: the prefill's peak."""
        return max(0, self.temporaries - self.held.pool - self.held.tail)


def plan(
    ask: Ask,
    compiler: Compiler | None,
    *,
    limits: Limits = "verified",
    cost: Callable[[Ask], tuple[float, float] | None] | None = None,
) -> Row:
    """Plan one row.

    Args:
      ask: what.
      compiler: `kvjax.plan.program.compiled`, or None for an estimate.
      limits: the largest batch and the longest prompt: "verified" asks the compiler at the answer
        and one above, at most four times each; "fit" takes the row's own compilation and what
        shapes say of the rest; "none" leaves them out.
      cost: `kvjax.plan.program.step_cost`, or None.
    """
    began = time.perf_counter()
    parts = held.held(ask)
    compile_once = cache(compiler) if compiler is not None else None
    found = compile_once(ask) if compile_once is not None else None
    seconds = time.perf_counter() - began
    # Of a refused program nothing is known but the sum.
    temporaries = parts.pool + parts.tail + held.prefill_estimate(ask)
    if found is not None and not found.refused:
        temporaries = found.temporaries
    total, room = held.total_estimate(ask) if found is None else found.total, ask.topology.room
    # A TPU's compiler refuses what does not fit; what it takes fits, whatever the parts sum to.
    whole = found is not None and not (found.refused or found.layers)
    taken = whole and ask.topology.platform == "tpu"
    batch = prompt = None
    if limits != "none":
        needed = min(total, room) if taken else total
        search = partial(_limit, ask, compile_once, needed, verified=limits == "verified")
        batch = search("batch", range(ask.data, MOST_ROWS * ask.data + 1, ask.data))
        prompt = search("prompt", _buckets(ask.prompt))
    step = found.step if found else ()
    return Row(
        ask=ask,
        compiled=found is not None,
        layers=found.layers if found else (),
        held=parts,
        temporaries=temporaries,
        total=total,
        short=0 if taken else max(0, total - room),
        kernels=found.kernels if found else (),
        collectives=(len(step), sum(size for _, size in step)),
        step=held.step(ask),
        cost=cost(ask) if cost is not None and not (found and found.refused) else None,
        batch=batch,
        prompt=prompt,
        seconds=seconds,
    )


def _limit(
    ask: Ask,
    compile_once: Compiler | None,
    total: int,
    name: str,
    values: Sequence[int],
    *,
    verified: bool,
) -> Limit:
    """The largest batch or prompt, with a first guess from shapes and the row's own total."""
    start = ask.batch if name == "batch" else bucket(ask.prompt)
    beside = total - held.total_estimate(ask)  # what the estimate misses here, it misses nearby

    def other(value: int) -> Ask:
        changed: dict[str, Any] = {name: value}
        return dataclasses.replace(ask, **changed)

    guess = bisected(
        lambda value: held.total_estimate(other(value)) + beside, values, ask.topology.room
    )
    if compile_once is None or not verified:
        fits = held.total_estimate(other(guess)) + beside <= ask.topology.room
        return Limit(guess if fits else 0, False, 0)
    return largest(
        lambda value: compile_once(ask if value == start else other(value)).total,
        values,
        ask.topology.room,
        start=start,
        guess=guess,
    )


def _buckets(prompt: int) -> list[int]:
    """Buckets of prompts up to MOST_TOKENS, and this prompt's own."""
    found, size = [], 0
    while size < MOST_TOKENS:
        size = bucket(size + 1)
        found.append(size)
    return found if bucket(prompt) in found else sorted([*found, bucket(prompt)])


def as_json(row: Row) -> dict[str, Any]:
    """The row with plain values: bytes, seconds, names."""
    ask, limits = row.ask, (row.batch, row.prompt)
    batch, prompt = (limit and dataclasses.asdict(limit) for limit in limits)
    return {
        "model": ask.name,
        "topology": ask.topology.name,
        "data": ask.data,
        "parts": ask.parts,
        "method": ask.compression.method,
        "budget": ask.compression.budget,
        "profile": ask.compression.profile is not None,
        "layout": ask.compression.layout,
        "quantize": ask.compression.quantize,
        "batch": ask.batch,
        "prompt": ask.prompt,
        "new_tokens": ask.new_tokens,
        "how": "compiled" if row.compiled else "estimate",
        "layers": list(row.layers) or row.ask.model.num_layers,
        "room": ask.topology.room,
        **dataclasses.asdict(row.held),
        "working": row.working,
        "total": row.total,
        "fits": row.short == 0,
        "short": row.short,
        "largest_batch": batch,
        "longest_prompt": prompt,
        "kernels": list(row.kernels),
        "collectives": {"count": row.collectives[0], "bytes": row.collectives[1]},
        "step": dataclasses.asdict(row.step),
        "step_as_compiled": row.cost and {"bytes": row.cost[0], "flops": row.cost[1]},
        "seconds": round(row.seconds, 1),
    }
