"""How many requests a server answers at once on one device, full and compressed.

What is left of its memory beside weights, what reading one prompt takes, and what a decode step
needs on the way is divided into tails and pages, as `kvjax.serve` divides it. Bytes of weights,
tails and pages follow from shapes. Reading is an estimate, with an allowance for compilers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvjax.cache.slots import page_size
from kvjax.config import CompressionConfig, Recompress
from kvjax.inputs.prompts import bucket
from kvjax.kernels.platform import assume
from kvjax.models.config import ModelConfig
from kvjax.plan.held import held, prefill_estimate
from kvjax.plan.program import DTYPE, Ask
from kvjax.plan.topology import Topology
from kvjax.serve.fit import request_bytes
from kvjax.serve.menu import Menu, named_methods, tail_slots

# Of the estimate of one prefill: more than any row of docs/plan.md needs, as compiled (4.4 times).
ALLOWANCE = 4.5
_STEPS = 8  # of a dispatch
_LOGITS = 3 * 4  # bytes of a row's fp32 logits, their log-probabilities and one copy, a token


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Requests to a server: all with prompts of one length, and answers of one length.

    Attributes:
      name: the model's.
      model: its architecture.
      chip: one device.
      prompt, new_tokens: tokens.
      compression: what is kept of a prompt.
      recompress: how answers are compressed while they are drawn; None keeps them whole.
    """

    name: str
    model: ModelConfig
    chip: Topology
    prompt: int
    new_tokens: int
    compression: CompressionConfig
    recompress: Recompress | None = None


@dataclass(frozen=True)
class Fit:
    """Bytes of a device, and how many requests it holds.

    Attributes:
      serving: what was asked.
      weights: exactly.
      reading: one prompt: an estimate, and what is kept of it before it is admitted.
      request: pages and tail of a request, exactly as they are promised.
      beside: of a request: its tables, and logits of a decode step.
      rows: requests at once.
    """

    serving: Serving
    weights: int
    reading: int
    request: int
    beside: int
    rows: int


def fit(serving: Serving) -> Fit:
    """Divide the memory of a device.

    Raises:
      ValueError: a method or rule that no server has.
    """
    model, chip, rule = serving.model, serving.chip, serving.recompress
    ask = Ask(
        name=serving.name, model=model, topology=chip, data=1, parts=1, batch=1,
        prompt=serving.prompt, new_tokens=serving.new_tokens, compression=serving.compression,
    )  # fmt: skip
    with assume(chip.platform):
        page = page_size()
        menu = Menu(
            shape=model,
            methods=named_methods(serving.compression, None, None, model.vocab_size),
            buckets=(bucket(serving.prompt),),
            question_buckets=(),
            max_new_tokens=serving.new_tokens,
            tail_slots=tail_slots(None, _STEPS, rule),
            recompress=rule,
            page=page,
        )
        request = request_bytes(menu, serving.prompt, serving.new_tokens, DTYPE.itemsize)
        width = menu.widest
    parts = held(ask)
    reading = int(ALLOWANCE * prefill_estimate(ask)) + parts.pool
    book = 4 * model.num_layers * (width + model.num_kv_heads + 2)
    beside = book + _LOGITS * model.vocab_size
    room = chip.room - parts.weights - reading
    return Fit(serving, parts.weights, reading, request, beside, max(0, room // (request + beside)))


def table(fits: Sequence[Fit]) -> str:
    """A line for each device and method, a column for each length of prompts, as Markdown."""
    prompts = sorted({one.serving.prompt for one in fits})
    titles = [
        "model",
        "device",
        "GB",
        "kept",
        "answers",
        "MB a request",
        *map("{:,}".format, prompts),
    ]
    lines = [titles, ["---"] * len(titles)]
    groups: dict[tuple[str, ...], dict[int, Fit]] = {}
    for one in fits:
        serving = one.serving
        budget = serving.compression.budget
        kept = "full" if budget is None else f"{serving.compression.method} {budget}"
        rule = serving.recompress
        answers = "whole" if rule is None else f"compressed every {rule.every}"
        key = serving.name, serving.chip.name, str(serving.chip.memory), kept, answers
        groups.setdefault(key, {})[serving.prompt] = one
    for name, found in groups.items():
        sizes = [round(found[prompt].request / 1e6) for prompt in prompts]
        least, most = min(sizes), max(sizes)
        size = f"{least}" if least == most else f"{least} to {most}"
        lines.append([*name, size, *(str(found[prompt].rows) for prompt in prompts)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_json(one: Fit) -> dict[str, Any]:
    """A fit with plain values."""
    serving, rule = one.serving, one.serving.recompress
    return {
        "model": serving.name,
        "device": serving.chip.name,
        "room": serving.chip.room,
        "method": serving.compression.method,
        "budget": serving.compression.budget,
        "recompress_every": None if rule is None else rule.every,
        "prompt": serving.prompt,
        "new_tokens": serving.new_tokens,
        "weights": one.weights,
        "reading": one.reading,
        "request": one.request,
        "beside": one.beside,
        "rows": one.rows,
    }
