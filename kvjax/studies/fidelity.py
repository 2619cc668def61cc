"""Compare with kvpress, an independent implementation, on 200 documents.

    python -m kvjax.studies.fidelity --data ../shared/data -o docs/fidelity_table.md

For each method and budget: the prefix of a document is prefilled and compressed, the rest runs
against the compressed cache at true positions; the difference in NLL to the full cache (nats a
token), how often the likeliest token stays the same, and, where kvpress dumped them, whether the
same positions were kept. Both sides use a window of 8 and average pooling over 5, a floor of 0.2.
About ten minutes on two cores. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import kvjax
from kvjax.models.checkpoints.llama2c import convert_llama2c
from kvjax.studies.continuation import Result, evaluate

BUDGETS = (128, 64, 32, 16)
SETTINGS = {"window": 8, "pooling": "average", "kernel": 5, "floor": 0.2}
# A row of the table: our method, what its settings are beside SETTINGS, and kvpress's method
# where it has one. Under this protocol nothing is evicted after the prefix; PrefixKV's own rule,
# which goes on evicting while the text grows, is a row of its own.
METHODS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "snapkv": ("snapkv", {}, "snapkv"),
    "ada-snapkv": ("ada-snapkv", {}, "adakv_snapkv"),
    "pyramidkv": ("pyramidkv", {}, "pyramidkv_fit"),
    "ada-pyramid": ("ada-pyramid", {}, None),
    "prefixkv": ("prefixkv", {"keep_ratio": False}, None),
    "prefixkv, ratio kept": ("prefixkv", {}, None),
    "ada-prefixkv": ("ada-prefixkv", {}, None),
    "h2o": ("h2o", {}, "h2o_sum"),
    "streaming-llm": ("streaming-llm", {}, "streaming"),
    "random": ("random", {}, "random_w8"),
    "tova": ("tova", {"window": 1}, "tova"),
    "knorm": ("knorm", {"recent": 8}, "knorm_w8"),
    "key-diff": ("key-diff", {"recent": 8}, "keydiff_w8"),
    "expected-attention": ("expected-attention", {"recent": 8}, "expected_w8"),
    "ada-expected-attention": ("ada-expected-attention", {"recent": 1}, "adakv_expected"),
    "chunk-snapkv": ("chunk-snapkv", {"chunk": 8}, "chunkkv_snapkv"),
}
# How far the mean NLL may lie above kvpress's, and whether also below (None: nothing to compare).
LIMITS = {"snapkv": 1e-3, "streaming-llm": 1e-3, "ada-snapkv": 1e-3, "tova": 1e-3}
LIMITS |= dict.fromkeys(
    (
        "h2o",
        "random",
        "knorm",
        "key-diff",
        "expected-attention",
        "ada-expected-attention",
        "chunk-snapkv",
    ),
    3e-3,
)
# kvpress keeps whole chunks, so fewer entries, and under Ada-KV not always the last token.
ONE_SIDED = ("ada-snapkv", "chunk-snapkv", "ada-expected-attention")


def same_positions(mine: list, theirs, name: str, budget: int) -> tuple[int, int] | None:
    """(entries that differ, entries) over the five dumped documents; None where not dumped."""
    differ = total = 0
    for document, scored in enumerate(mine):
        key = f"{name}/{budget}/{document}"
        if key not in theirs:
            return None
        for layer, heads in zip(theirs[key], scored.positions, strict=True):
            for dumped, kept in zip(layer, heads, strict=True):
                dumped = set(dumped[dumped >= 0].tolist())
                differ += len(dumped - set(kept))
                total += len(dumped)
    return differ, total


def table(full: Result, rows: list[dict]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| method | budget | delta NLL | kvpress | agreement | kvpress | positions that differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs = row["kvpress_delta"]
        lines.append(
            f"| {row['method']} | {row['budget']} | {row['delta']:+.4f} | "
            + (f"{theirs:+.4f}" if theirs is not None else "-")
            + f" | {row['agree']:.1%} | "
            + (f"{row['kvpress_agree']:.1%}" if theirs is not None else "-")
            + " | "
            + (f"{row['differ']} of {row['entries']}" if row["entries"] else "-")
            + " |"
        )
    return "\n".join(lines) + f"\n\nFull cache: NLL {full.nll:.5f}.\n"


def violations(full: Result, rows: list[dict], theirs: dict) -> list[str]:
    """What differs from kvpress by more than the limits."""
    found = []
    if abs(full.nll - theirs["full"]["0"]["nll"]) > 1e-4:
        found.append(f"full: {full.nll} against {theirs['full']['0']['nll']}")
    for row in rows:
        if row["method"] in ("snapkv", "streaming-llm") and row["differ"]:
            found.append(f"{row['method']} at {row['budget']}: {row['differ']} other positions")
        limit = LIMITS.get(row["method"])
        if limit is None:
            continue
        gap = row["delta"] - row["kvpress_delta"]
        if gap > limit or (row["method"] not in ONE_SIDED and -gap > limit):
            found.append(f"{row['method']} at {row['budget']}: {gap:+.5f}, limit {limit}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with fidelity/")
    parser.add_argument("--methods", default=";".join(METHODS), help="which rows, apart by ;")
    parser.add_argument("-o", "--output", type=Path, help="Markdown table")
    arguments = parser.parse_args()
    fidelity, stories = arguments.data / "fidelity", arguments.data / "stories260K"
    documents = json.loads((fidelity / "docs_stories260K.json").read_text())
    theirs = json.loads((fidelity / "results_stories260K.json").read_text())["methods"]
    dumped = np.load(fidelity / "kept_stories260K.npz")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        convert_llama2c(stories / "stories260K.bin", stories / "tok512.bin", out)
        model, _ = kvjax.load(out, progress=False)
    scores, full = evaluate(model, documents, kvjax.CompressionConfig.named("full"), None)
    names = arguments.methods.split(";")
    rows = []
    for name in tqdm(names, desc="methods", disable=None):
        method, special, other = METHODS[name]
        for budget in tqdm(BUDGETS, desc=name, leave=False, disable=None):
            config = kvjax.CompressionConfig.named(method, budget, **(SETTINGS | special))
            mine, result = evaluate(model, documents, config, scores)
            found = theirs[other][str(budget)] if other else {}
            differ = same_positions(mine[:5], dumped, other, budget) if other else None
            rows.append(
                {
                    "method": name,
                    "budget": budget,
                    "nll": result.nll,
                    "delta": result.delta,
                    "agree": result.agree,
                    "kept": result.kept,
                    "kvpress_delta": found.get("delta"),
                    "kvpress_agree": found.get("agree"),
                    "differ": differ[0] if differ else 0,
                    "entries": differ[1] if differ else 0,
                }
            )
            tqdm.write(f"{name} {budget}: {result.delta:+.5f} {found.get('delta')}", sys.stderr)
    text = table(full, rows)
    if arguments.output:
        arguments.output.write_text(text)
    failed = violations(full, rows, theirs)
    print(text)
    print(json.dumps({"full_nll": full.nll, "rows": rows, "violations": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
