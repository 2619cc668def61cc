"""Turn a measurement of a server into two tables, a picture and a JSON object."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.bench.load import load_of, text_ids
from kvjax.bench.report import Columns, machine, markdown
from kvjax.bench.serve import Settings, measure
from kvjax.inputs.tokenizer import load_tokenizer
from kvjax.models.checkpoints.gguf import load_gguf_tokenizer
from kvjax.models.checkpoints.gguf_file import is_gguf
from kvjax.models.checkpoints.hub import local_folder
from kvjax.models.presets import PRESETS, model_config, model_of


def run(settings: Settings, *, text: Path | None, saved: Path | None, out: Path | None) -> None:
    """Measure, print tables and the JSON object, and write both and a picture to `out`.

    Args:
      settings: what to measure.
      text: prompts are cut from it; None for random token ids.
      saved: a file for the ids of the prompts, or None.
      out: a folder, or None.

    Raises:
      ValueError: prompts beyond the model's context, a text that is too short, too little memory.
    """
    from kvjax import figures

    longest = max(settings.lengths) + settings.new_tokens
    config = model_config(settings.model, longest)
    if longest > config.context:
        raise ValueError(
            f"prompts of {max(settings.lengths)} tokens with answers of {settings.new_tokens},"
            f" expected at most the {config.context} of the model's context"
        )
    ids = None if text is None else text_ids(text, _tokenizer(settings.model))
    load = load_of(
        ids, config.vocab_size, count=settings.requests, lengths=settings.lengths,
        new_tokens=settings.new_tokens, rate=settings.rate, seed=settings.seed,
    )  # fmt: skip
    if saved is not None:
        saved.parent.mkdir(parents=True, exist_ok=True)
        saved.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in load.prompts))
    rows = measure(model_of(settings.model, config), settings, load)
    facts = dataclasses.asdict(settings) | {"text": text is not None}
    report: dict[str, Any] = {
        "benchmark": "serve",
        "machine": machine(),
        "settings": facts,
        "rows": rows,
    }
    print(tables(report))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        kind = "all" if settings.rate is None else f"{settings.rate:g}"
        lengths = "+".join(map(str, settings.lengths))
        name = f"{Path(settings.model).stem}_{lengths}_{settings.new_tokens}_{kind}"
        stem = f"bench_serve_{report['machine']['backend']}_{name}"
        (out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
        if figures.available():
            print(figures.served(out / f"{stem}.png", report), file=sys.stderr)
    print(json.dumps(report))


def _tokenizer(name: str) -> Any:
    """A checkpoint's; None of a preset."""
    if name in PRESETS:
        return None
    folder = local_folder(name, progress=False)
    return load_gguf_tokenizer(folder) if is_gguf(folder) else load_tokenizer(folder)


# ---------------------------------------------------------------------------- tables
def _ms(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[name] * 1e3:.0f}"


_THROUGHPUT: Columns = (
    ("method", lambda row: row["method"]),
    ("T", lambda row: "all" if row["kept"] is None else str(row["kept"])),
    ("rows", lambda row: str(row["most_rows"])),
    ("prompt + output tokens", lambda row: f"{row['prompt_tokens']:,} + {row['output_tokens']:,}"),
    ("prefill, s", lambda row: f"{row['prefill_seconds']:.1f}"),
    ("decode, s", lambda row: f"{row['decode_seconds']:.1f}"),
    ("output/s of decode time", lambda row: f"{row['output_per_decode_second']:.1f}"),
    ("bound", lambda row: f"{row['decode_bound']:.1f}"),
    ("/ first", lambda row: _times(row, "decode_of_first")),
    ("output/s", lambda row: f"{row['output_per_second']:.1f}"),
    ("bound", lambda row: f"{row['whole_bound']:.1f}"),
    ("/ first", lambda row: _times(row, "whole_of_first")),
    ("of bound", lambda row: f"{row['of_whole_bound'] or 0:.0%}"),
)
_LATENCY: Columns = (
    ("method", lambda row: row["method"]),
    ("requests/s", lambda row: f"{row['requests_per_second']:.2f}"),
    ("TTFT p50, s", lambda row: f"{row['ttft_p50']:.2f}"),
    ("p99", lambda row: f"{row['ttft_p99']:.2f}"),
    ("inter-token p50, ms", _ms("inter_token_p50")),
    ("p99", _ms("inter_token_p99")),
    ("wait for the next piece p50, ms", _ms("wait_p50")),
    ("p99", _ms("wait_p99")),
    ("most", _ms("wait_most")),
)


def _times(row: dict[str, Any], name: str) -> str:
    return "" if row[name] is None else f"{row[name]:.2f}x"


def tables(report: dict[str, Any]) -> str:
    """What was drawn in which time, and how long clients waited, as Markdown."""
    rows = report["rows"]
    size = rows[0]["cache_bytes"]
    columns = _THROUGHPUT
    if report["settings"]["rate"] is not None:  # arrivals bound the run, not the arithmetic
        columns = [column for column in _THROUGHPUT if "bound" not in column[0]]
    head = f"{report['machine']['device']}, {size / 1e6:.1f} MB of pages and tails for each method"
    return f"{head}\n\n{markdown(columns, rows)}\n\n{markdown(_LATENCY, rows)}\n"
