"""Read GGUF files: metadata, a table of tensors, and their rows, dequantised when asked for.

The format is that of ggml (github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3,
little-endian: a header of counts, metadata (key, type, value), the tensors' names, shapes, types
and offsets, then their data. The header is read here, because `gguf.GGUFReader` believes whatever
counts and lengths stand in a file. The package `gguf` (`pip install kvjax[gguf]`) has the sizes of
blocks and the dequantisation.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from kvjax.models.checkpoints.checks import is_int

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
# Metadata types by number, as struct and NumPy spell them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
# Bounds on what a damaged header can make a reader do; vocabularies of 262,144 tokens and their
# merges take 15 MB, so no real file comes near.
_MOST_HEADER = 128 << 20  # bytes
_MOST_DIMS = 4
_ALIGNMENT = 32
# Types that are dequantised. NVFP4 is not among them: its scales stand in tensors of their own.
TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """A tensor as a file's header describes it; `offset` and `size` are in bytes of the file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int


class Gguf(NamedTuple):
    """A model's metadata and its tensors, of one file or of all its parts.

    Metadata values are int, float, bool, str, a list of str, or a NumPy array of numbers.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def is_gguf(path: str | Path) -> bool:
    """Whether this names a GGUF file: by its ending, or by its first bytes under another name."""
    path = Path(path)
    if path.suffix == ".gguf":
        return not path.is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def read_gguf(path: str | Path) -> Gguf:
    """Read the header of a GGUF file, and those of the parts that follow it.

    Args:
      path: the file; of a model in parts the first, `NAME-00001-of-0000N.gguf`, which has the
        metadata. The others lie beside it.

    Raises:
      ValueError: a file that is missing, truncated, damaged, of another version or byte order, or
        a part that is not the first or not of the same model; one sentence that names the file.
      ImportError: the package gguf is not installed.
    """
    first = _read_file(Path(path))
    count = first.metadata.get("split.count", 0)
    if is_int(count, 0) and count < 2:
        return first
    tensors = dict(first.tensors)
    for number, part in enumerate(_other_parts(first), start=1):
        other = _read_file(part)
        expected = {"split.no": number, "split.count": count}
        for key, value in expected.items():
            found = other.metadata.get(key)
            if not is_int(found, 0) or found != value:
                raise ValueError(f"{part}: {key} must be {value}, got {found!r}")
        for name in sorted(other.tensors.keys() & tensors.keys()):
            raise ValueError(f"{part} holds tensor {name!r}, which {tensors[name].path} has too")
        tensors |= other.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    if not is_int(total, 0) or total != len(tensors):
        raise ValueError(f"{path}: split.tensors.count must be {len(tensors)}, got {total!r}")
    return first._replace(tensors=tensors)


def _other_parts(first: Gguf) -> list[Path]:
    path, metadata = first.path, first.metadata
    count, name = metadata["split.count"], _SPLIT.fullmatch(path.name)
    if not is_int(count, 0) or name is None or int(name[3]) != count:
        raise ValueError(
            f"{path} is one of {count!r} parts (split.count), expected the first under its name,"
            " NAME-00001-of-0000N.gguf"
        )
    names = [f"{name[1]}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]
    number = metadata.get("split.no")
    if not is_int(number, 0) or number or path.name != names[0]:
        raise ValueError(f"{path} is not the first of {count} parts, expected {names[0]}")
    return [path.with_name(other) for other in names[1:]]


def gguf_package() -> ModuleType:
    """The package `gguf`.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install 'kvjax[gguf]'") from None
    return gguf


def _read_file(path: Path) -> Gguf:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:4] != _MAGIC or len(start) < 8:
                pointer = (start + file.read(32)).startswith(b"version https://git-lfs")
                reason = "a git-lfs pointer" if pointer else "it does not begin with 'GGUF'"
                raise ValueError(f"{path} is not a GGUF file ({reason})")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None


class _Header:
    """The header of one file, read from front to back; every length is checked before its use."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self._position = path, data, len(_MAGIC)
        self._end = min(len(data), _MOST_HEADER)

    def read(self) -> Gguf:
        version = self._number("I")
        if version not in (2, 3):
            swapped = version & 0xFFFF == 0
            found = "big-endian" if swapped else f"of version {version}"
            raise ValueError(f"{self._path} is {found}, expected version 2 or 3, little-endian")
        count, keys = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text("a key")
            if not key or key in metadata:
                raise self._damaged(f"the key {_shortened(key)} is empty or there twice")
            metadata[key] = self._value(self._number("I"), key)
        return Gguf(self._path, metadata, self._tensors(count, metadata))

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self._path} is not a complete GGUF file ({reason})")

    def _take(self, size: int) -> int:
        """Go on by `size` bytes; where they begin."""
        start = self._position
        if size > self._end - start:
            whole = self._end == len(self._data)
            limit = "the file ends" if whole else f"the header passes {_MOST_HEADER >> 20} MiB"
            raise self._damaged(f"{limit} before what its header announces")
        self._position += size
        return start

    def _number(self, code: str) -> Any:
        form = f"<{code}"
        return struct.unpack_from(form, self._data, self._take(struct.calcsize(form)))[0]

    def _text(self, what: str) -> str:
        size = self._number("Q")
        start = self._take(size)
        try:
            return self._data[start : start + size].decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{what} is not UTF-8") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._damaged(f"{_shortened(key)} has the unknown type {kind}")
        if kind == _BOOL:
            value = self._number("B")
            if value > 1:
                raise self._damaged(f"{_shortened(key)} is {value}, neither true nor false")
            return bool(value)
        value = self._number(_SCALARS[kind])
        # The shortest decimal that the fp32 number stands for: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _array(self, key: str) -> Any:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            self._room(8 * count)
            return [self._text(key) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._damaged(f"{_shortened(key)} is an array of the unknown type {kind}")
        dtype = np.dtype("u1" if kind == _BOOL else f"<{_SCALARS[kind]}")
        start = self._take(count * dtype.itemsize)
        return np.frombuffer(self._data[start : self._position], dtype)

    def _room(self, size: int) -> None:
        """Raise ValueError where fewer bytes are left."""
        self._take(size)
        self._position -= size

    def _tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not is_int(alignment, 1) or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, not a power of two")
        listed = {}
        for _ in range(count):
            name = self._text("a tensor's name")
            if not name or name in listed:
                raise self._damaged(f"the tensor {_shortened(name)} has no name or is there twice")
            listed[name] = self._tensor(name)
        data, expected = _aligned(self._position, alignment), 0
        for name, tensor in listed.items():
            # Tensors follow one another, so a shape or an offset that lies is found here.
            if tensor.offset != expected:
                raise self._damaged(
                    f"the tensor {name!r} begins at byte {tensor.offset} of the data, and the ones"
                    f" before it end at {expected}"
                )
            listed[name] = tensor._replace(offset=data + tensor.offset)
            end = data + tensor.offset + tensor.size
            if end > len(self._data):
                raise self._damaged(f"it has {len(self._data)} bytes, and {name!r} ends at {end}")
            expected = _aligned(expected + tensor.size, alignment)
        return listed

    def _tensor(self, name: str) -> Tensor:
        dims = self._number("I")
        if not 1 <= dims <= _MOST_DIMS:
            raise self._damaged(f"the tensor {_shortened(name)} has {dims} dimensions")
        shape = tuple(self._number("Q") for _ in range(dims))[::-1]
        number, offset = self._number("I"), self._number("Q")
        gguf = gguf_package()
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise self._damaged(f"the tensor {_shortened(name)} has type {number}") from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not all(shape) or shape[-1] % block:
            raise self._damaged(f"the tensor {_shortened(name)} of {kind.name} has shape {shape}")
        total = math.prod(shape) // block * size
        return Tensor(self._path, shape, kind.name, offset, total)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."


class Rows:
    """The rows of a matrix (or the values of a vector) in a file, dequantised when sliced.

    Attributes:
      shape: of the tensor; `ndim` and `len` follow.
    """

    def __init__(self, data: np.ndarray, tensor: Tensor, order: np.ndarray | None):
        self.shape, self.ndim = tensor.shape, len(tensor.shape)
        self._kind, self._order = tensor.dtype, order
        block = data[tensor.offset : tensor.offset + tensor.size]
        self._rows = block.reshape(self.shape[0], -1) if self.ndim > 1 else block

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        """These rows and columns in fp32; an index of one slice is of rows."""
        rows, *columns = index if isinstance(index, tuple) else (index,)
        if self.ndim == 1:
            whole = self._dequantised(self._rows)
            return (whole if self._order is None else whole[self._order])[rows]
        picked = self._rows[rows if self._order is None else self._order[rows]]
        return self._dequantised(picked)[(slice(None), *columns)]

    def _dequantised(self, raw: np.ndarray) -> np.ndarray:
        gguf = gguf_package()
        with np.errstate(all="ignore"):  # of scales that no model has
            return gguf.dequantize(raw, gguf.GGMLQuantizationType[self._kind])


class TensorFile:
    """The tensors of one file, under the names of methods that `safetensors.safe_open` has."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], orders: Mapping[str, np.ndarray]):
        """Map the file.

        Args:
          path: one of the files that `tensors` name.
          tensors: of `read_gguf`.
          orders: tensors whose rows stand in another order: where to find each row.
        """
        self._tensors = {name: one for name, one in tensors.items() if one.path == path}
        # As a plain array: every slice of a memmap costs more than some blocks take.
        self._data, self._orders = np.memmap(path, np.uint8, "r").view(np.ndarray), orders

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        del self._data

    def offset_keys(self) -> Iterator[str]:
        """Names in the order of their data."""
        return iter(self._tensors)

    def get_tensor(self, name: str) -> Rows:
        """A tensor, of which nothing is read yet."""
        return Rows(self._data, self._tensors[name], self._orders.get(name))

    get_slice = get_tensor
