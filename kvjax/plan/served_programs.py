"""Compile a server's programs for TPU slices and a GPU, without having one.

    python -m kvjax.plan.served_programs [--topologies v5e-8 v6e-8 h200]

A Llama-3-8B that answers 64 requests at once, each from 1,024 entries a head: what every program
needs beside the pool, whether it writes the pool in place, and that decoding copies nothing of it.
A quarter of an hour on two cores; the last line on stdout is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from kvjax.cache.slots import Slots, page_size
from kvjax.compile_for import large_results, lowering_for, missing
from kvjax.config import CompressionConfig, Recompress
from kvjax.generation.programs import Program, flat
from kvjax.models.config import ModelConfig
from kvjax.models.presets import preset
from kvjax.plan.program import KERNELS, laid, mesh_of_slice, model_on
from kvjax.plan.topology import TOPOLOGIES, Topology
from kvjax.serve import programs
from kvjax.serve.menu import Menu
from kvjax.serve.pages import Pages, Shape
from kvjax.serve.rows import empty_rows

TARGETS = ("v5e-8", "v6e-8", "h200")
_ENTRIES, _EVERY = 1024, 32
_METHOD = CompressionConfig.named("ada-snapkv", _ENTRIES, layout="packed")
_RULE = Recompress(every=_EVERY, budget=_ENTRIES)
_SUMS = Recompress(every=_EVERY, budget=_ENTRIES, scorer="squared-sum", layers="global")
# Every program with the rule of its server; None where answers are kept whole.
CASES: Mapping[str, tuple[str, Recompress | None]] = MappingProxyType(
    {
        "decode": ("decode", None),
        "decode, sums": ("decode", _SUMS),
        "flush": ("flush", None),
        "evict": ("evict", _RULE),
        "admit": ("admit", None),
        "release": ("release", None),
        "keep": ("keep", None),
        "ask": ("ask", None),
        "swap out": ("swap_out", None),
        "swap in": ("swap_in", None),
    }
)
# What may write as much as the pool outside of the decode loop: into it, where its donated array
# lies. A copy would show among the temporaries, too.
IN_PLACE = {"fusion", "scatter", "dynamic-update-slice", "while"}


@dataclass(frozen=True, kw_only=True)
class Server:
    """What is compiled: a model on a slice, and the requests that its server takes.

    Attributes:
      topology: the slice; the model is split over all of its devices.
      model: its architecture.
      rows: requests at once.
      prompt: tokens of a prompt, a bucket.
      question: tokens of a question about a context, a bucket.
      new_tokens: of an answer.
      pool: entries a head and row that the pool has pages for.
      compression: what is kept of a prompt.

    Raises:
      ValueError: a number below 1.
    """

    topology: Topology
    model: ModelConfig
    rows: int = 64
    prompt: int = 8192
    question: int = 128
    new_tokens: int = 512
    pool: int = _ENTRIES
    compression: CompressionConfig = _METHOD

    def __post_init__(self):
        for name in ("rows", "prompt", "question", "new_tokens", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")

    def menu(self, rule: Recompress | None) -> Menu:
        """What it offers; called where a platform is assumed, whose pages it has."""
        return Menu(
            shape=self.model,
            methods={"one": self.compression},
            buckets=(self.prompt,),
            question_buckets=(self.question,) if rule is None else (),
            max_new_tokens=self.new_tokens,
            tail_slots=_EVERY,
            recompress=rule,
            page=page_size(self.topology.devices),
        )

    def shape(self, menu: Menu) -> Shape:
        """Its pool's: pages for every row's entries, and one a layer that is filled in part."""
        layers, kv_heads = self.model.num_layers, self.model.num_kv_heads
        each = layers * kv_heads * self.pool // menu.page + layers
        pages = self.rows * each
        return Shape(self.rows, layers, kv_heads, min(menu.widest, pages), pages, menu.page)


class Shapes:
    """Arguments of a server's programs: shapes, placed on the slice as its programs leave them.

    Args:
      server: which.
      rule: by which answers are compressed again, or None.
    """

    def __init__(self, server: Server, rule: Recompress | None):
        topology, self.config = server.topology, server.model
        self.server, self.rule = server, rule
        self.mesh = mesh_of_slice(topology, self.config, 1, topology.devices)
        self._laid: Any = partial(laid, self.mesh)
        self.model = flat(model_on(self.config, self.mesh))
        with lowering_for(topology.target, self.mesh):
            self.menu = server.menu(rule)
            shape = server.shape(self.menu)
            lowered = programs.open_program.lower(
                self.model, shape=shape, tail_slots=_EVERY, quantize=False, recompress=rule
            )
        self.state = _as_compiled(lowered)
        self.one = jax.tree.map(
            self._laid, jax.eval_shape(partial(empty_rows, 1, self.config.vocab_size))
        )
        self.number, self.eos = self.array(), self.array(2)

    def array(self, *sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """A shape that is whole on every device."""
        return self._laid(jax.ShapeDtypeStruct(sizes, dtype))

    @property
    def prompt(self) -> programs.Prompt:
        """A prompt that was read."""
        one, keys = self.array(1), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        lowered = programs.prefill_program.lower(
            self.model, self.array(1, self.server.prompt), one, self._laid(keys), one,
            self.number, None, config=self.server.compression, recompress=self.rule,
        )  # fmt: skip
        found = jax.tree.map(self._laid, _shapes(lowered))
        return found.replace(slots=self._split(found.slots))

    def _split(self, slots: Slots) -> Slots:
        split: Any = partial(laid, self.mesh)  # shapes stand where arrays will
        scales = slots.scales
        return slots.replace(
            entries=split(slots.entries, ".ME"),
            owners=split(slots.owners, ".M"),
            positions=split(slots.positions, ".M"),
            scales=None if scales is None else split(scales, "..M"),
        )

    def arguments(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of a program, by its name in `kvjax.serve.programs` without the end."""
        pages, rows, tail = self.state
        mask = self.array(self.server.rows, dtype=bool)
        if name == "decode":
            return (self.model, *self.state, self.eos), {"steps": 8, "top": 0}
        if name == "flush":
            return (pages, tail, mask), {}
        if name == "release":
            return (pages, rows, mask), {}
        if name == "evict":
            rest: dict[str, Any] = {"recompress": self.rule, "size": self.menu.largest_row}
            rest["windows"] = self.config.sliding_windows
            return (pages, tail, rows, *[self.number] * 3), rest
        if name == "admit":
            how = self.number, self.one, self.eos, self.number
            return (*self.state, self.prompt, *how), {"top": 0}
        if name == "keep":
            return (pages, self.prompt), {}
        if name == "ask":
            lease = jax.tree.map(self._laid, jax.eval_shape(self._lease))
            tokens, more = self.array(1, self.server.question), self.number
            asked = (self.model, lease, tokens, more, self.number, self.one, self.eos)
            return (*self.state, *asked), {"top": 0}
        out = (*self.state, self.number), {"size": self.menu.largest_row}
        if name == "swap_out":
            return out
        swapped = _shapes(programs.swap_out_program.lower(*out[0], **out[1]))
        return (*self.state, jax.tree.map(self._laid, swapped), *[self.number] * 2), {}

    def _lease(self):
        layers, kv_heads = self.config.num_layers, self.config.num_kv_heads
        width = self.state.pages.table.shape[2]
        sizes = jnp.zeros((2, layers), jnp.int32)
        table, counts = (jnp.zeros((layers, n), jnp.int32) for n in (width, kv_heads))
        return programs.Lease(table, counts, *sizes)

    def lowered(self, name: str) -> jax.stages.Lowered:
        """A program, lowered for the slice."""
        program: Program = getattr(programs, f"{name}_program")
        with lowering_for(self.server.topology.target, self.mesh):
            arguments, settings = self.arguments(name)
            return program.lower(*arguments, **settings)


def _shapes(lowered: jax.stages.Lowered) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)


def _as_compiled(lowered: jax.stages.Lowered) -> Any:
    """A program's results, as shapes that lie where it leaves them."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        _shapes(lowered),
        lowered.compile().output_shardings,
    )


def pool_bytes(pages: Pages, devices: int = 1) -> int:
    """Bytes of a pool on each of so many devices."""
    slots = pages.slots
    arrays = slots.entries, slots.owners, slots.positions, slots.scales, slots.sums
    return sum(x.size * x.dtype.itemsize for x in arrays if x is not None) // devices


def compile_case(name: str, shapes: Shapes) -> dict[str, Any]:
    """A program's seconds, its bytes on a device, and what it writes anew that is large.

    Raises:
      NotImplementedError: where the target's compiler is not installed.
    """
    topology, state = shapes.server.topology, shapes.state
    began = time.perf_counter()
    compiled = shapes.lowered(name).compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    pool = pool_bytes(state.pages, topology.devices)
    half = pool // 2
    return {
        "program": name,
        "topology": topology.name,
        "pool": pool,
        "temporaries": memory.temp_size_in_bytes,
        "overwritten": memory.alias_size_in_bytes,
        "table": state.pages.table.size * 4 // shapes.config.num_layers,
        "copies": sorted(set(large_results(text, half)) - IN_PLACE),
        "in_loop": sorted(set(large_results(text, half, "decode"))),
        "kernels": [kernel for kernel in KERNELS if kernel in text],
        "seconds": time.perf_counter() - began,
    }


def compile_all(server: Server, cases: Mapping[str, Any] = CASES) -> list[dict[str, Any]]:
    """Every program of a server on one slice."""
    made: dict[Recompress | None, Shapes] = {}
    rows = []
    for label, (name, rule) in tqdm(cases.items(), desc=server.topology.name, disable=None):
        if rule not in made:
            made[rule] = Shapes(server, rule)
        rows.append(compile_case(name, made[rule]) | {"case": label})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Megabytes of a device's temporaries, and their share of its pool."""
    names = list(dict.fromkeys(row["topology"] for row in rows))
    cells = {(row["case"], row["topology"]): row for row in rows}
    pools = {row["topology"]: row["pool"] for row in rows}
    heads = [f"{name} (pool {pools[name] / 1e6:,.0f} MB)" for name in names]
    lines = ["| program | " + " | ".join(heads) + " | copies |", "|---" * (len(names) + 2) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = [cells[case, name] for name in names]
        sizes = [
            f"{row['temporaries'] / 1e6:.1f} ({row['temporaries'] / row['pool']:.1%})"
            for row in found
        ]
        copies = sorted({copy for row in found for copy in row["copies"] + row["in_loop"]})
        lines.append(f"| {case} | " + " | ".join(sizes) + f" | {', '.join(copies) or 'none'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topologies", nargs="+", choices=list(TOPOLOGIES), default=list(TARGETS))
    parser.add_argument("--programs", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    for name in arguments.topologies:
        if (reason := missing(TOPOLOGIES[name].target)) is not None:
            print(f"kvjax: topology {name} {reason}", file=sys.stderr)
            return 2
    model = preset("llama-3-8b", 8192 + 512)
    cases = {name: CASES[name] for name in arguments.programs}
    rows = [
        row
        for name in arguments.topologies
        for row in compile_all(Server(topology=TOPOLOGIES[name], model=model), cases)
    ]
    print(table(rows))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
