"""A row's program: its shapes, where they lie on a slice, and what its compiler says.

B batch, T prompt tokens (the bucket).
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax import sharding
from kvjax.cache.state import Cache, with_room
from kvjax.compile_for import collectives, devices, lowering_for
from kvjax.config import CompressionConfig
from kvjax.generation import decode, prefill
from kvjax.generation.programs import decode_program, generate_program
from kvjax.inputs.prompts import bucket
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.plan.topology import GIB, Topology

DTYPE = jnp.dtype(jnp.bfloat16)  # of weights, activations and cache
KERNELS = ("tpu_custom_call", "cudnn", "triton")
_TOO_LARGE = re.compile(r"\(([\d.]+)([GM])\) exceeds available|Used ([\d.]+)([GM]) of")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is planned: a model on a slice, and the prompts that it answers.

    Attributes:
      name: the model's, for the table.
      model: its architecture.
      topology: the slice.
      data, parts: the mesh that is used: parts of the batch, and of the model; data x parts is at
        most the slice's devices.
      batch: rows, a multiple of `data`.
      prompt: tokens, padded to their bucket.
      new_tokens: of the answer.
      compression: what is kept of the prompt.

    Raises:
      ValueError: a number out of range, a batch that the mesh does not divide.
    """

    name: str
    model: ModelConfig
    topology: Topology
    data: int
    parts: int
    batch: int
    prompt: int
    new_tokens: int
    compression: CompressionConfig

    def __post_init__(self):
        for name in ("data", "parts", "batch", "prompt", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.data * self.parts > self.topology.devices:
            raise ValueError(
                f"split={self.data}x{self.parts} needs {self.data * self.parts} devices, expected"
                f" at most the {self.topology.devices} of {self.topology.name}"
            )
        if self.batch % self.data:
            raise ValueError(f"batch={self.batch}, expected a multiple of data={self.data}")
        profile = self.compression.profile
        if profile is not None and len(profile) != self.model.num_layers:
            raise ValueError(f"profile has {len(profile)} layers, expected {self.model.num_layers}")

    @property
    def tail_slots(self) -> int:
        """Slots of the tail a row, as `generate` makes it."""
        return bucket(self.new_tokens)

    def with_layers(self, layers: int) -> "Ask":
        """The same with fewer layers, each as the model's first."""
        if len(set(self.model.sliding_windows)) > 1 or self.compression.profile is not None:
            raise ValueError("layers differ, expected a model whose layers are alike")
        windows = self.model.sliding_windows[:1] * layers
        model = dataclasses.replace(self.model, num_layers=layers, sliding_windows=windows)
        return dataclasses.replace(self, model=model)


@dataclass(frozen=True)
class Compiled:
    """What a compiler says of one device's program.

    Attributes:
      arguments, outputs, temporaries: bytes.
      total: bytes that it needs in all; of one that was refused, what the refusal says.
      refused: whether the compiler refused it for want of memory.
      kernels: names of the custom calls that are in it.
      step: operation and bytes of each collective of one decode step.
      layers: depths that were compiled, where the model's own was not (`depth.py`).
    """

    arguments: int
    outputs: int
    temporaries: int
    total: int
    refused: bool
    kernels: tuple[str, ...]
    step: tuple[tuple[str, int], ...]
    layers: tuple[int, ...] = ()


def shapes(ask: Ask, mesh: Mesh) -> tuple[Any, ...]:
    """Arguments of `generate_program`, placed as `kvjax.sharding` would; no arrays."""
    config, rows = ask.model, (ask.batch,)
    model = model_on(config, mesh)
    tokens = jax.ShapeDtypeStruct((*rows, bucket(ask.prompt)), jnp.int32)
    lengths = jax.ShapeDtypeStruct(rows, jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rest = tokens, lengths, key, jax.eval_shape(decode.greedy_rules)
    return model, *jax.tree.map(partial(laid, mesh), rest)


def model_on(config: ModelConfig, mesh: Mesh) -> Decoder:
    """A decoder's shapes, placed on a mesh as its weights would be."""
    model = nnx.eval_shape(lambda: Decoder(config, dtype=DTYPE, rngs=nnx.Rngs(0)))
    if mesh.axis_names != sharding.FITTED:
        return jax.tree.map(partial(laid, mesh), model)
    places = sharding.parameter_places(model, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model, places
    )


def laid(mesh: Mesh, x: jax.ShapeDtypeStruct, axes: str | None = None) -> jax.ShapeDtypeStruct:
    """A shape on a mesh: by its letters, or whole on every device."""
    place = NamedSharding(mesh, PartitionSpec())
    if axes and mesh.axis_names == sharding.FITTED:
        place = sharding.named(axes, x.shape, mesh)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def cache_axes(cache: Cache) -> Cache:
    """The letters of each of a cache's arrays, as `kvjax.sharding` reads them."""
    slots = cache.slots
    if slots is not None:
        scales = slots.scales if slots.scales is None else "B2M"
        slots = slots.replace(
            entries="BME", owners="BM", positions="BM", scales=scales,
            counts="B..",
        )  # fmt: skip
    count = len(cache.tail.keys)
    tail = cache.tail.replace(
        keys=("BKUH",) * count, values=("BKUH",) * count, positions="BU", cursor=""
    )
    return cache.replace(
        layers=tuple(
            layer.replace(keys="BKSH", values="BKSH", positions="BKS") for layer in cache.layers
        ),
        slots=slots,
        tail=tail,
        prompt_lengths="B",
        next_positions="B",
    )


def mesh_for(ask: Ask) -> Mesh:
    """The fitted mesh of the slice's devices; of one device a mesh that splits nothing."""
    return mesh_of_slice(ask.topology, ask.model, ask.data, ask.parts)


def mesh_of_slice(topology: Topology, model: ModelConfig, data: int, parts: int) -> Mesh:
    """`mesh_for`, of data x parts devices."""
    chips = devices(topology.target, topology.slice)
    if data * parts == 1:
        return Mesh(np.array(chips[:1]), ("one",))
    mesh = sharding.make_mesh(data, parts, chips)
    return sharding.fitted(mesh, model.num_heads, model.num_kv_heads)


def compiled(ask: Ask) -> Compiled:
    """The whole `generate`, compiled for the slice: memory, kernels, a step's collectives.

    Raises:
      NotImplementedError: where the target's compiler is not installed.
    """
    mesh = mesh_for(ask)
    sizes = {"new_tokens": ask.new_tokens, "tail_slots": ask.tail_slots, "whole": False}
    with lowering_for(ask.topology.target, mesh):
        arguments = shapes(ask, mesh)
        lowered = generate_program.lower(*arguments, config=ask.compression, **sizes)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _refusal(error)
    memory: Any = program.memory_analysis()
    text = program.as_text() or ""
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        total=total_bytes(memory),
        refused=False,
        kernels=tuple(name for name in KERNELS if name in text),
        step=tuple(collectives(text, "decode")),
    )


def total_bytes(memory: Any) -> int:
    """Bytes of a device while its program runs, from `compiled.memory_analysis()`."""
    parts = ("argument", "output", "temp", "generated_code")
    whole = sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)
    return whole - memory.alias_size_in_bytes


def _refusal(error: jax.errors.JaxRuntimeError) -> Compiled:
    found = _TOO_LARGE.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise error
    number, unit = (group for group in found.groups() if group)
    total = int(float(number) * (GIB if unit == "G" else 2**20))
    return Compiled(0, 0, 0, total, True, (), ())


def step_cost(ask: Ask) -> tuple[float, float] | None:
    """Bytes accessed and flops of the decode loop, whose body a compiler counts once.

    None for a GPU: without one its compiler counts nothing.

    From `cost_analysis()` of the loop compiled alone. Of a kernel of the library's own a compiler
    knows the operands alone, not what of them is read: every layer's call counts the whole pool.
    """
    if ask.topology.platform == "gpu":
        return None
    mesh = mesh_for(ask)
    with lowering_for(ask.topology.target, mesh):
        model, tokens, lengths, key, rules = shapes(ask, mesh)
        with sharding.using(mesh if mesh.axis_names == sharding.FITTED else None):
            made = jax.eval_shape(partial(_prefilled, ask), model, tokens, lengths, key, rules)
        held, answer = made
        held = jax.tree.map(partial(laid, mesh), held, tuple(map(cache_axes, held)))
        answer = jax.tree.map(partial(laid, mesh), answer)
        arguments = model, held[0], held[1].tail, answer, rules
        lowered = decode_program.lower(*arguments, steps=ask.new_tokens - 1)
    found: Any = lowered.compile().cost_analysis()
    return found and (found["bytes accessed"], found["flops"])


def _prefilled(ask, model, tokens, lengths, key, rules):
    logits, cache = prefill.prefill_compress(model, tokens, lengths, key, ask.compression)
    answer = decode.start_answer(logits, tokens, lengths, key, rules, ask.new_tokens)
    return (cache, with_room(cache, ask.tail_slots)), answer
