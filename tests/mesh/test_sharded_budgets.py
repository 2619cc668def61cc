"""KV heads split over a mesh: chips exchange counts, never scores.

Sizes and masks are those of one device, bit for bit. What chips send each other is read off the
compiled programs: a number a head at most, whatever the prompt's length.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax import exact
from kvjax.compression import allocators

B, L, K, S = 2, 3, 8, 512
MESHES = {"model": (1, 8), "data and model": (2, 4)}
LENGTHS = np.array([S, 300])
# A number for every head of a layer, and of all layers: far below S.
HEADS, ALL_HEADS = B * K, B * L * K
WHOLE_NUMBERS = ("s32", "u32", "pred")

EXCHANGES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
)
OPERATION = re.compile(rf"= (.+?) ({'|'.join(EXCHANGES)}|sort)(?:-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Result(NamedTuple):
    """One result of an operation, as it is on each chip."""

    operation: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def results(text: str) -> tuple[list[Result], list[Result]]:
    """What exchanges between chips result in, and what sorts do, in a compiled program."""
    found = []
    for line in text.splitlines():
        for arrays, operation in OPERATION.findall(line):
            for dtype, shape in ARRAY.findall(arrays):
                axes = tuple(int(size) for size in shape.split(",") if size)
                found.append(Result(operation, dtype, axes))
    sorts = [result for result in found if result.operation == "sort"]
    return [result for result in found if result.operation != "sort"], sorts


# ---------------------------------------------------------------------------- programs
# As `compress` calls them: what is eligible comes from lengths, the same for all heads.
def ada(scores, can_BS, base):
    """One layer, capped."""
    can = jnp.broadcast_to(can_BS[:, None], scores.shape)
    sizes = allocators.ada_heads(scores, can, base, floor=0.2, cap=base + 60)
    return sizes, exact.select_top(scores, sizes, can)


def globally(scores, can_BS, base):
    can = jnp.broadcast_to(can_BS[:, None, None], scores.shape)
    sizes = allocators.global_heads(scores, can, L * K * base)
    return sizes, exact.select_top(scores, sizes, can)


def jointly(scores, can_BS, base):
    can = jnp.broadcast_to(can_BS[:, None, None], scores.shape)
    sizes = allocators.joint_heads(scores, can, base, L * K * base, floor=0.2)
    return sizes, exact.select_top(scores, sizes, can)


def prefix(scores, can_BS, base):
    """Each layer's scores are its heads' mean; sizes are the layer's."""
    means = jnp.stack([scores[:, layer].mean(1) for layer in range(L)], axis=1)
    can = jnp.broadcast_to(can_BS[:, None], means.shape)
    sizes = allocators.prefix_layers(means, can, jnp.full((B, L), 2, jnp.int32), base)
    each = jnp.broadcast_to(sizes[..., None], scores.shape[:-1])
    return sizes, exact.select_top(scores, each, jnp.broadcast_to(can[:, :, None], scores.shape))


def by_sorting(scores, can_BS, base):
    """What the others must not be: heads that are compared by sorting all of their scores."""
    worst_first = jnp.where(can_BS[:, None], scores, -1.0).reshape(B, -1).argsort(-1)
    rank = jnp.arange(K * S)
    kept = (
        jnp.zeros((B, K * S), bool)
        .at[jnp.arange(B)[:, None], worst_first]
        .set(rank >= K * S - K * base[:, None])
    )
    return kept.reshape(B, K, S).sum(-1)


def split(mesh: str, arrays, heads_axis: int) -> list[jax.Array]:
    """Rows over the mesh's axis "data", the scores' heads over "model"."""
    devices = np.array(jax.devices()[:8]).reshape(MESHES[mesh])
    scores, *rest = (PartitionSpec("data", *[None] * (array.ndim - 1)) for array in arrays)
    scores = PartitionSpec("data", *[None] * (heads_axis - 1), "model")
    return [
        jax.device_put(array, NamedSharding(Mesh(devices, ("data", "model")), spec))
        for array, spec in zip(arrays, (scores, *rest), strict=True)
    ]


def drawn(kind: str, layers: bool) -> tuple[np.ndarray, ...]:
    """Scores, what is eligible of a full and a shorter row, and budgets.

    Scores are multiples of 2^-10, so that a mean over heads is exact in any order.
    """
    rng = np.random.default_rng(7)
    shape = (B, L, K, S) if layers else (B, K, S)
    if kind == "heavy":
        scores = rng.gamma(0.3, size=shape) * 4.0 ** rng.normal(size=(*shape[:-1], 1))
        scores = np.minimum(np.ceil(scores * 1024) / 1024, 60)
    else:  # ties, within heads and between them
        scores = rng.integers(0, 6, shape) / 4
    can_BS = np.arange(S) < LENGTHS[:, None]
    return scores.astype(np.float32), can_BS, np.array([100, 41], np.int32)


def compiled(mesh: str, function, layers: bool):
    """Exchanges and sorts of the program on a mesh, whose results are one device's bit for bit."""
    axis = 2 if layers else 1
    arguments = split(mesh, drawn("heavy", layers), axis)
    program = jax.jit(function).lower(*arguments).compile()
    alone = jax.jit(function)
    for kind in ("heavy", "tied"):
        arrays = drawn(kind, layers)
        expected = alone(*arrays)
        jax.tree.map(np.testing.assert_array_equal, program(*split(mesh, arrays, axis)), expected)
    sizes = np.asarray(jax.tree.leaves(expected)[0])
    assert len(np.unique(sizes[0])) > 1
    return results(program.as_text())


# ---------------------------------------------------------------------------- what chips exchange
on_meshes = pytest.mark.parametrize("mesh", sorted(MESHES))


@on_meshes
def test_ada_exchanges_counts_and_a_mass_a_head(mesh):
    exchanges, sorts = compiled(mesh, ada, layers=False)
    assert max(one.size for one in exchanges) <= HEADS
    masses = [one for one in exchanges if one.dtype not in WHOLE_NUMBERS]
    assert [(one.operation, one.dtype) for one in masses] == [("all-gather", "f32")]
    assert {one.operation for one in exchanges} == {"all-reduce", "all-gather"}
    # Heads by their mass: nothing as long as a prompt.
    assert max(one.size for one in sorts) <= HEADS


@on_meshes
def test_global_exchanges_counts_alone_and_sorts_nothing(mesh):
    exchanges, sorts = compiled(mesh, globally, layers=True)
    assert {one.dtype for one in exchanges} <= set(WHOLE_NUMBERS)
    assert {one.operation for one in exchanges} == {"all-reduce", "all-gather"}
    assert max(one.size for one in exchanges) <= ALL_HEADS
    assert sorts == []


@on_meshes
def test_joint_exchanges_counts_and_a_share_a_head(mesh):
    """Each chip sorts its own heads' curves, one by one."""
    exchanges, sorts = compiled(mesh, jointly, layers=True)
    assert max(one.size for one in exchanges) <= ALL_HEADS
    shares = [one for one in exchanges if one.dtype not in WHOLE_NUMBERS]
    assert [(one.operation, one.dtype) for one in shares] == [("all-gather", "f32")]
    assert {one.operation for one in exchanges} == {"all-reduce", "all-gather"}
    rows, heads = MESHES[mesh]
    long = [one for one in sorts if one.size > ALL_HEADS]
    assert [one.shape for one in long] == [(B // rows, L, K // heads, S)]


@on_meshes
def test_prefix_exchanges_each_layer_s_mean_once(mesh):
    """Its curves are of the mean over heads: one all-reduced number a layer and token, after
    which every chip sorts all layers' curves."""
    exchanges, sorts = compiled(mesh, prefix, layers=True)
    means = [one for one in exchanges if one.size > ALL_HEADS]
    rows = B // MESHES[mesh][0]
    assert {(one.operation, one.dtype) for one in means} == {("all-reduce", "f32")}
    assert sum(one.size for one in means) == rows * L * S
    assert [one.shape for one in sorts if one.size > ALL_HEADS] == [(rows, L, S)]


@on_meshes
def test_a_sort_over_heads_would_gather_scores(mesh):
    """So the readings above can fail."""
    exchanges, sorts = compiled(mesh, by_sorting, layers=False)
    rows = B // MESHES[mesh][0]
    assert max(one.size for one in exchanges) >= rows * K * S
    assert max(one.size for one in sorts) >= rows * K * S


def test_the_reading_of_programs():
    text = """
      %a.1 = s32[2]{0} all-reduce(%b), channel_id=1, to_apply=%all-reduce-add
      %c = (f32[2,8]{1,0}, s32[2,8]{1,0}) sort(%d, %e), dimensions={1}, is_stable=true
      ROOT %f = (f32[], pred[3,4,5]{2,1,0:T(8,128)}) all-gather-start(%g), channel_id=3
      %h = f32[9]{0} fusion(%all-gather.1), kind=kLoop, calls=%sort_fusion
    """
    exchanges, sorts = results(text)
    assert [one.shape for one in exchanges] == [(2,), (), (3, 4, 5)]
    assert [one.size for one in exchanges] == [2, 1, 60]
    assert sorts == [("sort", "f32", (2, 8)), ("sort", "s32", (2, 8))]
