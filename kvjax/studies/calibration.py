"""Compare layer profiles from one prompt with those from twenty, on the bundled model.

    python -m kvjax.studies.calibration [--count 20] [--length 512] [--out docs]

Prints a table a method (docs/calibration.md), draws `images/profile.png`. Half a minute on two
cores. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kvjax import CompressionConfig, figures, tiny
from kvjax.calibrate import Profile, calibrate
from kvjax.tiny.questions import questions

METHODS = ("prefixkv", "ada-prefixkv")
BUDGETS = (0.5, 0.2)
TASKS = ("multikey", "tracking")


def measure(model, task: str, count: int, length: int) -> dict[tuple[str, float], Profile]:
    """A profile for each method and budget, over documents with their questions."""
    items = questions(task, length, count)
    prompts = [[*item.document, *item.question] for item in items]
    pairs = [(method, budget) for method in METHODS for budget in BUDGETS]
    return {
        (method, budget): calibrate(model, prompts, CompressionConfig.named(method, budget))
        for method, budget in tqdm(pairs, desc=task, disable=None)
    }


def compared(profile: Profile, other: Profile) -> dict[str, list[float]]:
    """Percentages of the prompt, one a layer.

    Returns:
      The first prompt's profile; all prompts' mean; how far the first, and the furthest of all,
      lies from that mean; the standard deviation; the mean of another task's prompts.
    """
    mean_L = np.array(profile.retained)
    away_PL = np.abs(profile.by_prompt - mean_L)
    columns = {
        "one": profile.by_prompt[0],
        "all": mean_L,
        "difference": away_PL[0],
        "furthest": away_PL.max(0),
        "spread": np.array(profile.spread),
        "other task": np.array(other.retained),
    }
    return {name: (100 * values).round(2).tolist() for name, values in columns.items()}


def markdown(title: str, columns: dict[str, list[float]], count: int) -> str:
    """One table: a row a layer, and the largest of each difference."""
    heads = ["1 sample", f"{count} samples", "difference", "furthest sample", "spread"]
    heads.append(f"{count} of `{TASKS[1]}`")
    lines = [f"### {title}", "", "| layer | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for layer, row in enumerate(zip(*columns.values(), strict=True)):
        lines.append(f"| {layer} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    most = {name: f"{max(columns[name]):.2f}" for name in ("difference", "furthest", "spread")}
    lines.append("| largest | " + " | ".join(most.get(name, "") for name in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="prompts (20)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt (512)")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    model, _ = tiny.load()
    own, other = (measure(model, task, options.count, options.length) for task in TASKS)
    report, panels = {}, {}
    for (method, budget), profile in own.items():
        title = f"{method}, {budget:.0%}"
        report[title] = compared(profile, other[method, budget])
        panels[title] = profile
        print(markdown(f"`{method}`, {budget:.0%}", report[title], options.count))
    if figures.available():
        figures.layer_profiles(options.out / "images" / "profile.png", panels)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
