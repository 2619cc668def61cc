"""Compute bytes and operations of one device, from shapes alone.

Weights, pool and tail are exact: nothing else is known of them before a prompt is seen. What a
prefill needs on the way is an estimate; compilers say it exactly (program.py).
"""

import math
from dataclasses import dataclass
from functools import cache

import jax

from kvjax import sharding
from kvjax.compression.capacity import held_slots, packs, slot_bytes
from kvjax.compression.compress import needs_all_layers, probe_request
from kvjax.generation import prefill
from kvjax.inputs.prompts import bucket
from kvjax.kernels.platform import assume
from kvjax.models.checkpoints.weights import TensorSpec, tensor_specs
from kvjax.models.config import ModelConfig
from kvjax.models.layers import MLP_TOKENS
from kvjax.plan.program import DTYPE, Ask
from kvjax.sharding import HEADS, QUERY_HEADS

_OWNER_AND_POSITION, _POSITION = 5, 4  # bytes of a slot beside its key and value
_WIDTH = DTYPE.itemsize


@dataclass(frozen=True)
class Held:
    """Bytes of a device that are held while decoding: weights, kept entries, room for new ones."""

    weights: int
    pool: int
    tail: int


@dataclass(frozen=True)
class Step:
    """One decode step of one device.

    Attributes:
      bytes: weights, pool and tail, each read once, the whole tail included.
      flops: twice the weights times rows, and four a slot, head width and query head (packed: of
        every query head with every slot, whoever owns it).
      seconds: at least; what the memory or the matrix units take, whichever is slower.
    """

    bytes: int
    flops: int
    seconds: float


def held(ask: Ask) -> Held:
    """What a device holds, exactly."""
    mesh, rows = _mesh(ask), ask.batch // ask.data
    model, tokens = ask.model, bucket(ask.prompt)
    row = 2 * model.head_dim * _WIDTH * model.num_kv_heads // mesh.shape[HEADS]
    tail = rows * ask.tail_slots * (model.num_layers * row + _POSITION)
    return Held(_weights(model, ask.data, ask.parts)[0], rows * _pool_of_a_row(ask, tokens), tail)


def _pool_of_a_row(ask: Ask, tokens: int) -> int:
    model, config = ask.model, ask.compression
    shape = config, tokens, model.sliding_windows, model.num_kv_heads
    with assume(ask.topology.platform):
        slots = held_slots(*shape, parts=ask.parts)
        packed = packs(config) and not config.skips(tokens)
    entry = slot_bytes(config, tokens, model.head_dim, _WIDTH)
    if packed:
        counts = 4 * model.num_layers * model.num_kv_heads
        return slots // ask.parts * (entry + _OWNER_AND_POSITION) + counts
    return slots // _mesh(ask).shape[HEADS] * (entry + _POSITION)


def _mesh(ask: Ask) -> jax.sharding.AbstractMesh:
    return sharding.abstract(ask.data, ask.parts, ask.model.num_heads, ask.model.num_kv_heads)


@cache
def _weights(config: ModelConfig, data: int, parts: int) -> tuple[int, int]:
    """Bytes of a device's parameters, and of those that every step reads whole."""
    mesh = sharding.abstract(data, parts, config.num_heads, config.num_kv_heads)

    def size(spec: TensorSpec) -> int:
        place = sharding.named(spec.axes, spec.shape, mesh)
        return math.prod(place.shard_shape(spec.shape)) * _WIDTH

    sizes = {spec.attribute: size(spec) for spec in tensor_specs(config).values()}
    total = sum(sizes.values())
    return total, total - (0 if config.tie_word_embeddings else sizes["embed.table_VD"])


def prefill_estimate(ask: Ask) -> int:
    """Bytes of a device that prefill needs on the way, roughly: one layer's, and the logits.

    Hidden states before and after the layer, its queries, keys, values and output, the MLP's two
    activations; every layer's keys and values where compression waits for the last one.
    """
    mesh, model, tokens = _mesh(ask), ask.model, bucket(ask.prompt)
    rows = ask.batch // ask.data
    group = rows // prefill._groups(rows, tokens)
    keys = 2 * model.num_kv_heads * model.head_dim // mesh.shape[HEADS]
    queries = model.num_heads * model.head_dim
    queries //= math.prod(mesh.shape[axis] for axis in QUERY_HEADS)
    wide = model.intermediate_size // ask.parts
    one = group * tokens * (3 * model.hidden_size + 2 * queries + keys)
    mlp = min(group * tokens, MLP_TOKENS) * (2 * wide + model.hidden_size)
    config = ask.compression
    waits = not config.keeps_all(tokens) and needs_all_layers(config)
    waits |= probe_request(config, tokens).repeat is not None
    every = (model.num_layers - 1) * group * tokens * keys if waits else 0
    return _WIDTH * (max(one, mlp) + every) + 4 * rows * model.vocab_size // ask.parts


def total_estimate(ask: Ask) -> int:
    """Bytes of a device in all, without a compiler."""
    parts = held(ask)
    return parts.weights + parts.pool + parts.tail + prefill_estimate(ask)


def step(ask: Ask) -> Step:
    """What one decode step costs a device, from shapes."""
    parts, mesh, model, tokens = held(ask), _mesh(ask), ask.model, bucket(ask.prompt)
    rows, config = ask.batch // ask.data, ask.compression
    read = _weights(model, ask.data, ask.parts)[1]
    heads = model.num_heads // math.prod(mesh.shape[axis] for axis in QUERY_HEADS)
    with assume(ask.topology.platform):
        slots = held_slots(config, tokens, model.sliding_windows, model.num_kv_heads)
        packed = packs(config) and not config.skips(tokens)
    if packed:
        pairs = model.num_heads * -(-slots // ask.parts)
    else:
        pairs = heads * slots // model.num_kv_heads
    pairs += heads * ask.tail_slots * model.num_layers
    flops = rows * (2 * (read // _WIDTH) + 4 * model.head_dim * pairs)
    moved = read + parts.pool + parts.tail
    chip = ask.topology
    return Step(moved, flops, max(moved / chip.bandwidth, flops / chip.flops))
