"""Compiling for a TPU or a GPU on a machine that has neither.

Real compile errors, memory figures and HLO, from libtpu and from the CUDA plugin, on a plain CPU
(`pip install kvjax[ahead]`; run with JAX_PLATFORMS=cpu). Kernels choose their platform where they
run, so what is compiled here names its implementation.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TARGETS = (*TPUS, "h200")
# What jax-triton has to be told where there is no GPU to ask.
TRITON_OPTIONS = {"compute_capability": 90, "backend_options": {"ptx_version": 90}}

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


def devices(target: str) -> list[Any]:
    """The target's devices, which nothing can run on."""
    if (reason := missing(target)) is not None:
        raise NotImplementedError(f"target {target} {reason}")
    if target in TPUS:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        found = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target])
    else:
        # Triton warns where this is not set; 1 is what it does by itself.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="h200", topology="1x1x1", target_config=_H200
        )
    return list(found.devices)


def compile_for(target: str, function: Callable, *shapes: Any, **settings: Any) -> Any:
    """`function` compiled for one chip of `target`.

    Args:
      target: one of TARGETS.
      function: from arrays to arrays.
      shapes: trees of `jax.ShapeDtypeStruct`.
      settings: of `jax.jit`, such as donate_argnums.

    Returns:
      What `jax.stages.Lowered.compile` returns: `as_text()`, `memory_analysis()`.
    """
    chip = devices(target)[0]
    place = NamedSharding(Mesh(np.array([chip]), ("x",)), PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with _lowering_for(target, chip):
        lowered = jax.jit(function, **settings).lower(*placed)
    return lowered.compile()


@contextlib.contextmanager
def _lowering_for(target: str, chip: Any) -> Iterator[None]:
    """Some kernels ask for the chip's generation while they are lowered."""
    if target not in TPUS:
        yield
        return
    kind = AbstractDevice(device_kind=chip.device_kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):
        yield
