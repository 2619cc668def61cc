"""Tables and the picture of what `make real` measured, from the committed rows alone.

    python -m kvjax.studies.real_report --results docs/real_models -o docs/real_models/tables.md \\
        --picture docs/images/real_models.png

Intervals are bootstrap 95 % intervals over texts or contexts, never over single questions: those
about one context are not independent. Differences are paired text by text. Where kept positions are
there (`--kept`, left by the runs), how many are the same is counted first, into `kept.csv`.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kvjax import figures
from kvjax.studies.real_models import (
    AGREEING,
    BUDGETS,
    LAYERED,
    LAYERS,
    SHARED,
    SURVEYED,
    read_rows,
)
from kvjax.studies.tables import mean_interval

# method, budget -> text -> row
Rows = Mapping[tuple[str, str], Mapping[str, Mapping[str, str]]]
LENGTHS = ("1024", "2048", "4096")
LAST = ", last kept"  # kvpress told to keep the last token, as kvjax does
SHOWN = (  # in the picture
    "kvzip", "ada-kvzip:layers=prefix", "ada-kvzip",
    "key-diff:layers=global,heads=global", "key-diff", "ada-expected-attention", "tova",
    AGREEING[0],
)  # fmt: skip


def by_method(rows: Sequence[dict[str, str]]) -> dict[tuple[str, str], dict[str, dict[str, str]]]:
    """Rows by method and budget, then by text."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        found[row["method"], row["budget"]][row["name"]] = row
    return found


def budgets_of(part: str) -> list[str]:
    """The budgets of a part, as they are written."""
    return [f"{budget:g}" for budget in BUDGETS[part]]


def percent(budget: str) -> str:
    """ "0.25" as "25 %"."""
    return f"{100 * float(budget):g} %"


def shares(rows: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """The share of right answers about each context, whose number begins a text's name."""
    right: dict[str, str] = defaultdict(str)
    for name, row in rows.items():
        right[name[:2]] += row["right"]
    return {context: bits.count("1") / len(bits) for context, bits in right.items()}


def paired(one: Mapping[str, float], other: Mapping[str, float]) -> np.ndarray:
    """Differences over what both have."""
    return np.array([one[name] - other[name] for name in sorted(one.keys() & other.keys())])


def losses(rows: Mapping[str, Mapping[str, str]], length: str = "") -> dict[str, float]:
    """NLL by text, of one length or of all."""
    return {n: float(row["nll"]) for n, row in rows.items() if n.startswith(length)}


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    head, *rest = (f"| {' | '.join(line)} |" for line in (heads, *lines))
    return "\n".join((head, "|---" * len(heads) + "|", *rest))


# ---------------------------------------------------------------------------- a novel
def novel_table(rows: Rows) -> str:
    """What each method adds to the NLL, by length and budget; the fewest nats first."""
    full, budgets = rows["full", "1"], budgets_of("novel")
    lengths = [length for length in LENGTHS if losses(full, length)]

    def cell(method: str, budget: str, length: str) -> str:
        gaps = paired(losses(rows.get((method, budget), {}), length), losses(full, length))
        whole = len(losses(full, length))
        if len(gaps) == 0:
            return ""
        return f"{gaps.mean():+.3f}" + (f" ({len(gaps)})" if len(gaps) < whole else "")

    def worst(method: str) -> float:
        gaps = [
            paired(losses(rows.get((method, b), {}), lengths[0]), losses(full)) for b in budgets
        ]
        return float(np.mean([gap.mean() for gap in gaps if len(gap)]))

    named = {method for method, _ in rows if method != "full"}
    methods = sorted(named, key=lambda method: (worst(method), method))
    heads = ["method", *(f"{length}: {percent(b)}" for length in lengths for b in budgets)]
    lines = [[f"`{m}`", *(cell(m, b, n) for n in lengths for b in budgets)] for m in methods]
    told = [f"{np.mean(list(losses(full, n).values())):.4f} ({n})" for n in lengths]
    counts = ", ".join(f"{len(losses(full, n))} of {n}" for n in lengths)
    return (
        f"Texts: {counts} tokens. NLL with the full cache: {', '.join(told)}. In brackets: texts"
        f" where not all were run.\n\n{table(heads, lines)}\n"
    )


def agreement_table(mine: Rows, theirs: Rows, kept: Sequence[dict[str, str]]) -> str:
    """NLL beside kvpress's, and how many kept positions are the same."""
    lines = []
    pairs = [(m, peer) for m in SHARED for peer in (m, m + LAST) if (peer, "0.5") in theirs]
    for method, peer in pairs:
        for budget in budgets_of("novel"):
            one, two = mine.get((method, budget), {}), theirs.get((peer, budget), {})
            gaps = paired(losses(one), losses(two))
            if len(gaps) == 0:
                continue
            both = sorted(one.keys() & two.keys())
            means = [np.mean([float(rows[n]["nll"]) for n in both]) for rows in (one, two)]
            low, high = mean_interval(gaps)
            same = [r for r in kept if (r["method"], r["budget"]) == (peer, budget)]
            total = sum(int(row["kept"]) for row in same)
            share = sum(int(row["same"]) for row in same) / total if total else None
            name = f"`{method}`{peer.removeprefix(method)}"
            lines.append(
                [
                    name, percent(budget), f"{means[0]:.4f}", f"{means[1]:.4f}",
                    f"{gaps.mean():+.4f} [{low:+.4f}, {high:+.4f}]", str(len(gaps)),
                    "" if share is None else f"{share:.2%}",
                ]
            )  # fmt: skip
    heads = ["method", "kept", "NLL", "kvpress", "difference", "texts", "same positions"]
    return table(heads, lines) + "\n"


def count_same(mine: Path, theirs: Path, out: Path) -> None:
    """Write how many of kvpress's kept entries are ours as well, by method, budget and text.

    What the file has of others stays: a run that goes on elsewhere has not all positions.
    """
    heads = ("name", "method", "budget", "kept", "same")
    found = {tuple(row[head] for head in heads[:3]): row for row in read_rows(out)}
    for path in theirs.glob("*.npz"):
        if not (mine / path.name).exists():
            continue
        ours, others = np.load(mine / path.name), np.load(path)
        for key in others:
            if key in ours:
                both = ours[key][..., : others[key].shape[-1]] & others[key]
                method, _, budget = key.rpartition(" ")
                counts = [str(np.bitwise_count(x).sum()) for x in (others[key], both)]
                row = dict(zip(heads, (path.stem, method, budget, *counts), strict=True))
                found[path.stem, method, budget] = row
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found[key] for key in sorted(found))


# ---------------------------------------------------------------------------- questions
def answers_table(mine: Rows, theirs: Rows, part: str) -> str:
    """Right answers by method, ours and kvpress's, with intervals; the best first."""
    budgets = budgets_of(part)

    def cell(rows: Rows, method: str, budget: str) -> str:
        found = rows.get((method, budget), {})
        if not found:
            return ""
        bits = "".join(row["right"] for row in found.values())
        low, high = mean_interval(np.array(list(shares(found).values())))
        return (
            f"{bits.count('1')} of {len(bits)}: {bits.count('1') / len(bits):.0%}"
            f" [{low:.0%}, {high:.0%}]"
        )

    def right(method: str) -> float:
        found = [shares(mine.get((method, budget), {})) for budget in budgets]
        return sum(float(np.mean(list(share.values()))) for share in found if share)

    named = {method for method, _ in mine if method != "full"}
    methods = sorted(named, key=lambda method: (-right(method), method))
    heads = ["method", *map(percent, budgets), *(f"kvpress, {percent(b)}" for b in budgets)]
    lines = [
        [f"`{m}`", *(cell(rows, m, b) for rows in (mine, theirs) for b in budgets)] for m in methods
    ]
    return f"Full cache: {cell(mine, 'full', '1')}.\n\n{table(heads, lines)}\n"


def best_table(mine: Rows, theirs: Rows, part: str) -> str:
    """Our best method against kvpress's best, on the contexts that both have."""
    lines = []
    for budget in budgets_of(part):
        found = []
        for rows in (mine, theirs):
            each = {m: shares(r) for (m, b), r in rows.items() if b == budget and len(r) > SURVEYED}
            if each:
                best = max(each, key=lambda m: np.mean(list(each[m].values())))
                found.append((best, each[best]))
        if len(found) < 2:
            continue
        gaps = paired(found[0][1], found[1][1])
        low, high = mean_interval(gaps)
        points = f"{100 * gaps.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        names = [f"`{name}`" for name, _ in found]
        lines.append([percent(budget), *names, points, str(len(gaps))])
    heads = ["kept", "our best", "kvpress's best", "difference in points", "contexts"]
    return table(heads, lines) + "\n" if lines else ""


def layers_table(rows: Rows) -> str:
    """Right answers in the survey, a row a scorer, a column a division among layers."""
    budgets, lines = budgets_of("unseen"), []
    for scorer, methods in LAYERED.items():
        for budget in budgets:
            cells = []
            for method in methods:
                found = rows.get((method, budget), {})
                bits = "".join(r["right"] for n, r in found.items() if int(n) < SURVEYED)
                cells.append(f"{bits.count('1')} of {len(bits)}" if bits else "")
            lines.append([scorer, percent(budget), *cells])
    return table(["scorer", "kept", *LAYERS], lines) + "\n"


def picture(path: Path, mine: Mapping[str, Rows], theirs: Mapping[str, Rows]) -> None:
    """Answers right and nats lost; beside kvpress's on the contexts that both answered."""

    def share(found: Mapping[str, float], among: Mapping[str, float]) -> float | None:
        both = sorted(found.keys() & among.keys()) if among else sorted(found)
        return float(np.mean([found[name] for name in both])) if both else None

    def pair(method: str, budget: str) -> tuple[float | None, float | None]:
        ours, others = (shares(side["unseen"].get((method, budget), {})) for side in (mine, theirs))
        return share(ours, others), share(others, ours)

    answers = {
        percent(budget): {method.split(":window")[0]: pair(method, budget) for method in SHOWN}
        for budget in budgets_of("unseen")
    }
    full = losses(mine["novel"]["full", "1"], LENGTHS[0])
    lost = {
        method: [
            float(paired(losses(mine["novel"].get((method, b), {}), LENGTHS[0]), full).mean())
            for b in budgets_of("novel")
        ]
        for method in ("snapkv", "kvzip", "expected-attention", "tova", "key-diff")
        if all((method, b) in mine["novel"] for b in budgets_of("novel"))
    }
    whole = share(shares(mine["unseen"].get(("full", "1"), {})), {}) or 0.0
    figures.real_models(path, answers, whole, lost, [percent(b) for b in budgets_of("novel")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--kept", type=Path, help="folder with kept/ and kept_kvpress/")
    parser.add_argument("--picture", type=Path, help="PNG")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Markdown")
    options = parser.parse_args()
    folder = options.results
    if options.kept and (options.kept / "kept_kvpress").is_dir():
        sides = options.kept / "kept", options.kept / "kept_kvpress"
        count_same(*sides, folder / "kept.csv")
    mine, theirs = (
        {part: by_method(read_rows(folder / f"{side}_{part}.csv")) for part in BUDGETS}
        for side in ("kvjax", "kvpress")
    )
    sections = [
        "# SmolLM2-135M, measured\n\nWritten by `make real` from the rows beside it;"
        " [real_models.md](../real_models.md) says what they are.\n",
    ]
    if ("full", "1") in mine["novel"]:
        kept = read_rows(folder / "kept.csv")
        sections += ["## Nats a token that compression adds to a novel's next 64 tokens\n"]
        sections += [novel_table(mine["novel"]), "## NLL beside kvpress's\n"]
        sections += [agreement_table(mine["novel"], theirs["novel"], kept)]
    for part in ("unseen", "seen"):
        if mine[part]:
            sections += [f"## Answers right, question {part}\n"]
            sections += [answers_table(mine[part], theirs[part], part)]
            sections += [best_table(mine[part], theirs[part], part)]
    layered = {name for names in LAYERED.values() for name in names} - set(SHARED)
    if any(method in layered for method, _ in mine["unseen"]):
        sections += [f"## Layers first, the {SURVEYED} contexts asked of every method\n"]
        sections += [layers_table(mine["unseen"])]
    options.output.write_text("\n".join(sections))
    if options.picture and figures.available():
        picture(options.picture, mine, theirs)


if __name__ == "__main__":
    main()
