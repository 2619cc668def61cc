"""Measure speed, beside the copy bandwidth of the same process.

B batch, T prompt tokens.
"""

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from kvjax.bench import generate, report, scores, timing
from kvjax.bench.check.part import Failed
from kvjax.models.decoder import Decoder
from kvjax.models.presets import default_dtype, preset, random_model

PEER = Path(__file__).parents[3] / "tests" / "fixtures" / "peer_torch.py"
METHODS = ("ada-snapkv/packed", "snapkv/packed", "full")


@dataclass(frozen=True)
class Load:
    """What is measured.

    Attributes:
      model: a preset.
      batch, prompt: of the decode steps.
      budget: entries a KV head.
      long: tokens of the one prompt that is prefilled.
      new: tokens of an answer.
      repeats: timed runs.
    """

    model: str
    batch: int
    prompt: int
    budget: int
    long: int
    new: int = 64
    repeats: int = 3


# By the bytes of memory that a device has at least.
LOADS = {
    100e9: Load("llama-3-8b", batch=16, prompt=37_888, budget=1024, long=32_768),
    12e9: Load("llama-3-1b", batch=8, prompt=8192, budget=512, long=8192),
    0: Load("1m", batch=2, prompt=256, budget=64, long=256, new=8, repeats=1),
}
SMALL = LOADS[0]


def load_of(small: bool) -> Load:
    """The small load, or the largest that this device holds."""
    stats = None if small else jax.devices()[0].memory_stats()
    held = (stats or {}).get("bytes_limit", 0)
    return next(load for least, load in LOADS.items() if held >= least)


@functools.lru_cache(maxsize=1)
def model_of(load: Load) -> Decoder:
    """Random weights, which the parts of one process share."""
    return random_model(preset(load.model, max(load.prompt, load.long) + load.new))


@functools.lru_cache(maxsize=1)
def rates() -> dict[str, float]:
    """Bytes a second that this process has measured: "copy" and "read"."""
    return timing.bandwidth()


def copy(small: bool = False) -> dict[str, Any]:
    """The bandwidth alone."""
    del small  # the same bytes on any device
    found = rates()
    shown = f"copy {found['copy'] / 1e9:.0f} GB/s, read {found['read'] / 1e9:.0f} GB/s"
    return found | {"shown": shown}


def decode(method: str, owners: str = "even", small: bool = False) -> dict[str, Any]:
    """A decode step of a whole model, and its attention alone, on a cache of random entries."""
    return decode_at(load_of(small), method, owners)


def decode_at(load: Load, method: str, owners: str = "even") -> dict[str, Any]:
    """`decode` of a given load."""
    settings = _settings(load, method, load.batch, load.prompt, owners)
    model = model_of(load)
    config = settings.configs()[-1]
    row = report.decode_row(model, config, load.batch, settings, default_dtype())
    _limited(row, model)
    row["of_copy"] = row["attention_rate"] / rates()["copy"]
    shown = (
        f"{_told(load.model, load.batch, load.prompt)}: step {row['step'] * 1e3:.2f} ms"
        f" ({row['of_limit']:.0%} of limit), attention {row['attention'] * 1e3:.2f} ms,"
        f" {row['attention_rate'] / 1e9:.0f} GB/s ({row['of_copy']:.0%} of copy)"
    )
    return _with_rates(row, shown)


def score(small: bool = False) -> dict[str, Any]:
    """What compression adds to a layer of a prefill."""
    return score_at(load_of(small))


def score_at(load: Load) -> dict[str, Any]:
    """`score` at a given load."""
    settings = _settings(load, "ada-snapkv/packed", 1, load.long)
    rows = scores.measure(
        preset(load.model, load.long),
        settings.configs()[1:],
        batch=1,
        prompt=load.long,
        dtype=default_dtype(),
        repeats=load.repeats,
    )
    for row in rows:
        row["of_copy"] = row["rate"] / rates()["copy"]
    told = ", ".join(
        f"{row['what']} {row['seconds'] * 1e3:.2f} ms ({row['of_attention']:.1%} of attention,"
        f" {row['of_copy']:.0%} of copy)"
        for row in rows
    )
    return _with_rates({"rows": rows}, f"{_told(load.model, 1, load.long)}, one layer: {told}")


def whole(method: str, small: bool = False) -> dict[str, Any]:
    """Prefill, with compression, and decode steps of one prompt."""
    return whole_at(load_of(small), method)


def whole_at(load: Load, method: str) -> dict[str, Any]:
    """`whole` at a given load."""
    model = model_of(load)
    config = _settings(load, method, 1, load.long).configs()[-1]
    call = {"batch": 1, "prompt": load.long, "new": load.new, "repeats": load.repeats}
    row = generate.measure(model, [config], **call)[0]
    _limited(row, model)
    shown = (
        f"{_told(load.model, 1, load.long)}: prefill {row['prefill']:.3f} s, with compression"
        f" x {row['prefill_and_compress'] / row['prefill']:.3f}, step {row['step'] * 1e3:.2f} ms"
        f" ({row['of_limit']:.0%} of limit), {row['tokens_per_second']:.1f} tokens/s"
    )
    return _with_rates(row, shown)


def peer(small: bool = False) -> dict[str, Any]:
    """The same prompt under transformers on torch, and under kvpress where it is there."""
    load = load_of(small)
    device = "cpu" if small else "cuda"
    command = [sys.executable, str(PEER), "--model", load.model, "--device", device]
    sizes = {"--batch": 1, "--prompt": load.long, "--budget": load.budget, "--new": load.new}
    command += [str(word) for pair in sizes.items() for word in pair]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Failed(f"{PEER.name}: {lines[-1][:300]}")
    found = json.loads(done.stdout.splitlines()[-1])
    told = ", ".join(
        f"{row['name']} prefill {row['prefill']:.3f} s, step {row['step'] * 1e3:.2f} ms"
        for row in found["results"]
    )
    return found | {"shown": f"{_told(load.model, 1, load.long)}, torch {found['torch']}: {told}"}


def _settings(load: Load, method: str, batch: int, prompt: int, owners: str = "even"):
    return report.Settings(
        model=load.model,
        batches=(batch,),
        prompt=prompt,
        new=load.new,
        budget=load.budget,
        methods=(method,),
        owners=owners,
        repeats=load.repeats,
    )


def _told(model: str, batch: int, prompt: int) -> str:
    return f"{model}, {batch} x {prompt:,}"


def _limited(row: dict[str, Any], model: Decoder):
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    report.add_limits([row], weights, max(rates().values()))
    del row["of_full"]  # of one method alone


def _with_rates(found: dict[str, Any], shown: str) -> dict[str, Any]:
    return found | {"bandwidth": rates(), "shown": shown}
