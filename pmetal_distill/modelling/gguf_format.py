"""Reads GGUF files (versions 2 and 3, little-endian) without trusting them. Costs one pass over the header.

Every count and length is checked against the bytes that are left before anything is allocated, so a truncated
or hostile file gives a `ModelError`, never a crash or a huge allocation. Tensor data is read on demand, one
tensor at a time, and decoded to float32 as llama.cpp defines its types: a half-precision scale times a small
integer is exact in float32, up to the one rounding of Q4_1's addition.
"""

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pmetal_distill.plain_files import open_regular
from schemas.errors import ModelError

MAGIC = b"GGUF"
BLOCK = 32
MAX_STRING_BYTES = 1 << 24
MAX_ITEMS = 1 << 22
MAX_ENTRIES = 1 << 16
MAX_DIMS = 4
_DECODE_BLOCKS = 1 << 16

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9

# Names by number, from ggml.h; needed to refuse a type by its name.
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_Q4_0 = np.dtype([("d", "<f2"), ("q", "u1", (BLOCK // 2,))])
_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", (BLOCK // 2,))])
_Q8_0 = np.dtype([("d", "<f2"), ("q", "i1", (BLOCK,))])


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[n, 16] bytes -> [n, 32] values: the low halves are elements 0-15 of a block, the high ones 16-31."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    return (_nibbles(blocks["q"]) - 8) * blocks["d"].astype(np.float32)[:, None]


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    scaled = _nibbles(blocks["q"]) * blocks["d"].astype(np.float32)[:, None]
    return np.asarray(scaled + blocks["m"].astype(np.float32)[:, None])


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(blocks["q"].astype(np.float32) * blocks["d"].astype(np.float32)[:, None])


def _decode_plain(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Codec:
    items: int
    dtype: np.dtype[Any]
    decode: Callable[[np.ndarray], np.ndarray]


_CODECS = {
    "F32": _Codec(1, np.dtype("<f4"), _decode_plain),
    "F16": _Codec(1, np.dtype("<f2"), _decode_plain),
    "Q4_0": _Codec(BLOCK, _Q4_0, _decode_q4_0),
    "Q4_1": _Codec(BLOCK, _Q4_1, _decode_q4_1),
    "Q8_0": _Codec(BLOCK, _Q8_0, _decode_q8_0),
}
SUPPORTED_TYPES = tuple(_CODECS)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table; `shape` has the contiguous dimension last."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A checked header. `read` decodes one tensor."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_start: int

    def read(self, name: str) -> np.ndarray:
        """Decodes a tensor.

        Returns:
            float32, of the tensor's shape.

        Raises:
            ModelError: the file has become shorter, or the tensor holds NaN or infinity.
        """
        info = self.tensors[name]
        codec = _CODECS[info.type_name]
        out = np.empty(math.prod(info.shape), np.float32)
        with open_regular(self.path) as file:
            file.seek(self.data_start + info.offset)
            left, at = info.num_bytes // codec.dtype.itemsize, 0
            while left:
                count = min(left, _DECODE_BLOCKS * BLOCK // codec.items)
                data = file.read(count * codec.dtype.itemsize)
                if len(data) != count * codec.dtype.itemsize:
                    raise ModelError(
                        f"{self.path}: ends inside tensor '{name}'; copy or download the file again"
                    )
                with np.errstate(all="ignore"):  # what is not finite is refused below
                    values = codec.decode(np.frombuffer(data, codec.dtype)).reshape(-1)
                out[at : at + values.size] = values
                left, at = left - count, at + values.size
        if not np.isfinite(out).all():
            raise ModelError(f"{self.path}: tensor '{name}' holds NaN or infinity; the file is damaged")
        return out.reshape(info.shape)


class _Cursor:
    """Reads little-endian values and never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0

    def fail(
        self, problem: str, advice: str = "the file is damaged: copy or download it again"
    ) -> ModelError:
        return ModelError(f"{self._path}: byte {self.position}: {problem}; {advice}")

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.size - self.position:
            left = self.size - self.position
            raise self.fail(f"{what} needs {num_bytes} bytes, {left} are left: truncated")
        data = self._file.read(num_bytes)
        self.position += len(data)
        if len(data) != num_bytes:
            raise self.fail(f"{what}: the file became shorter while it was read")
        return data

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def count(self, what: str, *, limit: int, item_bytes: int) -> int:
        number = self.u64(what)
        if number > limit or number * item_bytes > self.size - self.position:
            raise self.fail(f"{what} is {number}, more than the file can hold")
        return number

    def string(self, what: str) -> str:
        length = self.count(f"length of {what}", limit=MAX_STRING_BYTES, item_bytes=1)
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error


def read_gguf(path: Path) -> GGUFFile:
    """Reads and checks the header of a GGUF file.

    Raises:
        ModelError: not GGUF, another version or byte order, truncated, inconsistent, or with a tensor type
            that is not one of `SUPPORTED_TYPES`.
    """
    try:
        with open_regular(path) as file:
            return _read_header(_Cursor(file, path), path)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); give the path of a .gguf file"
        ) from error


def _read_header(cursor: _Cursor, path: Path) -> GGUFFile:
    if cursor.size < 4 or cursor.take(4, "magic") != MAGIC:
        raise ModelError(
            f"{path}: not a GGUF file (it does not begin with 'GGUF'); give a .gguf or an mlx-lm folder"
        )
    _check_version(cursor)
    num_tensors = cursor.count("number of tensors", limit=MAX_ENTRIES, item_bytes=24)
    num_keys = cursor.count("number of metadata keys", limit=MAX_ENTRIES, item_bytes=13)
    metadata = _read_metadata(cursor, num_keys)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.fail(f"general.alignment must be a power of two, found {alignment!r}")
    tensors = _read_tensor_table(cursor, num_tensors)
    data_start = -(-cursor.position // alignment) * alignment
    _check_extents(cursor, tensors, data_start, alignment)
    return GGUFFile(path, metadata, tensors, data_start)


def _check_version(cursor: _Cursor) -> None:
    version = cursor.u32("version")
    if version in (2, 3):
        return
    if version & 0xFFFF == 0 and version:
        raise cursor.fail("big-endian GGUF", "convert it on a little-endian machine")
    raise cursor.fail(
        f"GGUF version must be 2 or 3, found {version}", "convert the model again with llama.cpp"
    )


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key '{key}' occurs twice")
        metadata[key] = _read_value(cursor, cursor.u32(f"type of '{key}'"), f"'{key}'")
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _read_array(cursor, what)
    return _read_scalars(cursor, kind, 1, what)[0].item()


def _read_array(cursor: _Cursor, what: str) -> list[str] | np.ndarray:
    kind = cursor.u32(f"item type of {what}")
    if kind == _STRING:
        length = cursor.count(f"length of {what}", limit=MAX_ITEMS, item_bytes=8)
        return [cursor.string(f"item {index} of {what}") for index in range(length)]
    length = cursor.count(f"length of {what}", limit=MAX_ITEMS, item_bytes=1)
    return _read_scalars(cursor, kind, length, what)


def _read_scalars(cursor: _Cursor, kind: int, length: int, what: str) -> np.ndarray:
    if kind not in _SCALARS:
        raise cursor.fail(f"{what} has unknown value type {kind}")
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(cursor.take(length * dtype.itemsize, what), dtype)


def _read_tensor_table(cursor: _Cursor, num_tensors: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        info = _read_tensor_info(cursor)
        if info.name in tensors:
            raise cursor.fail(f"tensor '{info.name}' occurs twice")
        tensors[info.name] = info
    return tensors


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.string("a tensor's name")
    num_dims = cursor.u32(f"dimensions of '{name}'")
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.fail(f"tensor '{name}' must have 1 to {MAX_DIMS} dimensions, found {num_dims}")
    dims = [cursor.u64(f"shape of '{name}'") for _ in range(num_dims)]
    type_name = _type_name(cursor, name, cursor.u32(f"type of '{name}'"))
    codec = _CODECS[type_name]
    if not all(dims) or dims[0] % codec.items:
        raise cursor.fail(f"tensor '{name}' of type {type_name} has shape {tuple(reversed(dims))}")
    num_bytes = math.prod(dims) // codec.items * codec.dtype.itemsize
    return TensorInfo(name, tuple(reversed(dims)), type_name, cursor.u64(f"offset of '{name}'"), num_bytes)


def _type_name(cursor: _Cursor, tensor: str, number: int) -> str:
    name = _TYPE_NAMES.get(number, f"number {number}")
    if name not in _CODECS:
        supported = ", ".join(SUPPORTED_TYPES)
        raise cursor.fail(
            f"tensor '{tensor}' has type {name}, supported are {supported}",
            "use a file quantized as Q8_0, Q4_0 or Q4_1, or the original model",
        )
    return name


def _check_extents(cursor: _Cursor, tensors: dict[str, TensorInfo], data_start: int, alignment: int) -> None:
    """Every tensor lies inside the file and none shares bytes with another."""
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset % alignment or info.offset < end:
            raise cursor.fail(
                f"tensor '{info.name}' at offset {info.offset} is misaligned or overlaps '{before}'"
            )
        end, before = info.offset + info.num_bytes, info.name
        if data_start + end > cursor.size:
            missing = data_start + end - cursor.size
            raise cursor.fail(
                f"tensor '{info.name}' ends {missing} bytes behind the end of the file: truncated"
            )
