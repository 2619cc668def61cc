"""Compiling for a TPU or a GPU on a machine that has neither.

Real compile errors, memory figures and HLO, from libtpu and from the CUDA plugin, on a plain CPU
(`pip install kvjax[ahead]`; run with JAX_PLATFORMS=cpu).
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kvjax.kernels.platform import assume

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TARGETS = (*TPUS, "h200")

_CUDNN = 91000  # as in the description below
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def missing(target: str) -> str | None:
    """Why `target` cannot be compiled for here, or None.

    Raises:
      ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}, expected one of {', '.join(TARGETS)}")
    needed = ("libtpu",) if target in TPUS else ("jax_cuda13_plugin", "jax_triton", "triton")
    absent = [name for name in needed if find_spec(name) is None]
    return f"needs {', '.join(absent)} (kvjax[ahead])" if absent else None


def devices(target: str, topology: str | None = None) -> list[Any]:
    """The target's devices, which nothing can run on; of a TPU slice such as "v6e:2x4"."""
    if (reason := missing(target)) is not None:
        raise NotImplementedError(f"target {target} {reason}")
    if target in TPUS:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        name = topology or TPUS[target]
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    else:
        # Triton warns where this is not set; 1 is what it does by itself.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="h200", topology="1x1x1", target_config=_H200
        )
    return list(found.devices)


def compile_for(
    target: str, function: Callable, *shapes: Any, topology: str | None = None, **settings: Any
) -> Any:
    """`function` compiled for one chip of `target`, or for all of a TPU slice.

    Args:
      target: one of TARGETS.
      function: from arrays to arrays.
      shapes: trees of `jax.ShapeDtypeStruct`.
      topology: a slice, such as "v6e:2x4": the first tree (the weights) is on every chip, the
        others and the result are split along their first axis.
      settings: of `jax.jit`, such as donate_argnums.

    Returns:
      What `jax.stages.Lowered.compile` returns: `as_text()`, `memory_analysis()` of one chip.
    """
    chips = devices(target, topology)
    mesh = Mesh(np.array(chips if topology else chips[:1]), ("rows",))
    split = [PartitionSpec("rows")] if topology else [PartitionSpec()]
    specs = [PartitionSpec(), *split * len(shapes)][: len(shapes)]
    placed = [
        jax.tree.map(partial(_placed, NamedSharding(mesh, spec)), shape)
        for spec, shape in zip(specs, shapes, strict=True)
    ]
    if topology:
        function = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=PartitionSpec("rows"),
            check_vma=False,
        )
    with _lowering_for(target, chips[0], mesh), assume("tpu" if target in TPUS else "gpu"):
        lowered = jax.jit(function, **settings).lower(*placed)
    return lowered.compile()


def _placed(sharding: NamedSharding, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@contextlib.contextmanager
def _lowering_for(target: str, chip: Any, mesh: Mesh) -> Iterator[None]:
    """Some kernels ask for the chip's generation, or for cuDNN, while they are lowered."""
    if target not in TPUS:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        check = fused.check_cudnn_version
        fused.check_cudnn_version = lambda: _CUDNN
        try:
            yield
        finally:
            fused.check_cudnn_version = check
        return
    kind = AbstractDevice(device_kind=chip.device_kind, num_cores=1, platform="tpu")
    types = (AxisType.Auto,)
    abstract = AbstractMesh(
        mesh.devices.shape, mesh.axis_names, axis_types=types, abstract_device=kind
    )
    with jax.sharding.use_abstract_mesh(abstract):
        yield
