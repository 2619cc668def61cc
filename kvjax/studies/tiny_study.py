"""Measure the bundled model: what it can do, how its heads differ, what each method costs it.

    python -m kvjax.studies.tiny_study [--count 200] [--out docs] [--model DIR] [--data DIR]

Writes tables to `tiny_study.md` and pictures to `images/`: accuracy per task and length with the
full cache; entries that each head needs for 90 % of its attention; every method at 50, 25, 10 and
5 % under both protocols, with bootstrap 95 % intervals; every method against `ada-snapkv` prompt by
prompt; and what they add to the NLL of stories, where the data folder with stories260K is there.
About 40 minutes on two cores. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import kvjax
from kvjax import figures, tiny
from kvjax.studies.dispersion import entries_needed
from kvjax.studies.retrieval import PROTOCOLS, Outcome, ask, interval
from kvjax.studies.tables import differences, mean_interval, paired_markdown, stories
from kvjax.tiny.questions import QUESTIONS, questions

BUDGETS = (0.5, 0.25, 0.1, 0.05)
LENGTHS = (512, 1024)
STUDIED = ("single", "multikey", "multiquery", "tracking")
FULL = kvjax.CompressionConfig.named("full")


def full_accuracy(model, count: int) -> dict[str, dict[int, dict[str, float]]]:
    """Share right by task, length and protocol with the full cache."""
    results: dict[str, dict[int, dict[str, float]]] = {}
    for task in tqdm(QUESTIONS, desc="full cache", disable=None):
        results[task] = {}
        for length in LENGTHS:
            items = questions(task, length, count)
            results[task][length] = {
                protocol: float(ask(model, items, [FULL], protocol)[0].right.mean())
                for protocol in PROTOCOLS
            }
    return results


def methods_table(
    model, task: str, length: int, count: int, protocol: str
) -> dict[str, list[Outcome]]:
    """Every method's outcomes at BUDGETS; the full cache's only one under "full"."""
    names = [name for name in kvjax.METHODS if name != "full"]
    configs = [kvjax.CompressionConfig.named(name, budget) for name in names for budget in BUDGETS]
    items = questions(task, length, count, seed=1)
    full, *outcomes = ask(model, items, [FULL, *configs], protocol)
    width = len(BUDGETS)
    rows = {name: outcomes[i * width : (i + 1) * width] for i, name in enumerate(names)}
    return {"full": [full]} | rows


def markdown(task: str, protocol: str, table: dict[str, list[Outcome]]) -> str:
    """One table: share right with its interval."""
    full = table["full"][0]
    lines = [
        f"### {task}, {PROTOCOLS[protocol]}",
        "",
        f"Full cache: {_cell(full)}, {full.kept.mean():.1f} entries a head.",
        "",
        "| method | " + " | ".join(f"{budget:.0%}" for budget in BUDGETS) + " |",
        "|---" * (len(BUDGETS) + 1) + "|",
    ]
    for name, outcomes in table.items():
        if name != "full":
            lines.append(f"| `{name}` | " + " | ".join(map(_cell, outcomes)) + " |")
    kept = [
        {f"{outcomes[i].kept.mean():.1f}" for name, outcomes in table.items() if name != "full"}
        for i in range(len(BUDGETS))
    ]
    # Equal totals, counted in the caches: one number a column unless a method broke the rule.
    lines.append("| entries a head | " + " | ".join("/".join(sorted(x)) for x in kept) + " |")
    return "\n".join(lines) + "\n"


def _cell(outcome: Outcome) -> str:
    low, high = interval(outcome.right)
    return f"{outcome.right.mean():.1%} [{low:.0%}, {high:.0%}]"


def full_markdown(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Accuracy with the full cache."""
    heads = [f"{length}, {protocol}" for length in LENGTHS for protocol in PROTOCOLS]
    lines = ["| task | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for task, by_length in results.items():
        cells = [f"{by_length[n][p]:.1%}" for n in LENGTHS for p in PROTOCOLS]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compare_methods(
    model, length: int, count: int, images: Path, report: dict[str, Any]
) -> tuple[list[str], str]:
    """Tables of every task and protocol, and the paired comparison; adds to the report."""
    report["methods"], report["paired"] = {}, {}
    bar = tqdm([(p, t) for p in PROTOCOLS for t in STUDIED], desc="methods", disable=None)
    tables: dict[str, dict[str, dict[str, list[Outcome]]]] = {name: {} for name in PROTOCOLS}
    for protocol, task in bar:
        table = tables[protocol][task] = methods_table(model, task, length, count, protocol)
        report["methods"].setdefault(task, {})[protocol] = {
            name: _shares(outcomes).tolist() for name, outcomes in table.items()
        }
    names = ["full", *(name for name in kvjax.METHODS if name != "full")]
    titles = {
        title: {
            name: np.mean([_shares(table[name]) for table in tables[protocol].values()], axis=0)
            for name in names
        }
        for protocol, title in PROTOCOLS.items()
    }
    figures.accuracy(images / "methods.png", titles, [f"{budget:.0%}" for budget in BUDGETS])
    cells = [markdown(t, p, tables[p][t]) for t in STUDIED for p in PROTOCOLS]
    column = BUDGETS.index(0.25)
    for name, gaps in differences(tables["unseen"], column).items():
        report["paired"][name] = [float(gaps.mean()), *mean_interval(gaps)]
    return cells, paired_markdown(tables["unseen"], column, BUDGETS[column])


def _shares(outcomes: list[Outcome]) -> np.ndarray:
    """Share right at each budget; the full cache has one for all."""
    return np.resize([float(outcome.right.mean()) for outcome in outcomes], len(BUDGETS))


def _write(options: argparse.Namespace, sections: list[str]) -> None:
    """What there is so far: the last part takes long, and may fail where the others did not."""
    header = (
        "# The small model, measured\n\n"
        "Written by `python -m kvjax.studies.tiny_study"
        f" --count {options.count} --length {options.length}`. A cell is the share of"
        f" {options.count} prompts that were answered right to the last word, with a bootstrap 95 %"
        " interval.\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tiny_study.md").write_text("\n".join([header, *sections]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=tiny.WEIGHTS, help="a run's model/")
    parser.add_argument("--count", type=int, default=200, help="prompts a cell (200)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the methods' prompts")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="of stories260K")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if not figures.available():
        print("kvjax: the study draws pictures, expected matplotlib (kvjax[plot])", file=sys.stderr)
        return 2
    model, _ = kvjax.load(options.model, progress=False)
    images, sections = options.out / "images", []
    full = full_accuracy(model, options.count)
    sections.append("## Full cache\n\n" + full_markdown(full))
    prompts = [[*item.document, *item.question] for item in questions("multikey", 1024, 16, seed=2)]
    counts = entries_needed(model, prompts)
    figures.dispersion(images / "dispersion.png", counts, 1024)
    report: dict[str, Any] = {"full": full, "entries_for_90": counts.round(2).tolist()}
    cells, pairs = compare_methods(model, options.length, options.count, images, report)
    sections += ["## Against ada-snapkv\n\n" + pairs]
    sections += [f"## Every method, prompts of {options.length} tokens\n", *cells]
    _write(options, sections)
    jax.clear_caches()
    if (options.data / "stories260K").is_dir():
        text, report["stories"] = stories(options.data, BUDGETS)
        _write(options, [*sections, "## Stories\n\n" + text])
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
