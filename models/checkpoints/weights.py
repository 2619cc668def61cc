"""Load a Hugging Face checkpoint (safetensors) into a `Decoder`, one tensor at a time.

Every name, shape and dtype is checked from the files' headers before any weight is read. No random
weights are made first, and a tensor's host copies are freed before the next is read. So peak host
memory is the model (on a CPU backend; elsewhere nothing) plus one tensor, as read and as laid out;
pages of the mapped files, which the system can drop at any time, are not counted.

Axes: V vocabulary, D model dim, F MLP dim, H head dim; X = N H query heads, Y = K H KV heads.
"""

import dataclasses
import gc
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from kvjax import sharding
from kvjax.model_interface import VisionModel
from kvjax.models.checkpoints.checks import bin_hint
from kvjax.models.config import ModelConfig, load_config
from kvjax.models.decoder import Decoder

# Tensor in the file, attribute of the decoder, axes in the file, flag without which the model lacks
# it. The attribute's suffix is the order in memory.
Row = tuple[str, str, str, str]
_MODEL = (
    ("embed_tokens.weight", "embed.table_VD", "VD", ""),
    ("norm.weight", "final_norm.scale_D", "D", ""),
)
_LAYER = (
    ("input_layernorm.weight", "attention_norm.scale_D", "D", ""),
    ("self_attn.q_proj.weight", "attention.q_DX", "XD", ""),
    ("self_attn.k_proj.weight", "attention.k_DY", "YD", ""),
    ("self_attn.v_proj.weight", "attention.v_DY", "YD", ""),
    ("self_attn.o_proj.weight", "attention.o_XD", "DX", ""),
    ("self_attn.q_proj.bias", "attention.q_bias_X", "X", "qkv_bias"),
    ("self_attn.k_proj.bias", "attention.k_bias_Y", "Y", "qkv_bias"),
    ("self_attn.v_proj.bias", "attention.v_bias_Y", "Y", "qkv_bias"),
    ("self_attn.o_proj.bias", "attention.o_bias_D", "D", "o_bias"),
    ("self_attn.q_norm.weight", "attention.q_norm.scale_H", "H", "qk_norm"),
    ("self_attn.k_norm.weight", "attention.k_norm.scale_H", "H", "qk_norm"),
    ("post_attention_layernorm.weight", "mlp_norm.scale_D", "D", ""),
    ("mlp.gate_proj.weight", "mlp.gate_DF", "FD", ""),
    ("mlp.up_proj.weight", "mlp.up_DF", "FD", ""),
    ("mlp.down_proj.weight", "mlp.down_FD", "DF", ""),
    ("mlp.gate_proj.bias", "mlp.gate_bias_F", "F", "mlp_bias"),
    ("mlp.up_proj.bias", "mlp.up_bias_F", "F", "mlp_bias"),
    ("mlp.down_proj.bias", "mlp.down_bias_D", "D", "mlp_bias"),
)
_DTYPES = ("BF16", "F16", "F32")  # safetensors' names
_OPENED = partial(safe_open, framework="np")
_ROWS = 256  # rows transposed at once: about 5 times as fast as a whole matrix (cache misses)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What one tensor of a checkpoint has to be, and where it goes.

    Attributes:
      attribute: dotted path in the decoder, such as "layers.3.attention.q_DX".
      axes: its axes in memory, one letter each, such as "DX".
      shape: its shape in memory.
      file_shape: its shape in the file.
      transposed: whether the matrix in the file is the transpose of the one in memory.
    """

    attribute: str
    axes: str
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    transposed: bool


def tensor_specs(
    config: ModelConfig, prefix: str = "model.", head: str = "lm_head."
) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint of this decoder must hold, by its name in the file.

    `prefix` and `head` are what the names of a part of a larger model begin with.
    """
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "X": config.num_heads * config.head_dim,
        "Y": config.num_kv_heads * config.head_dim,
        "H": config.head_dim,
        "F": config.intermediate_size,
    }
    rows = [*prefixed(_MODEL, prefix, ""), (f"{head}weight", "head_DV", "VD", "untied")]
    for layer in range(config.num_layers):
        rows += prefixed(_LAYER, f"{prefix}layers.{layer}.", f"layers.{layer}.")
    flags = {name: getattr(config, name) for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")}
    return make_specs(rows, sizes, flags | {"untied": not config.tie_word_embeddings})


def as_saved(
    specs: dict[str, TensorSpec], stored: Collection[str], head: str = "lm_head."
) -> dict[str, TensorSpec]:
    """The specs, where embeddings are tied and a checkpoint has them as its head's under that name.

    transformers saves one of two tied tensors, in some versions the head's.
    """
    kept = next(name for name, spec in specs.items() if spec.attribute == "embed.table_VD")
    saved = f"{head}weight"
    if kept in stored or saved in specs or saved not in stored:
        return specs
    return {saved if name == kept else name: spec for name, spec in specs.items()}


def prefixed(rows: Iterable[Row], name: str, attribute: str) -> list[Row]:
    """Rows of a table, with what their names and attributes begin with."""
    return [(name + one, attribute + other, axes, flag) for one, other, axes, flag in rows]


def make_specs(
    rows: Iterable[Row], sizes: Mapping[str, int], flags: Mapping[str, bool]
) -> dict[str, TensorSpec]:
    """The rows of a table whose flag is set (none is always set), by the name in the file."""
    specs = {}
    for name, attribute, file_axes, flag in rows:
        if not flag or flags[flag]:
            axes = attribute.rsplit("_", 1)[1]
            specs[name] = TensorSpec(
                attribute=attribute,
                axes=axes,
                shape=tuple(sizes[axis] for axis in axes),
                file_shape=tuple(sizes[axis] for axis in file_axes),
                transposed=file_axes != axes,
            )
    return specs


class Stored(NamedTuple):
    """A tensor as a file's header describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def load_decoder(
    directory: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Decoder:
    """Load a checkpoint in the layout of the Hugging Face hub.

    Args:
      directory: a folder with `config.json` and either `model.safetensors` or
        `model.safetensors.index.json` and its shards; weights in bfloat16, float16 or float32.
      dtype: of the weights in memory: float32, bfloat16 or float16.
      progress: whether to show a progress bar on stderr.
      mesh: with axes `data` and `model`: each weight goes straight to the devices that hold a part
        of it, and a host reads the parts of its own devices and nothing else.

    Returns:
      The decoder, its weights on the mesh, or on JAX's default device.

    Raises:
      ValueError: the config is not supported, or a file or tensor is missing, unexpected, damaged,
        or of another shape or dtype; one sentence that names tensor and file.
    """
    dtype = weights_dtype(dtype)
    config = load_config(directory)
    source, stored = read_headers(Path(directory))
    specs = as_saved(tensor_specs(config), stored)
    ignored = ("lm_head.weight",) if config.tie_word_embeddings else ()
    check_tensors(config.architecture, specs, source, stored, ignored)
    return fill(
        lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)), specs, stored, dtype, progress, mesh
    )


def weights_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of weights in memory.

    Raises:
      ValueError: any but float32, bfloat16 and float16.
    """
    try:
        dtype = np.dtype(dtype)
    except TypeError:  # no dtype at all
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}") from None
    if dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype.name!r}")
    return dtype


def fill[Model: Decoder](
    build: Callable[[], Model],
    specs: Mapping[str, TensorSpec],
    stored: Mapping[str, Stored],
    dtype: np.dtype,
    progress: bool,
    mesh: Mesh | None,
    opened: Callable[[Path], AbstractContextManager[Any]] = _OPENED,
) -> Model:
    """The model that `build` would make, with a checkpoint's weights and never any others.

    Args:
      build: makes a model with random weights; only traced.
      specs: its tensors, by their names in the files; all of them are checked (`check_tensors`).
      stored: from `read_headers`.
      dtype, progress, mesh: as of `load_decoder`.
      opened: opens a file for reading its tensors, with the methods of `safe_open`.
    """
    decoder = nnx.eval_shape(build)
    if mesh is not None:
        mesh = sharding.fitted(mesh, decoder.config.num_heads, decoder.config.num_kv_heads)
    total = sum(math.prod(spec.shape) for spec in specs.values()) * dtype.itemsize
    bar = tqdm(
        total=total, desc="weights", unit="B", unit_scale=True, disable=not progress, leave=False
    )
    with bar:
        for path in sorted({stored[name].path for name in specs}):
            with opened(path) as file:
                for name in file.offset_keys():
                    if name in specs and stored[name].path == path:
                        value = _load_tensor(file, name, specs[name], dtype, path, mesh)
                        parameter_at(decoder, specs[name].attribute).set_value(value)
                        _free_host_copy(value)
                        bar.update(value.nbytes)
    return decoder


def _load_tensor(
    file: Any, name: str, spec: TensorSpec, dtype: np.dtype, path: Path, mesh: Mesh | None
) -> jax.Array:
    """Read, cast, lay out and place one tensor."""

    def checked(raw: Any) -> np.ndarray:
        # The kernel of a convolution over patches is a matrix, a row a channel.
        flat = raw.reshape(len(raw), -1) if raw.ndim > len(spec.axes) else raw
        array = _lay_out(flat, spec, dtype)
        if dtype.name == "float16" and not np.isfinite(array).all():
            raise ValueError(
                f"{path}: tensor {name!r} has values beyond float16's 65504, "
                "expected dtype float32 or bfloat16"
            )
        return array

    if mesh is None:
        return jax.device_put(checked(_read_tensor(file, name)))
    parts: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one reading

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or ()
        bounds = tuple((cut.start, cut.stop) for cut in index)
        if bounds not in parts:
            in_file = index[::-1] if spec.transposed else index
            parts[bounds] = checked(_read_part(file, name, in_file))
        return parts[bounds]

    placed = sharding.named(spec.axes, spec.shape, mesh)
    return jax.make_array_from_callback(spec.shape, placed, part)


def _free_host_copy(value: jax.Array) -> None:
    """Wait for the device's copy, then drop the host's.

    JAX lets go of an array that it has copied only in some later call, or when Python collects
    garbage; without this the array would still be there while the next tensor is read.
    """
    value.block_until_ready()
    gc.collect(0)


def _read_tensor(file: Any, name: str) -> Any:
    """An array, or what is like one in shape and gives its rows when it is sliced."""
    return file.get_tensor(name)


def _read_part(file: Any, name: str, index: tuple[slice, ...]) -> np.ndarray:
    return file.get_slice(name)[index]


def _lay_out(raw: Any, spec: TensorSpec, dtype: np.dtype) -> np.ndarray:
    """A fresh C-ordered array, so that the tensor as read can be freed at once."""
    array = np.empty(raw.shape[::-1] if spec.transposed else raw.shape, dtype)
    with np.errstate(over="ignore"):
        for row in range(0, len(raw), _ROWS):
            rows = slice(row, row + _ROWS)
            if spec.transposed:
                array[:, rows] = raw[rows].T
            else:
                array[rows] = raw[rows]
    return array


def parameter_at(decoder: Decoder, attribute: str) -> nnx.Param:
    """The parameter at a dotted path, such as "layers.3.attention.q_DX"."""
    node: Any = decoder
    for part in attribute.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


def check_reads_text(model: Decoder) -> None:
    """Raise ValueError where a decoder has a tower, whose weights would not be written."""
    if isinstance(model, VisionModel):
        raise ValueError(
            f"model is a {type(model).__name__}, whose tower is not written, expected a decoder of"
            " text alone"
        )


def read_headers(folder: Path) -> tuple[Path, dict[str, Stored]]:
    """The file that lists a checkpoint's tensors, and every tensor without its data."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return single, _read_header(single)
    if not index.is_file():
        hint = bin_hint([path.name for path in folder.glob("*.bin")], str(folder))
        raise ValueError(f"{folder} must hold {single.name} or {index.name}{hint}")
    listed = _read_index(index)
    stored: dict[str, Stored] = {}
    for shard in sorted(set(listed.values())):
        path = folder / shard
        if Path(shard).name != shard or not path.is_file():
            raise ValueError(f"{index} names the shard {shard!r}, which is not in {folder}")
        header = _read_header(path)
        for name in sorted(header.keys() - listed.keys()):
            raise ValueError(f"{path} holds tensor {name!r}, which {index.name} does not name")
        for name in (name for name, owner in listed.items() if owner == shard):
            if name not in header:
                raise ValueError(f"{path} lacks tensor {name!r}, which {index.name} places there")
            stored[name] = header[name]
    return index, stored


def _read_index(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        return {str(name): str(shard) for name, shard in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        raise ValueError(f"{index} must be JSON with an object 'weight_map'") from None


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(path, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        with open(path, "rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        reason = "a git-lfs pointer, the weights were not downloaded" if pointer else str(error)
        raise ValueError(f"{path} is not a complete safetensors file ({reason})") from None


def check_tensors(
    architecture: str,
    specs: Mapping[str, TensorSpec],
    source: Path,
    stored: Mapping[str, Stored],
    ignored: Sequence[str] = (),
    dtypes: Sequence[str] = _DTYPES,
    described: str = "config.json",
) -> None:
    """Raise ValueError where a checkpoint is not what the specs say.

    `ignored` are names, or beginnings of names that end in a dot, that may be there too; `dtypes`
    are those that can be read; `described` is what the specs were made from.
    """
    missing = [name for name in specs if name not in stored]
    if missing:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise ValueError(
            f"{source} lacks tensor {missing[0]!r}{more}, expected in a {architecture} "
            f"with this {described}"
        )
    parts = tuple(part for part in ignored if part.endswith("."))
    for name, (path, shape, dtype) in stored.items():
        if name in specs:
            expected = specs[name].file_shape
            if dtype not in dtypes:
                known = ", ".join(dtypes)
                raise ValueError(
                    f"{path}: tensor {name!r} has dtype {dtype}, expected one of {known}"
                )
            if shape != expected:
                raise ValueError(
                    f"{path}: tensor {name!r} has shape {shape}, expected {expected}, "
                    f"as {described} has it"
                )
        elif (
            name not in ignored
            and not name.startswith(parts)
            and not name.endswith(".rotary_emb.inv_freq")
        ):
            raise ValueError(
                f"{path} holds tensor {name!r}, not expected in a {architecture} with this "
                f"{described}"
            )
