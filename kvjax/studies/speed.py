"""Measure how fast a model reads, decodes and is asked: beside tests/fixtures/peer_speed.py.

    python -m kvjax.studies.speed measure --model M --prompt 4096 --out build/speed/ours.jsonl
    python -m kvjax.studies.speed table build/speed/ours.jsonl build/speed/theirs.jsonl

A line of JSON a method: seconds of prefill with compression, of a decode step, and of a question
of 32 tokens up to its first token; the peak of resident memory meanwhile. Each is the best of its
runs, compilation apart. `table` prints Markdown.
"""

import argparse
import contextlib
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import kvjax
from kvjax.bench.decode import decode_step
from kvjax.cache.origin import fingerprint
from kvjax.cache.state import with_room
from kvjax.config import CompressionConfig
from kvjax.generation.programs import prefill_compress_program
from kvjax.generation.sampling import row_keys
from kvjax.inputs.prompts import pad
from kvjax.models.decoder import Decoder
from kvjax.spelling import parse_method

METHODS = "full,snapkv,ada-snapkv,kvzip"
QUESTION, STEPS = 32, 17  # tokens


def measure(
    model: Decoder, config: CompressionConfig, batch: int, prompt: int, repeats: int
) -> dict[str, Any]:
    """Seconds and bytes of one method; random tokens, which cost what others do."""
    rng = np.random.default_rng(0)
    vocabulary = model.config.vocab_size
    rows = rng.integers(3, vocabulary, (batch, prompt)).tolist()
    tokens, lengths = pad(rows)
    arrays = tokens, lengths, row_keys(0, batch), None, None
    read = prefill_compress_program.lower(model, *arrays, config=config).compile()
    asked = rng.integers(3, vocabulary, (batch, QUESTION)).tolist()
    _reset_peak()
    reads: list[float] = []
    asks: list[float] = []
    out = None
    for _ in range(repeats):
        out = None  # two at once may not fit
        began = time.perf_counter()
        out = jax.block_until_ready(read(model, *arrays))
        reads.append(time.perf_counter() - began)
    assert out is not None
    peak, cache = _peak(), out[1].replace(origin=fingerprint(model))
    for _ in range(1 + 3):  # the first one compiles
        began = time.perf_counter()
        kvjax.generate(model, asked, cache=cache, max_new_tokens=1, eos_ids=())
        asks.append(time.perf_counter() - began)
    step = decode_step(model, with_room(cache, STEPS), STEPS, 2)
    return {
        "prefill": min(reads),
        "prefill_worst": max(reads),
        "step": step.least,
        "question": min(asks[1:]),
        "cache_bytes": cache.nbytes,
        "peak_bytes": peak,
    }


def _reset_peak() -> None:
    """Let Linux begin to count the peak anew; elsewhere it is that of the process so far."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free counts no more
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [peak] = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return 1024 * peak


# ---------------------------------------------------------------------------- table
def table(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a cell, ours / theirs of each number; a dash where a peer has none."""
    heads = ["tokens", "batch", "method", "prefill, s", "/ torch", "step, ms", "/ torch"]
    heads += ["question, ms", "/ torch", "peak, GB", "/ torch"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    by_cell = {_cell(row): row for row in theirs}
    for row in sorted(ours, key=lambda row: (row["prompt"], row["batch"])):
        peer = by_cell.get(_cell(row), {})
        cells = [f"{row['prompt']:,}", str(row["batch"]), f"`{row['method']}`"]
        for name, scale, form in (
            ("prefill", 1, ".2f"),
            ("step", 1e3, ".1f"),
            ("question", 1e3, ".0f"),
            ("peak_bytes", 1e-9, ".2f"),
        ):
            cells.append(format(scale * row[name], form))
            cells.append(f"{row[name] / peer[name]:.2f}" if name in peer else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; of a cell that was measured twice the last one."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({_cell(row): row for row in rows}.values())


def _cell(row: dict[str, Any]) -> tuple[int, int, str, int]:
    return row["prompt"], row["batch"], row["method"], row["budget"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("--model", required=True)
    one.add_argument("--prompt", type=int, default=4096)
    one.add_argument("--batch", type=int, default=1)
    one.add_argument("--budget", type=int, default=512)
    one.add_argument("--methods", default=METHODS)
    one.add_argument("--repeats", type=int, default=2)
    one.add_argument("--out", type=Path, required=True)
    two = commands.add_parser("table")
    two.add_argument("ours", type=Path)
    two.add_argument("theirs", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "table":
        print(table(_read(options.ours), _read(options.theirs)))
        return 0
    model, _ = kvjax.load(options.model, progress=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.methods.split(","):
        config = parse_method(name, None if name == "full" else options.budget)
        budget = options.prompt if name == "full" else options.budget
        facts = {"prompt": options.prompt, "batch": options.batch, "method": name, "budget": budget}
        cell = measure(model, config, options.batch, options.prompt, options.repeats)
        with options.out.open("a") as file:
            file.write(json.dumps(facts | cell | {"device": jax.devices()[0].device_kind}) + "\n")
        print(f"{facts} {cell}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
