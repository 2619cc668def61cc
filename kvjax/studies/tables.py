"""Compare method with method on the same prompts, and likelihoods of stories."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

import kvjax
from kvjax.models.checkpoints.llama2c import convert_llama2c
from kvjax.studies.continuation import evaluate
from kvjax.studies.retrieval import Outcome

BASE = "ada-snapkv"
DOCUMENTS = 100


def mean_interval(
    values: Float[np.ndarray, " X"], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean of `values`."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def differences(
    tables: dict[str, dict[str, list[Outcome]]], column: int, base: str = BASE
) -> dict[str, Float[np.ndarray, " X"]]:
    """Right (1) or wrong (0) less the base's, over the prompts of all tasks, by method.

    Args:
      tables: by task, each method's outcomes by budget, over the same prompts.
      column: which budget.
      base: the method to compare with.
    """
    names = [name for name in next(iter(tables.values())) if name not in ("full", base)]
    return {
        name: np.concatenate(
            [
                table[name][column].right.astype(float) - table[base][column].right
                for table in tables.values()
            ]
        )
        for name in names
    }


def paired_markdown(
    tables: dict[str, dict[str, list[Outcome]]], column: int, budget: float, base: str = BASE
) -> str:
    """Each method against the base, prompt by prompt, the best first."""
    found = differences(tables, column, base)
    prompts = len(next(iter(found.values())))
    share = np.mean([table[base][column].right.mean() for table in tables.values()])
    lines = [
        f"At {budget:.0%}, the question unseen, over the {prompts} prompts of all tasks:"
        f" points above `{base}` ({share:.1%} right) with the 95 % interval of the paired"
        " difference, in all and by task.",
        "",
        "| method | all | " + " | ".join(tables) + " |",
        "|---" * (len(tables) + 2) + "|",
    ]
    for name, gaps in sorted(found.items(), key=lambda item: -item[1].mean()):
        each = np.split(gaps, len(tables))
        lines.append(f"| `{name}` | " + " | ".join(map(_points, [gaps, *each])) + " |")
    return "\n".join(lines) + "\n"


def _points(values: Float[np.ndarray, " X"]) -> str:
    low, high = mean_interval(values)
    return f"{100 * values.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def stories(data: Path, budgets: Sequence[float]) -> tuple[str, dict[str, list[float]]]:
    """What every method adds to the NLL of stories260K's text after a compressed prefix.

    Args:
      data: the folder with `stories260K` and `fidelity`.
      budgets: fractions of the prefix.

    Returns:
      A table as Markdown, and its means by method.
    """
    source = data / "stories260K"
    documents = json.loads((data / "fidelity" / "docs_stories260K.json").read_text())[:DOCUMENTS]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        convert_llama2c(source / "stories260K.bin", source / "tok512.bin", out)
        model, _ = kvjax.load(out, progress=False)
    full, result = evaluate(model, documents, kvjax.CompressionConfig.named("full"), None)
    lines = [
        f"Nats a token above the full cache's {result.nll:.4f}, over {len(documents)} stories of"
        " stories260K after a prefix of 192 to 275 tokens, with the bootstrap 95 % interval over"
        " stories. Nothing is evicted after the prefix.",
        "",
        "| method | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    means: dict[str, list[float]] = {}
    kept: list[set[str]] = [set() for _ in budgets]
    for name in tqdm([name for name in kvjax.METHODS if name != "full"], desc="stories"):
        cells = []
        jax.clear_caches()  # a process maps so many compiled programs and no more
        for place, budget in enumerate(budgets):
            config = kvjax.CompressionConfig.named(name, budget, keep_ratio=False)
            scores, result = evaluate(model, documents, config, full)
            low, high = _interval_of_tokens(scores, full)
            cells.append(f"{result.delta:+.3f} [{low:+.3f}, {high:+.3f}]")
            means.setdefault(name, []).append(result.delta)
            kept[place].add(f"{result.kept:.1f}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    held = ["/".join(sorted(counts)) for counts in kept]
    lines.append("| entries a head | " + " | ".join(held) + " |")
    return "\n".join(lines) + "\n", means


def _interval_of_tokens(mine: Sequence[Any], full: Sequence[Any], draws: int = 2000):
    """Bootstrap over documents of the mean over tokens."""
    gaps = np.array([sum(a.nll) - sum(b.nll) for a, b in zip(mine, full, strict=True)])
    tokens = np.array([len(scored.nll) for scored in mine])
    picks = np.random.default_rng(0).integers(len(gaps), size=(draws, len(gaps)))
    low, high = np.quantile(gaps[picks].sum(1) / tokens[picks].sum(1), (0.025, 0.975))
    return float(low), float(high)
