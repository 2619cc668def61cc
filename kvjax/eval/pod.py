"""Share an evaluation among processes: on a TPU slice, under Slurm, or by hand.

Processes form teams: as many as a copy of the model needs, mostly one. Every team evaluates its
share of the documents on its own devices, and its first process writes a file: no team waits for
another, and one that dies leaves what it finished.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool

from kvjax.sharding import make_mesh

# By hand: these and JAX_COORDINATOR_ADDRESS=host:port.
COUNT, INDEX = "KVJAX_PROCESSES", "KVJAX_PROCESS"
# Teams end when they end: none is torn down for being a day ahead of the others.
PATIENCE = 86_400


@dataclass(frozen=True)
class Workers:
    """Whose documents this process evaluates, and on which devices.

    Attributes:
      index, count: its team and how many there are; a team takes every count-th document.
      member: which process of the team it is; the first one writes and speaks.
      mesh: the team's devices, None for JAX's default one.
    """

    index: int = 0
    count: int = 1
    member: int = 0
    mesh: Mesh | None = None

    @property
    def speaks(self) -> bool:
        """Whether this process is the one that talks to the terminal."""
        return self.index == 0 and self.member == 0

    def agreed(self, found: Bool[np.ndarray, " X"]) -> Bool[np.ndarray, " X"]:
        """What any process of the team has found: hosts may not share a disk."""
        if self.mesh is None or not self.mesh.is_multi_process or not found.size:
            return found
        return _any_of(self.mesh, found)


ALONE = Workers()


def join() -> None:
    """Initialise `jax.distributed` from the environment; call it before anything touches a device.

    Cloud TPU slices, Slurm, Open MPI and Kubernetes are recognised by JAX itself; elsewhere
    KVJAX_PROCESSES, KVJAX_PROCESS and JAX_COORDINATOR_ADDRESS say what they would.

    Raises:
      ValueError: the environment says nothing of the kind, or half of it.
    """
    given = {name: os.environ.get(name) for name in (COUNT, INDEX, "JAX_COORDINATOR_ADDRESS")}
    by_hand = given[COUNT] is not None or given[INDEX] is not None
    if by_hand:
        for name, value in given.items():
            if not value or (name in (COUNT, INDEX) and not value.isdecimal()):
                what = "host:port" if name.startswith("JAX") else "an integer"
                raise ValueError(f"{name}={value!r}, expected {what} in the environment")
    count, index = (int(given[name] or 0) for name in (COUNT, INDEX))
    if by_hand and index >= count:
        raise ValueError(f"{INDEX}={index}, expected less than {COUNT}={count}")
    settings: dict[str, Any] = {"shutdown_timeout_seconds": PATIENCE}
    if by_hand:
        settings |= {"num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(**settings)
    except ValueError as error:
        raise ValueError(
            f"--distributed found no cluster ({str(error).rstrip('.')}), expected a TPU slice,"
            f" Slurm, or {COUNT}, {INDEX} and JAX_COORDINATOR_ADDRESS"
        ) from None


def workers(split: int | None = None) -> Workers:
    """This process's place among all of them.

    Args:
      split: devices that each copy of the model is split over. A process whose devices hold
        several copies splits its batches over them; where a copy needs more devices than a process
        has, that many processes are a team. None: each process on its first device alone.

    Raises:
      ValueError: a number that does not divide a process's devices, nor is a multiple of them, or
        that does not divide all devices into teams.
    """
    if split is None:
        return Workers(jax.process_index(), jax.process_count())
    own, all_devices = jax.local_device_count(), jax.devices()
    together = max(1, split // own)
    if split < 1 or (own % split and split % own) or jax.process_count() % together:
        raise ValueError(
            f"--split {split}, expected a divisor of the {own} devices of a process, or a multiple"
            f" of them that divides all {len(all_devices)}"
        )
    index, member = divmod(jax.process_index(), together)
    mine = range(index * together, (index + 1) * together)
    devices = [device for device in all_devices if device.process_index in mine]
    mesh = make_mesh(len(devices) // split, split, _in_order(devices))
    return Workers(index, jax.process_count() // together, member, mesh)


def _in_order(devices: Sequence[Any]) -> list[Any]:
    """Host after host, so that neighbours of a mesh are on one host."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def _any_of(mesh: Mesh, found: Bool[np.ndarray, " X"]) -> Bool[np.ndarray, " X"]:
    """Every process brings a row of its own for each of its devices; any of them counts."""
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (math.prod(mesh.devices.shape), found.size)
    local = jax.make_array_from_callback(shape, rows, lambda _: found[None])
    whole = NamedSharding(mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda x: x.any(0), out_shardings=whole)(local))
