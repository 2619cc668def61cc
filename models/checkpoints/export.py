"""Write Hugging Face directories: `kvjax.models.checkpoints.weights` in reverse."""

import contextlib
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from kvjax.models.checkpoints.weights import check_reads_text, parameter_at, tensor_specs
from kvjax.models.decoder import Decoder

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # safetensors' names
_ROWS = 1024  # rows that are cast and written at once


def save_decoder(
    model: Decoder, directory: str | Path, config: Mapping[str, Any], *, dtype: Any = jnp.bfloat16
) -> Path:
    """Write `config.json` and `model.safetensors`.

    Args:
      model: the decoder.
      directory: is made where it does not exist; files of these names are replaced.
      config: the `config.json` that `ModelConfig.from_hf` made the model's config from.
      dtype: of the weights on disk: bfloat16, float16 or float32.

    Returns:
      The path of the weights.

    Raises:
      ValueError: a vision-language model.
    """
    check_reads_text(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, spec in tensor_specs(model.config).items():
        array = np.asarray(parameter_at(model, spec.attribute)[...]).astype(jnp.dtype(dtype))
        tensors[name] = np.ascontiguousarray(array.T if spec.transposed else array)
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    return path


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
    read: Callable[[str], Any],
) -> None:
    """Write tensor by tensor, so that memory holds one of them and not the model.

    Args:
      path: of the file.
      shapes: of each tensor, in the order in which they are written.
      dtype: in the file: float32, bfloat16 or float16.
      read: a tensor by its name: an array, or what gives fp32 rows when it is sliced.

    Raises:
      ValueError: a value beyond float16's range, where that is the dtype.
    """
    dtype = np.dtype(dtype)
    table: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        entry = {"dtype": _DTYPES[dtype.name], "shape": shape, "data_offsets": [begin, end]}
        table[name] = entry
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            rows = read(name)
            for row in range(0, len(rows), _ROWS):
                with np.errstate(over="ignore"):
                    values = np.ascontiguousarray(rows[row : row + _ROWS], dtype)
                if dtype.name == "float16" and not np.isfinite(values).all():
                    raise ValueError(
                        f"tensor {name!r} has values beyond float16's 65504, expected dtype float32"
                        " or bfloat16"
                    )
                file.write(values.tobytes())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object, indented, in UTF-8."""
    text = json.dumps(dict(content), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def check_out(out: Path) -> None:
    """Raise ValueError unless `out` can be made, or is an empty directory."""
    found = next(path for path in (out, *out.parents) if path.exists())
    if not found.is_dir():
        raise ValueError(f"out {out} cannot be made: {found} is not a directory")
    if found == out and any(out.iterdir()):
        raise ValueError(f"out {out} is not empty; name a directory that is new or empty")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; a failure leaves nothing behind.

    Args:
      out: an absolute path, checked (`check_out`). Missing parents are made.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    building.mkdir()
    try:
        yield building
        os.replace(building, out)  # takes the place of an empty directory
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
