"""The columns of a target shard and how Parquet must store them."""

from typing import Any

import pyarrow as pa

from schemas.basis import SketchBasis
from schemas.packing import group_width
from schemas.spec import TargetSpec

MAX_GROUP_BYTES = 1 << 31


def id_planes(vocab_size: int) -> int:
    """Bytes that hold a token id: 1 to 3."""
    return 1 + (vocab_size > 1 << 8) + (vocab_size > 1 << 16)


def group_columns(index: int, levels: int) -> tuple[str, ...]:
    """Column names of one group of sketch coordinates."""
    return (f"sk{index}l", f"sk{index}h") if levels == 65536 else (f"sk{index}",)


def target_schema(spec: TargetSpec, basis: SketchBasis | None) -> pa.Schema:
    """Columns of a target shard, in order; none of them nullable."""
    ids = id_planes(spec.vocab_size)
    widths = {f"tok{i}": 1 for i in range(ids)}
    fields = [pa.field(name, pa.binary(width), nullable=False) for name, width in widths.items()]
    fields += [
        pa.field("seq", pa.int32(), nullable=False),
        pa.field("doc", pa.int32(), nullable=False),
        pa.field("msk", pa.bool_(), nullable=False),
    ]
    widths = {f"id{i}": spec.k for i in range(ids)}
    if spec.tail == "none":
        widths |= {"top0": 1, "top1": 1}
    if spec.k > 1:
        widths |= {"gap0": spec.k - 1, "gap1": spec.k - 1}
    if spec.num_nodes:
        widths |= {"crv0": spec.num_nodes, "crv1": spec.num_nodes}
    for index, group in enumerate(basis.groups if basis else ()):
        widths |= dict.fromkeys(group_columns(index, group.levels), group_width(group))
    fields += [pa.field(name, pa.binary(width), nullable=False) for name, width in widths.items()]
    return pa.schema(fields)


def row_bytes(schema: pa.Schema) -> int:
    """Bytes of a stored row before compression, at most."""
    return sum(t.byte_width if pa.types.is_fixed_size_binary(t) else 4 for t in schema.types)


def needed_columns(schema: pa.Schema, basis: SketchBasis | None, rank: int | None) -> list[str]:
    """Columns to read when only the leading `rank` coordinates are wanted."""
    unused: set[str] = set()
    for index, group in enumerate(basis.groups if basis else ()):
        if rank is not None and group.start >= rank:
            unused.update(group_columns(index, group.levels))
    return [name for name in schema.names if name not in unused]


def parquet_options(schema: pa.Schema, *, level: int = 1) -> dict[str, Any]:
    """Arguments of `pyarrow.parquet.ParquetWriter`: one page a column chunk, CRCs, nothing superfluous."""
    integers = [f.name for f in schema if pa.types.is_integer(f.type)]
    return {
        "compression": "zstd",
        "compression_level": level,
        "use_dictionary": False,
        "write_statistics": False,
        "write_page_checksum": True,
        "store_schema": False,
        "column_encoding": dict.fromkeys(integers, "DELTA_BINARY_PACKED"),
        "data_page_size": 1 << 30,
        "max_rows_per_page": 1 << 30,
    }
