"""Place arrays on a mesh: which letter of an array's axes is split over which chips.

A user's mesh has two axes, `data` (rows of the batch) and `model` (parts of the model). For a model
of N query and K KV heads `fitted` splits the second one into three,

    model = heads x group x rest

where `heads` splits the KV heads, `group` the query heads of one KV head (when there are fewer KV
heads than chips) and `rest` is what no head is left for. KV heads are then repeated over `group`
and `rest` alone, every chip has the keys that its query heads need, and no axis is split unevenly.

Nothing here knows of models or caches; whatever is traced under `using(mesh)` is placed, and
everything else is left as it is.
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

USERS = ("data", "model")
DATA, HEADS, GROUP, REST = FITTED = ("data", "heads", "group", "rest")
MODEL = (HEADS, GROUP, REST)
QUERY_HEADS = (HEADS, GROUP)

# Axis letter -> mesh axes that split it; every other letter is whole on each chip. Of parameters
# the letters end the attribute's name: q_DX, k_DY, o_XD, gate_DF, down_FD, table_VD, scale_D.
# B, F, V and M are whole too where the mesh axes do not divide them; heads always divide.
AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "B": (DATA,),  # rows
        "N": QUERY_HEADS,
        "X": QUERY_HEADS,  # query heads side by side, N H
        "K": (HEADS,),  # KV heads: of keys, values, scores, allocation, tail
        "Y": (HEADS,),  # KV heads side by side, K H
        "F": MODEL,  # the MLP's width
        "V": MODEL,  # vocabulary
        "M": MODEL,  # slots of the packed layout, whoever owns them
    }
)


# ---------------------------------------------------------------------------- meshes
def make_mesh(data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x model devices, neighbours along `model`.

    Args:
      data: parts that the batch is split into, at least 1.
      model: parts that the model is split into, at least 1.
      devices: the first data x model of them are used; all that JAX sees by default.

    Raises:
      ValueError: more devices than there are, or fewer than one.
    """
    found = jax.devices() if devices is None else list(devices)
    for name, size in (("data", data), ("model", model)):
        if size < 1:
            raise ValueError(f"{name}={size}, expected at least 1")
    if data * model > len(found):
        raise ValueError(
            f"data={data} and model={model} need {data * model} devices, expected at most"
            f" {len(found)}"
        )
    grid = np.array(found[: data * model]).reshape(data, model)
    return Mesh(grid, USERS, axis_types=(AxisType.Auto,) * 2)


def fitted(mesh: Mesh, heads: int, kv_heads: int) -> Mesh:
    """The same devices, with `model` split for a model of these query and KV heads.

    Raises:
      ValueError: a mesh with other axes than `data` and `model`.
    """
    if mesh.axis_names == FITTED:
        mesh = Mesh(mesh.devices.reshape(mesh.devices.shape[0], -1), USERS)
    if set(mesh.axis_names) - set(USERS) or not mesh.axis_names:
        raise ValueError(f"mesh has axes {mesh.axis_names}, expected 'data' and 'model'")
    order = [mesh.axis_names.index(name) for name in USERS if name in mesh.axis_names]
    data, model = (mesh.shape.get(name, 1) for name in USERS)
    grid = mesh.devices.transpose(order).reshape(data, *_split(model, heads, kv_heads))
    return Mesh(grid, FITTED, axis_types=(AxisType.Auto,) * 4)


def abstract(data: int, model: int, heads: int, kv_heads: int) -> AbstractMesh:
    """What `fitted` makes of data x model devices, without any: for shapes alone."""
    sizes = data, *_split(model, heads, kv_heads)
    return AbstractMesh(sizes, FITTED, axis_types=(AxisType.Auto,) * 4)


def _split(model: int, heads: int, kv_heads: int) -> tuple[int, int, int]:
    by_head = math.gcd(kv_heads, model)
    by_query = math.gcd(heads // kv_heads, model // by_head) if by_head == kv_heads else 1
    return by_head, by_query, model // (by_head * by_query)


def mesh_of(tree: Any) -> Mesh | None:
    """The fitted mesh on which the first array of a model or a cache lies, or None."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == FITTED:
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
        if sharding is not None:
            return None
    return None


def using(mesh: Mesh | AbstractMesh | None) -> AbstractContextManager:
    """Inside, what is traced is placed on a fitted mesh; None changes nothing.

    Arguments of what is traced lie on the mesh's devices (`place`, `put_on_mesh`).
    """
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current() -> AbstractMesh | None:
    """The fitted mesh that what is being traced will run on; None also within `by_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != FITTED or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def on_device() -> bool:
    """Whether what is being traced is one device's part of something (`by_device` on a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == FITTED and AxisType.Manual in mesh.axis_types


def parts(axes: tuple[str, ...] = MODEL) -> int:
    """Devices along these axes of the mesh that is traced for; 1 without one."""
    mesh = current()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


# ---------------------------------------------------------------------------- placing
def spec(axes: str, sizes: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where an array lies, from one letter an axis, such as "BTKH", and its shape."""
    placed = []
    for letter, size in zip(axes, sizes, strict=True):
        names = AXES.get(letter, ())
        fits = names and size % math.prod(mesh.shape[name] for name in names) == 0
        placed.append(names if fits else None)
    return PartitionSpec(*placed)


def named(axes: str, sizes: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """`spec` on this mesh."""
    return NamedSharding(mesh, spec(axes, sizes, mesh))


def constrain(x: Array, axes: str) -> Array:
    """The array, placed by its letters where a mesh is in use."""
    mesh = current()
    return x if mesh is None else lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def replicated(tree: Any) -> Any:
    """The arrays, whole on every device where a mesh is in use: what a host is going to read."""
    if current() is None:
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, PartitionSpec()), tree)


def parameter_axes(name: str) -> str:
    """The letters that end an attribute's name: "DX" of "layers.3.attention.q_DX"."""
    found = re.search(r"_([A-Z]+)$", name)
    if found is None:
        raise ValueError(f"parameter {name!r}, expected a name that ends in axis letters (q_DX)")
    return found[1]


def place(model: Any, mesh: Mesh | None) -> Any:
    """The model with its parameters on the devices of a mesh (itself where they are already).

    Args:
      model: a pytree whose parameters' names end in axis letters, with `config.num_heads` and
        `config.num_kv_heads`.
      mesh: with axes `data` and `model`, or fitted; None changes nothing.
    """
    if mesh is None:
        return model
    mesh = fitted(mesh, model.config.num_heads, model.config.num_kv_heads)
    if mesh_of(model) == mesh:
        return model
    return jax.tree.map(put_whole, model, parameter_places(model, mesh))


def parameter_places(model: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Where each parameter of a model, or of its shapes, lies on a fitted mesh."""

    def where(path, x):
        names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
        name = next(name for name in reversed(names) if re.search(r"_[A-Z]+$", name))
        return named(parameter_axes(name), x.shape, mesh)

    return jax.tree_util.tree_map_with_path(where, model)


def put_on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of a host's own, whole on every device of the mesh; what is on it stays as it is.

    Where the mesh spans hosts all of them bring the same arrays. None changes nothing.
    """
    if mesh is None:
        return tree

    def put(x):
        placed = getattr(x, "sharding", None)
        if isinstance(placed, NamedSharding) and placed.mesh == mesh:
            return x
        return put_whole(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, tree)


def put_whole(x: Any, placed: NamedSharding) -> Array:
    """An array that every host has, as one on a mesh.

    `jax.device_put` would have all processes compare it, also those that this mesh is not of.
    """
    if placed.is_fully_addressable:
        return jax.device_put(x, placed)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put_whole(jax.random.key_data(x), placed)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, placed, lambda index: x[index])


# ---------------------------------------------------------------------------- device by device
def by_device(function: Callable, equation: str, *arrays: Array) -> Any:
    """Call a function on every device with its own parts of the arrays, where a mesh is in use.

    Args:
      function: from local arrays to local arrays; it may use collectives over the mesh's axes.
      equation: the letters of each array and result, such as "BTNH,BTKH,B->BTNH,BNT".
      arrays: whole ones.
    """
    mesh = current()
    if mesh is None:
        return function(*arrays)
    inputs, outputs = (side.split(",") for side in equation.split("->"))
    sizes: dict[str, int] = {}
    for axes, x in zip(inputs, arrays, strict=True):
        sizes |= zip(axes, x.shape, strict=True)
    ins = tuple(spec(axes, x.shape, mesh) for axes, x in zip(inputs, arrays, strict=True))
    outs = tuple(spec(axes, [sizes.get(a, 1) for a in axes], mesh) for axes in outputs)
    out_specs = outs if len(outs) > 1 else outs[0]
    return jax.shard_map(function, in_specs=ins, out_specs=out_specs, check_vma=False)(*arrays)


def across_group(x: Array, how: str | None) -> Array:
    """Within `by_device`, what the query heads of one KV head say on all of its devices.

    `how` is "mean" or "max", over equally many query heads a device; None leaves x as it is.
    """
    if how is None or not on_device() or jax.sharding.get_abstract_mesh().shape[GROUP] == 1:
        return x
    return lax.pmax(x, GROUP) if how == "max" else lax.pmean(x, GROUP)
