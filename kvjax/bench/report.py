"""Turn one benchmark's settings into a table, a picture and a JSON object."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from kvjax.bench import budgets, decode, generate, pages, scores
from kvjax.bench.timing import bandwidth
from kvjax.config import CompressionConfig
from kvjax.models.presets import default_dtype, model_config, model_of
from kvjax.spelling import parse_method, spelled

KINDS = ("decode", "scores", "generate", "budgets", "pages")
# What flags come to that are not given: a small model whole, or a large one's scores alone.
_WHOLE = {"model": "100m", "batch": "1,4", "prompt": 2048, "budget": 256}
_ALONE = {"model": "llama-3-8b", "batch": "1", "prompt": 131_072, "budget": 1024}
DEFAULTS = {kind: _ALONE if kind == "budgets" else _WHOLE for kind in KINDS}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
      model: a key of `presets.PRESETS`, or a checkpoint's directory, GGUF file or name on the hub.
      batches: rows, one run for each.
      prompt, new: tokens.
      budget: entries a KV head.
      methods: such as "snapkv" or "ada-snapkv/packed/int8" (`kvjax.spelling`).
      owners: of synthetic pools, one of `decode.OWNERS`.
      repeats: timed runs of each program.
    """

    model: str
    batches: tuple[int, ...]
    prompt: int
    new: int
    budget: int
    methods: tuple[str, ...]
    owners: str = "even"
    repeats: int = 5

    def configs(self) -> list[CompressionConfig]:
        """`full`, then the methods."""
        names = ("full", *self.methods)
        return [parse_method(name, None if name == "full" else self.budget) for name in names]


def measure(kind: str, settings: Settings) -> dict[str, Any]:
    """Run a benchmark: the machine, the settings, and a list of rows."""
    configs = settings.configs()
    config = model_config(settings.model, settings.prompt + settings.new)
    dtype = default_dtype()
    facts = machine() | {"bandwidth": bandwidth(settings.repeats)}
    rows: list[dict[str, Any]] = []
    call: dict[str, Any] = {"prompt": settings.prompt, "repeats": settings.repeats}
    if kind == "scores":
        for batch in tqdm(settings.batches, desc=kind, disable=None):
            found = scores.measure(config, configs[1:], batch=batch, dtype=dtype, **call)
            rows += [{"batch": batch} | row for row in found]
    elif kind == "budgets":
        for batch in tqdm(settings.batches, desc=kind, disable=None):
            found = budgets.measure(config, budget=settings.budget, batch=batch, **call)
            rows += [{"batch": batch} | row for row in found]
        facts["peak_rss"] = budgets.peak_rss()
    else:
        model = model_of(settings.model, config)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        facts["weights"] = weights
        for batch in settings.batches:
            for one in tqdm(configs, desc=f"{kind}, batch {batch}", disable=None):
                if kind == "generate":
                    rows += generate.measure(model, [one], batch=batch, new=settings.new, **call)
                elif kind == "pages":
                    shape = {"new": settings.new, "dtype": dtype, "owners": settings.owners}
                    rows.append(pages.measure(model, one, batch=batch, **shape, **call))
                else:
                    rows.append(decode_row(model, one, batch, settings, dtype))
        add_limits(rows, weights, max(facts["bandwidth"].values()))
    asked = dataclasses.asdict(settings)
    return {"benchmark": kind, "machine": facts, "settings": asked, "rows": rows}


def machine() -> dict[str, Any]:
    """What runs here."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
    }


def decode_row(
    model: Any, config: CompressionConfig, batch: int, settings: Settings, dtype: Any
) -> dict[str, Any]:
    """A decode step, and attention alone, on a cache that nothing was prefilled for."""
    cache = decode.synthetic_cache(
        model.config,
        config,
        batch=batch,
        prompt=settings.prompt,
        new=settings.new,
        dtype=dtype,
        owners=settings.owners,
    )
    attention = decode.attention(model.config, cache, settings.repeats, dtype)
    step = decode.decode_step(model, cache, settings.new, settings.repeats)
    held = decode.held_bytes(cache)
    return {
        "method": spelled(config),
        "batch": batch,
        "step": step.median,
        "step_least": step.least,
        "attention": attention.median,
        "attention_rate": held / attention.median,
        "cache_bytes": cache.nbytes,
        "held_bytes": held,
    }


def add_limits(rows: list[dict[str, Any]], weights: int, rate: float) -> None:
    """What the bytes allow, and how much of it was reached."""
    full: dict[int, float] = {}
    for row in rows:
        row["limit"] = (weights + row["held_bytes"]) / rate
        row["of_limit"] = row["limit"] / row["step"]
        full.setdefault(row["batch"], row["step"])
        row["of_full"] = row["step"] / full[row["batch"]]


# ---------------------------------------------------------------------------- table
Columns = Sequence[tuple[str, Callable[[dict[str, Any]], str]]]
_STEP: Columns = (
    ("step, ms", lambda row: f"{row['step'] * 1e3:.2f}"),
    ("/ full", lambda row: f"{row['of_full']:.2f}"),
    ("limit, ms", lambda row: f"{row['limit'] * 1e3:.2f}"),
    ("of limit", lambda row: f"{row['of_limit']:.0%}"),
    ("cache, MB", lambda row: f"{row['cache_bytes'] / 1e6:.1f}"),
)
_COLUMNS: dict[str, Columns] = {
    "decode": (
        ("batch", lambda row: str(row["batch"])),
        ("method", lambda row: row["method"]),
        *_STEP,
        ("attention, ms", lambda row: f"{row['attention'] * 1e3:.2f}"),
        ("attention, GB/s", lambda row: f"{row['attention_rate'] / 1e9:.1f}"),
    ),
    "generate": (
        ("batch", lambda row: str(row["batch"])),
        ("method", lambda row: row["method"]),
        ("prefill, s", lambda row: f"{row['prefill']:.3f}"),
        (
            "with compression",
            lambda row: f"{row['prefill_and_compress'] / row['prefill']:.3f}",
        ),
        *_STEP,
        ("tokens/s", lambda row: f"{row['tokens_per_second']:.1f}"),
    ),
    "pages": (
        ("batch", lambda row: str(row["batch"])),
        ("method", lambda row: row["method"]),
        ("through pages, ms", lambda row: f"{row['step'] * 1e3:.2f}"),
        ("contiguous, ms", lambda row: f"{row['contiguous'] * 1e3:.2f}"),
        ("/ contiguous", lambda row: f"{row['of_contiguous']:.2f}"),
        ("limit, ms", lambda row: f"{row['limit'] * 1e3:.2f}"),
        ("held, MB", lambda row: f"{row['held_bytes'] / 1e6:.1f}"),
    ),
    "scores": (
        ("batch", lambda row: str(row["batch"])),
        ("one layer", lambda row: row["what"]),
        ("ms", lambda row: f"{row['seconds'] * 1e3:.2f}"),
        ("of attention", lambda row: f"{row['of_attention']:.1%}"),
        ("GB/s", lambda row: f"{row['rate'] / 1e9:.1f}"),
    ),
    "budgets": (
        ("batch", lambda row: str(row["batch"])),
        ("shared out by", lambda row: row["what"]),
        ("ms, all layers", lambda row: f"{row['total'] * 1e3:.2f}"),
        ("ms a layer", lambda row: f"{row['seconds'] * 1e3:.3f}"),
        ("temporaries, MB", lambda row: f"{row['temporaries'] / 1e6:.1f}"),
        ("results, MB", lambda row: f"{row['results'] / 1e6:.3f}"),
        ("entries", lambda row: str(row["entries"])),
    ),
}


def table(report: dict[str, Any]) -> str:
    """The rows as Markdown."""
    return markdown(_COLUMNS[report["benchmark"]], report["rows"])


def markdown(columns: Columns, rows: Sequence[dict[str, Any]]) -> str:
    """These columns of the rows."""
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(kind: str, settings: Settings, out: Path | None) -> None:
    """Measure, print the table and the JSON object, and write both and a picture to `out`."""
    from kvjax import figures

    report = measure(kind, settings)
    rates = {name: f"{rate / 1e9:.1f}" for name, rate in report["machine"]["bandwidth"].items()}
    print(f"{report['machine']['device']}: copy {rates['copy']} GB/s, read {rates['read']} GB/s\n")
    print(table(report))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        stem = f"bench_{kind}_{report['machine']['backend']}_{Path(settings.model).name}"
        (out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
        if figures.available():
            print(figures.bench(out / f"{stem}.png", report), file=sys.stderr)
    print(json.dumps(report))
