"""A deterministic writer and a bounded, strict reader of the safetensors layout, for sidecar files.

Layout: u64 little-endian header length, JSON header, tensor bytes without gaps. The library's own writer
orders metadata at random, and a file named by its hash must not depend on that. Cost: one copy of the data.
"""

import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import CorruptionError
from schemas.strict import Fields, dump_object, parse_object

MAX_HEADER_BYTES = 1 << 20
_MAX_ITEMS = 1 << 40
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "|u1"}
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}

Arrays = dict[str, npt.NDArray[Any]]


def dump_tensors(tensors: Arrays, metadata: dict[str, str]) -> bytes:
    """The same bytes for the same content: tensors in name order, metadata keys sorted."""
    header: dict[str, Any] = {"__metadata__": metadata}
    blobs, offset = [], 0
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        dtype = _NAMES[array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype]
        blob = array.astype(_DTYPES[dtype], copy=False).tobytes()
        span = [offset, offset + len(blob)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        blobs.append(blob)
        offset += len(blob)
    text = dump_object(header)
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, *blobs))


def parse_tensors(data: bytes, *, where: str) -> tuple[Arrays, dict[str, str]]:
    """Tensors (read-only views of `data`) and metadata.

    Raises:
        CorruptionError: the header is damaged, or the tensors do not fill the rest exactly and without gaps.
    """
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else MAX_HEADER_BYTES + 1
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise CorruptionError(
            f"{where}: header must end inside the file, found length {length} in {len(data)}"
        )
    header = parse_object(data[8 : 8 + length], where=f"{where} header", max_bytes=MAX_HEADER_BYTES)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptionError(f"{where}: __metadata__ must map strings to strings")
    body = memoryview(data)[8 + length :]
    tensors, expected = {}, 0
    for name in sorted(header, key=lambda n: _start(header[n])):
        tensors[name], expected = _tensor(header[name], body, expected, where=f"{where} tensor {name[:40]!r}")
    if expected != len(body):
        raise CorruptionError(f"{where}: tensors must fill {len(body)} bytes, found {expected}")
    return tensors, metadata


def _start(entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    first = offsets[0] if isinstance(offsets, list) and offsets else 0
    return first if isinstance(first, int) else 0


def _tensor(raw: Any, body: memoryview, expected: int, *, where: str) -> tuple[npt.NDArray[Any], int]:
    fields = Fields(raw, where=where)
    dtype = np.dtype(_DTYPES[fields.choice("dtype", _DTYPES)])
    shape = fields.integers("shape", 0, 1 << 32, max_length=4)
    start, stop = (*fields.integers("data_offsets", 0, len(body), max_length=2), -1, -1)[:2]
    fields.finish()
    if math.prod(max(size, 1) for size in shape) > _MAX_ITEMS:
        fields.fail(f"sizes whose product is at most {_MAX_ITEMS}", shape)
    if start != expected or stop - start != math.prod(shape) * dtype.itemsize:
        fields.fail(f"offsets from {expected} spanning shape {shape} of {dtype}", (start, stop))
    return np.frombuffer(body[start:stop], dtype).reshape(shape), stop
