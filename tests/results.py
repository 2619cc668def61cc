"""Results of an evaluation, made up from a seed, in the form that `kvjax eval` writes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = 'model = "tiny"\ntasks = ["needle"]\nmethods = ["snapkv"]\nbudgets = ["25%"]\n'
# How well a method does at 25 %.
SKILL = {"full": 0.95, "ada-snapkv": 0.85, "snapkv": 0.75, "prefixkv": 0.7, "streaming-llm": 0.3}
TASKS = ("ruler/niah_single_1", "ruler/vt", "longbench/qasper", "perplexity")
LAYERS, HEADS, ENTRY = 4, 2, 64  # bytes an entry


def row(**changes: Any) -> dict[str, Any]:
    """A line of a results file."""
    plain = {
        "task": "ruler/niah_single_1",
        "length": 1024,
        "protocol": "seen",
        "method": "snapkv",
        "budget": "25%",
        "document": "a",
        "ask": "a/0",
        "prompt_tokens": 1000,
        "prediction": "1234567",
        "answers": ["1234567"],
        "metric": "string_match_all",
        "score": 1.0,
        "nll": None,
        "kept": 250.0,
        "kept_LK": [[250, 250]] * LAYERS,
        "bytes": 250 * LAYERS * HEADS * ENTRY,
        "full_bytes": 1000 * LAYERS * HEADS * ENTRY,
        "seconds": 0.5,
        "facts": {},
        "error": None,
    }
    return plain | changes


def folder(
    path: Path, rows: Iterable[Mapping[str, Any]], name: str = "results-00000.jsonl"
) -> Path:
    """A folder of results with these rows."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(CONFIG)
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    (path / name).write_text(lines)
    return path


def made_up(
    documents: int = 20,
    lengths: tuple[int, ...] = (1024, 4096),
    skill: Mapping[str, float] = SKILL,
    seed: int = 0,
    layers: int = LAYERS,
    heads: int = HEADS,
) -> list[dict[str, Any]]:
    """Rows of every method, task and protocol; a few have failed."""
    rng = np.random.default_rng(seed)
    rows = []
    for protocol in ("seen", "unseen"):
        for method, share in skill.items():
            for budget in ("100%",) if method == "full" else ("10%", "25%", "50%"):
                part = float(budget[:-1]) / 100
                right = min(1.0, share * (0.7 + 0.3 * min(1, part / 0.25)))
                right *= 0.8 if protocol == "unseen" and method != "full" else 1.0
                for task in TASKS:
                    for length in lengths:
                        given = (protocol, method, budget, task, length)
                        rows += _answers(rng, given, part, right, documents, (layers, heads))
    return rows


def _answers(rng, given, part, right, documents, shape) -> list[dict[str, Any]]:
    protocol, method, budget, task, length = given
    profile = np.linspace(1.6, 0.4, shape[0])[:, None] * rng.uniform(0.6, 1.4, shape)
    profile = np.ones(shape) if method in ("full", "snapkv") else profile / profile.mean()
    rows = []
    for index in range(documents):
        depth = index % 11 / 10
        tokens = int(length - rng.integers(1, 40))
        kept = np.minimum(np.round(tokens * part * profile), tokens).astype(int)
        hit = rng.random() < right - 0.3 * (method == "streaming-llm" and depth < 0.7)
        failed = rng.random() < 0.01
        score = (
            float(hit) if task != "longbench/qasper" else round(float(rng.beta(3, 2)) * right, 4)
        )
        scored = task == "perplexity"
        one = row(
            task=task, length=length, protocol=protocol, method=method, budget=budget,
            document=f"{task}/{length}/{index}", ask=f"{task}/{length}/{index}/0",
            prompt_tokens=tokens,
            prediction=None if failed else f"{rng.integers(1e6, 1e7)} <b>&amp;</b>",
            answers=[str(rng.integers(1e6, 1e7))],
            score=None if scored or failed else score,
            nll=round(2.1 + 0.4 * (1 - part) * (1 - right) + 0.1 * float(rng.normal()), 5)
            if scored and not failed else None,
            kept=float(kept.mean()), kept_LK=kept.tolist(), bytes=int(kept.sum()) * ENTRY,
            full_bytes=tokens * shape[0] * shape[1] * ENTRY, seconds=round(float(rng.random()), 3),
            facts={"depth": depth} if "niah" in task else {},
            error="prompt of 5000 tokens exceeds the model's context </script>" if failed else None,
        )  # fmt: skip
        rows.append(one)
    return rows
