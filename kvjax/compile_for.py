"""Compile for a TPU or a GPU on a machine that has neither.

Real compile errors, memory figures and HLO, from libtpu and from the CUDA plugin, on a plain CPU
(`pip install kvjax[ahead]`; run with JAX_PLATFORMS=cpu).
"""

import contextlib
import math
import os
import re
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
TARGETS = (*TPUS, "h200")  # what kernels are tested for

_CUDNN = 91000  # as in the description below
_HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: %(bandwidth)d l2_cache_size: %(l2)d clock_rate_ghz: 1.98
  device_memory_size: %(memory)d shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA %(name)s"
"""
# The same chip (132 cores) beside other memory: NVIDIA's data sheets, and what drivers report.
_GPUS = {
    "h200": {"name": "H200", "bandwidth": 4.8e12, "l2": 62_914_560, "memory": 150e9},
    "h100": {"name": "H100", "bandwidth": 3.35e12, "l2": 52_428_800, "memory": 85e9},
}


def missing(target: str) -> str | None:
    """Why `target` cannot be compiled for here, or None.

    Raises:
      ValueError: an unknown target.
    """
    if target not in (*TPUS, *_GPUS):
        raise ValueError(f"target={target!r}, expected one of {', '.join((*TPUS, *_GPUS))}")
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
            platform="cuda",
            topology_name=target,
            topology="1x1x1",
            target_config=_HOPPER % _GPUS[target],
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
    with lowering_for(target, mesh):
        lowered = jax.jit(function, **settings).lower(*placed)
    return lowered.compile()


def _placed(sharding: NamedSharding, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@contextlib.contextmanager
def lowering_for(target: str, mesh: Mesh) -> Iterator[None]:
    """Inside, what is lowered gets the kernels of `target`, for the devices of this mesh.

    Some kernels ask for the chip's generation, or for cuDNN, while they are lowered.
    """
    if target not in TPUS:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        check = fused.check_cudnn_version
        fused.check_cudnn_version = lambda: _CUDNN
        try:
            with assume("gpu"):
                yield
        finally:
            fused.check_cudnn_version = check
        return
    chip = mesh.devices.flat[0]
    kind = AbstractDevice(device_kind=chip.device_kind, num_cores=1, platform="tpu")
    types = (AxisType.Auto,) * len(mesh.axis_names)
    abstract = AbstractMesh(
        mesh.devices.shape, mesh.axis_names, axis_types=types, abstract_device=kind
    )
    with jax.sharding.use_abstract_mesh(abstract), assume("tpu"):
        yield


_WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collectives(text: str, loop: str | None = None) -> list[tuple[str, int]]:
    """Operation and bytes of each collective in a compiled program's text (`as_text()`).

    Args:
      text: of one device's program.
      loop: only those of one pass through the loop under this `jax.named_scope`, such as the
        decode loop's, "decode".

    Returns:
      Bytes are those of what one device has afterwards.
    """
    found = []
    for line in text.splitlines() if loop is None else loop_body(text, loop):
        if match := _COLLECTIVE.search(line):
            sizes = _sizes(match[1])
            # One that is started here and done elsewhere names its operand before its result.
            pair = match[3] and match[2] in ("all-gather", "collective-permute")
            found.append((match[2], max(sizes) if pair else sum(sizes)))
    return found


# What hands an array on as it is.
_NOTHING_NEW = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional"}
_NOTHING_NEW |= {"call", "opt-barrier", "optimization-barrier"}
_RESULT = re.compile(r"(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")


def large_results(text: str, least: int, loop: str | None = None) -> list[str]:
    """Operations of a compiled program that write an array of at least so many bytes.

    Args:
      text: of one device's program (`as_text()`).
      least: bytes; half a pool's finds every copy of it.
      loop: only those of one pass through the loop under this `jax.named_scope`.

    Returns:
      Such as "copy" or "fusion", which may write in place. Not what happens within a fusion.
    """
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", text))
    blocks = _blocks(text) if loop is None else _loop_blocks(text, loop)
    lines = [line for name, block in blocks.items() if name not in fused for line in block]
    found = []
    for line in lines:
        match = _RESULT.match(line.strip())
        if match and match[2] not in _NOTHING_NEW and max(_sizes(match[1]), default=0) >= least:
            found.append(match[2])
    return found


def _sizes(arrays: str) -> list[int]:
    """Bytes of each array in a line's types, such as "(bf16[2,8], s32[4])"."""
    return [
        _WIDTHS[kind] * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", arrays)
        if kind in _WIDTHS
    ]


def loop_body(text: str, loop: str) -> list[str]:
    """Lines of a program's text that one pass through a loop runs, called parts included.

    Args:
      text: of a compiled program (`as_text()`).
      loop: the `jax.named_scope` that the loop is under.
    """
    return [line for block in _loop_blocks(text, loop).values() for line in block]


def _blocks(text: str) -> dict[str, list[str]]:
    """Lines of each computation of a program, by its name."""
    blocks: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and (match := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", line)):
            lines = blocks.setdefault(match[1], [])
        lines.append(line)
    return blocks


def _loop_blocks(text: str, loop: str) -> dict[str, list[str]]:
    blocks = _blocks(text)
    named = re.compile(rf'body=%?([\w.-]+).*op_name="[^"]*\b{loop}/while"')
    waiting = [match[1] for line in text.splitlines() if (match := named.search(line))]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen and name in blocks:
            seen.add(name)
            waiting += re.findall(r"%([\w.-]+)", " ".join(blocks[name][1:]))
    return {name: blocks[name] for name in sorted(seen)}
