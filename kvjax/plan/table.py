"""Read settings files of several rows, and write the table as Markdown."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from kvjax.config import CompressionConfig, parse_budget
from kvjax.models.checkpoints.gguf import load_gguf_config
from kvjax.models.checkpoints.gguf_file import is_gguf
from kvjax.models.config import ModelConfig, load_config
from kvjax.models.presets import PRESETS, preset
from kvjax.plan.limits import Limit
from kvjax.plan.program import Ask
from kvjax.plan.rows import MOST_TOKENS, Limits, Row
from kvjax.plan.topology import GIB, TOPOLOGIES
from kvjax.settings import read_settings
from kvjax.spelling import parse_method, spelled


@dataclass(frozen=True)
class PlanSettings:
    """Several rows, in columns: the i-th model on the i-th topology, with each of the methods.

    Attributes:
      models: presets, or directories with a config.json.
      topologies: of `kvjax.plan.TOPOLOGIES`.
      methods: as `kvjax.spelling` reads them, side by side.
      prompt, new_tokens: tokens.
      budget: "N" or "P%", of all methods but `full`.
      splits: "DATAxMODEL" of each row; by default the model over at most eight devices.
      batches: rows of each row's batch; by default one for each part of the data.
      profile: retained fraction of each layer, for methods with layers = "prefix".
      limits: "verified", "fit" or "none", see `kvjax.plan.plan`.
      layers: "all", or "few": compiled with two and six layers, continued to the model's own.
      cost: also what the compiler says of a decode step.

    Raises:
      ValueError: columns of different lengths, an unknown name.
    """

    models: tuple[str, ...]
    topologies: tuple[str, ...]
    methods: tuple[str, ...]
    prompt: int
    new_tokens: int
    budget: str = "1024"
    splits: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    profile: tuple[float, ...] = ()
    limits: str = "verified"
    layers: str = "all"
    cost: bool = False

    def __post_init__(self):
        for name in ("topologies", "splits", "batches"):
            column = getattr(self, name)
            if len(column) != len(self.models) and (column or name == "topologies"):
                raise ValueError(
                    f"{name} has {len(column)} entries, expected {len(self.models)}, one a model"
                )
        if self.limits not in get_args(Limits):
            raise ValueError(f"limits={self.limits!r}, expected verified, fit or none")
        if self.layers not in ("all", "few"):
            raise ValueError(f"layers={self.layers!r}, expected all or few")
        self.asks()

    def asks(self) -> list[Ask]:
        """The rows, method by method."""
        splits = self.splits or ("",) * len(self.models)
        batches = self.batches or (0,) * len(self.models)
        rows = zip(self.models, self.topologies, splits, batches, strict=True)
        return [self._ask(*row, method) for row in rows for method in self.methods]

    def _ask(self, model: str, topology: str, split: str, batch: int, method: str) -> Ask:
        if topology not in TOPOLOGIES:
            raise ValueError(f"topology={topology!r}, expected one of {', '.join(TOPOLOGIES)}")
        found = TOPOLOGIES[topology]
        config = model_config(model, self.prompt + self.new_tokens)
        data, parts = parse_split(split, found.devices)
        return Ask(
            name=Path(model).name,
            model=config,
            topology=found,
            data=data,
            parts=parts,
            batch=batch or data,
            prompt=self.prompt,
            new_tokens=self.new_tokens,
            compression=self._compression(method),
        )

    def _compression(self, method: str) -> CompressionConfig:
        config = parse_method(method, parse_budget(self.budget))
        if self.profile and config.layers == "prefix":
            return dataclasses.replace(config, profile=self.profile)
        return config


def model_config(name: str, context: int) -> ModelConfig:
    """A preset's, or that of a directory's config.json or of a GGUF file."""
    if name in PRESETS:
        return preset(name, context)
    if is_gguf(name):
        return load_gguf_config(name)
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"model={name!r}, expected a directory with config.json, a GGUF file, or one of"
            f" {', '.join(PRESETS)}"
        )
    return load_config(name)


def parse_split(text: str, devices: int) -> tuple[int, int]:
    """Parts of the batch and of the model: of "4x8", or by default as many as there are devices."""
    if not text:
        parts = min(devices, 8)
        return devices // parts, parts
    pieces = text.split("x")
    if len(pieces) != 2 or not all(piece.isdecimal() for piece in pieces):
        raise ValueError(f"split={text!r}, expected DATAxMODEL, such as 4x8")
    return int(pieces[0]), int(pieces[1])


def read_plan(path: str | Path) -> PlanSettings:
    """A TOML file of rows.

    Raises:
      ValueError: not TOML, an unknown or missing key, a wrong value.
      OSError: it cannot be read.
    """
    return read_settings(path, PlanSettings)


# ---------------------------------------------------------------------------- Markdown
_COLUMNS = (
    "model", "slice", "split", "batch", "prompt + new", "method", "weights", "pool", "tail",
    "prefill", "total", "of", "fits", "largest batch", "longest prompt", "collectives a step",
    "step, MB read", "step, ms",
)  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, GiB of one device.

    `~` marks what no compiler was asked about, `≈` what it said of fewer layers.
    """
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows)]) + "\n"


def _cells(row: Row) -> list[str]:
    ask, about = row.ask, "~" if not row.compiled else "≈" if row.layers else ""
    refused = row.short and row.compiled
    count, size = row.collectives
    config = ask.compression
    kept = "" if not config.compresses else f" {_budget(config.budget)}"
    stored = ", stored profile" if config.profile is not None else ""
    return [
        ask.name,
        ask.topology.name,
        f"{ask.data}x{ask.parts}",
        str(ask.batch),
        f"{ask.prompt:,} + {ask.new_tokens}",
        f"{spelled(config)}{kept}{stored}",
        *(f"{part / GIB:.2f}" for part in (row.held.weights, row.held.pool, row.held.tail)),
        "" if refused else f"{about}{row.working / GIB:.2f}",
        f"{about}{row.total / GIB:.2f}",
        f"{ask.topology.room / GIB:.2f}",
        f"no, by {row.short / GIB:.2f}" if row.short else "yes",
        _limit(row.batch, 0, about),
        _limit(row.prompt, MOST_TOKENS, about),
        f"{count}, {size / 1e3:,.0f} kB" if count else "",
        f"{row.step.bytes / 1e6:,.0f}",
        f"{row.step.seconds * 1e3:.2f}",
    ]


def _budget(budget: int | float | None) -> str:
    return f"{budget:.0%}" if isinstance(budget, float) else str(budget)


def _limit(limit: Limit | None, most: int, about: str) -> str:
    if limit is None:
        return ""
    if limit.most == 0:
        return "none"
    if most and limit.most >= most:
        return f"≥ {limit.most:,}"
    return f"{about if limit.exact else '~'}{limit.most:,}"


def cost_table(rows: Sequence[Row]) -> str:
    """A decode step from shapes, beside what the compiler counts, where that was asked for."""
    rows = [row for row in rows if row.cost is not None]
    if not rows:
        return ""
    names = (
        "model",
        "slice",
        "method",
        "GB",
        "GFLOP",
        "ms at least",
        "GB, compiler",
        "GFLOP, compiler",
    )
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        moved, flops = row.cost or (math.nan, math.nan)
        cells = [*(_cells(row)[index] for index in (0, 1, 5))]
        cells += [f"{row.step.bytes / 1e9:.2f}", f"{row.step.flops / 1e9:.1f}"]
        cells += [f"{row.step.seconds * 1e3:.2f}", f"{moved / 1e9:.2f}", f"{flops / 1e9:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
