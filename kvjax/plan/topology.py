"""Chips and slices, from their makers' public specifications.

TPUs: cloud.google.com/tpu/docs, the pages of v5e, v5p, v6e and tpu7x: HBM, its bandwidth and peak
bf16 of a chip. GPUs: NVIDIA's data sheets of the H100 and the H200, SXM, dense bf16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvjax.kernels.platform import Platform

GIB = 2**30


@dataclass(frozen=True)
class Topology:
    """A slice of a TPU, or one GPU.

    Attributes:
      name: as users say it.
      target: of `kvjax.compile_for`.
      slice: the compiler's name of the slice, None for one GPU.
      devices: that JAX sees (a tpu7x chip is two of them).
      memory: GB of a device's HBM, as its maker says.
      room: bytes of it that a program may take.
      bandwidth: bytes a second of a device's HBM.
      flops: bf16 operations a second of a device.
    """

    name: str
    target: str
    slice: str | None
    devices: int
    memory: int
    room: int
    bandwidth: float
    flops: float

    @property
    def platform(self) -> Platform:
        """Whose kernels programs get."""
        return "tpu" if self.slice else "gpu"


# target: HBM, room, bandwidth, bf16 flop/s of a device. A TPU's room is what its compiler allows,
# as it says itself ("exceeds available HBM (15.75G)"). Of a GPU 1 GiB is for CUDA's context and
# the libraries' workspaces; drivers report some 6 % more than the data sheets.
_CHIPS = {
    "v5e": (16, int(15.75 * GIB), 819e9, 197e12),
    "v5p": (95, int(95.73 * GIB), 2765e9, 459e12),
    "v6e": (32, int(31.24 * GIB), 1640e9, 918e12),
    "tpu7x": (96, int(94.74 * GIB), 3690e9, 1153.5e12),
    "h100": (80, 80 * 10**9 - GIB, 3350e9, 989e12),
    "h200": (141, 141 * 10**9 - GIB, 4800e9, 989e12),
}
_SLICES = {
    "v5e-4": ("v5e", "v5e:2x2", 4),
    "v5e-8": ("v5e", "v5e:2x4", 8),
    "v5e-256": ("v5e", "v5e:16x16", 256),
    "v5p-4": ("v5p", "v5p:2x2x1", 4),
    "v6e-1": ("v6e", "v6e:2x2", 1),  # one chip of it
    "v6e-4": ("v6e", "v6e:2x2", 4),
    "v6e-8": ("v6e", "v6e:2x4", 8),
    "v6e-256": ("v6e", "v6e:16x16", 256),
    "tpu7x-4": ("tpu7x", "tpu7x:2x2x1", 8),
    "h100": ("h100", None, 1),
    "h200": ("h200", None, 1),
}
TOPOLOGIES: Mapping[str, Topology] = MappingProxyType(
    {
        name: Topology(name, target, part, devices, *_CHIPS[target])
        for name, (target, part, devices) in _SLICES.items()
    }
)
# Devices that servers are planned for and that nothing is compiled for: NVIDIA's data sheet of the
# L4, dense bf16.
CARDS: Mapping[str, Topology] = MappingProxyType(
    {"l4": Topology("l4", "l4", None, 1, 24, 24 * 10**9 - GIB, 300e9, 121e12)}
)
