"""Tensors of `.npy` and `.safetensors` files mapped into memory: nothing is read before it is looked at.

Headers are bounded and checked against the size of the file; nothing is unpickled. bfloat16 becomes float32
when rows are taken.
"""

import math
import struct
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import CacheError, DataError
from schemas.strict import Fields, parse_object

MAX_HEADER_BYTES = 16 << 20
# What NumPy raises on headers that are not what it writes; it parses them as Python literals.
_DAMAGED = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, TypeError, RecursionError)
_DTYPES = {
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "F64": "<f8",
    "I32": "<i4",
    "I64": "<i8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor on disk.

    Attributes:
        values: mapped; bfloat16 as its 16 bits.
        bfloat16: whether it is that.
    """

    values: npt.NDArray[Any]
    bfloat16: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.values.shape

    @property
    def floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.bfloat16 or self.values.dtype.kind == "f"

    def floats(self, index: Any) -> npt.NDArray[np.float32]:
        """A selection as float32."""
        part = np.asarray(self.values[index])
        if self.bfloat16:
            return (part.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return part.astype(np.float32)


def open_npy(path: Path) -> Tensor:
    """The array in a `.npy` file.

    Raises:
        DataError: missing, damaged, or an array of objects.
    """
    _require_file(path)
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGED as error:
        raise DataError(f"{path}: must be a .npy file of numbers, found: {error}; write it again") from error
    if not isinstance(values, np.ndarray):
        raise DataError(f"{path}: must be a .npy file, found an archive of them; save one array")
    return Tensor(values)


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a `.safetensors` file, by name.

    Raises:
        DataError: missing or damaged.
    """
    _require_file(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise DataError(
                    f"{path}: header must end inside the file of {size} bytes, found length {length}"
                )
            header = parse_object(file.read(length), where=str(path), max_bytes=MAX_HEADER_BYTES)
        header.pop("__metadata__", None)
        return {name: _mapped(path, raw, 8 + length, size, name) for name, raw in header.items()}
    except OSError as error:
        raise DataError(f"{path}: must be readable, found: {error}; check the file") from error
    except CacheError as error:
        raise DataError(f"{error}; write the file again") from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: must be a file, found nothing, a folder or a pipe; check the path")


def _mapped(path: Path, raw: object, start: int, size: int, name: str) -> Tensor:
    fields = Fields(raw, where=f"{path}: tensor '{name[:40]}'")
    kind = fields.choice("dtype", _DTYPES)
    shape = fields.integers("shape", 0, 1 << 40, max_length=8)
    offsets = fields.integers("data_offsets", 0, size - start, max_length=2)
    dtype = np.dtype(_DTYPES[kind])
    count = math.prod(shape)
    if len(offsets) != 2 or offsets[1] - offsets[0] != count * dtype.itemsize:
        fields.fail(f"offsets that span {count} values of {kind}", offsets)
    if count == 0:
        return Tensor(np.zeros(shape, dtype), kind == "BF16")
    values = np.memmap(path, dtype, "r", offset=start + offsets[0], shape=shape)
    return Tensor(values, kind == "BF16")
