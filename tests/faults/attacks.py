"""What a stranger may put into a cache: each attack changes a copy of a sound one, hashes and records agree.

`ATTACKS` maps a name to the change and what the error must say.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.manifest import seal
from tests.faults.forge import Parquet, forge_shard, place, repack, varint, write_struct

Attack = tuple[Callable[[Path], object], str]
BILLION = 2**31 - 1


def page(edit: Callable[[dict[int, Any]], object], column: str = "id0") -> Callable[[Path], str]:
    """Changes the header of a page."""

    def change(parquet: Parquet) -> None:
        edit(parquet.chunks[0, column].header)

    return lambda folder: forge_shard(folder, change)


def footer(edit: Callable[[Parquet], object]) -> Callable[[Path], str]:
    """Changes the footer."""

    def change(parquet: Parquet) -> bytes:
        parquet.to_bytes()
        edit(parquet)
        return parquet.to_bytes(fix=False)

    return lambda folder: forge_shard(folder, change)


def data_header(field: int, value: int) -> Callable[[dict[int, Any]], object]:
    """Sets a field of DataPageHeader."""
    return lambda header: header[5][1].__setitem__(field, (5, value))


def put(
    where: Callable[[Parquet], dict[int, Any]], number: int, kind: int, value: Any
) -> Callable[[Path], str]:
    """Sets a field of a structure in the footer."""
    return footer(lambda parquet: where(parquet).__setitem__(number, (kind, value)))


def top(parquet: Parquet) -> dict[int, Any]:
    """FileMetaData."""
    return parquet.footer


def meta(parquet: Parquet) -> dict[int, Any]:
    """ColumnMetaData of a column."""
    return parquet.meta(0, "id0")


def column(parquet: Parquet) -> dict[int, Any]:
    """ColumnChunk of a column."""
    return parquet.column(0, "id0")


def group(parquet: Parquet) -> dict[int, Any]:
    """The first RowGroup."""
    return parquet.footer[4][1][1][0]  # type: ignore[no-any-return]


def element(parquet: Parquet) -> dict[int, Any]:
    """SchemaElement of the first column."""
    return parquet.footer[2][1][1][1]  # type: ignore[no-any-return]


def bomb(column: str, size: int) -> Callable[[Path], str]:
    """A page of zeros, far larger than its rows, in a few bytes."""
    return lambda folder: forge_shard(folder, lambda parquet: repack(parquet.chunks[0, column], bytes(size)))


def delta_bomb(folder: Path) -> str:
    """Integers whose first block promises 2^26 mini-blocks."""
    plain = varint(1 << 31) + varint(1 << 26) + varint(BILLION) + varint(0) + bytes(8)
    return forge_shard(folder, lambda parquet: repack(parquet.chunks[0, "seq"], plain))


def deep(levels: int) -> tuple[int, Any]:
    """Structures in structures."""
    value: tuple[int, Any] = (12, {})
    for _ in range(levels):
        value = (12, {1: value})
    return value


def own_schema(folder: Path) -> str:
    """An Arrow schema with an extension type, which old versions of pyarrow unpickled."""
    import base64

    field = pa.field(
        "tok0",
        pa.binary(1),
        metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": "x"},
    )
    text = base64.b64encode(pa.schema([field]).serialize().to_pybytes())
    pairs = (12, [{1: (8, b"ARROW:schema"), 2: (8, text)}])
    return put(top, 5, 9, pairs)(folder)


def many_groups(parquet: Parquet) -> None:
    """A row group, a thousand times."""
    kind, (items, groups) = parquet.footer[4]
    parquet.footer[4] = (kind, (items, groups * 1000))


def record(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the commit record of shard 0."""

    def attack(folder: Path) -> None:
        path = folder / "commits/00000.json"
        raw = json.loads(path.read_bytes())
        del raw["checksum"]
        edit(raw)
        path.write_bytes(seal(raw))

    return attack


def dataset(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes `dataset.json`; records are told."""

    def attack(folder: Path) -> None:
        raw = json.loads((folder / "dataset.json").read_bytes())
        del raw["checksum"]
        edit(raw)
        sealed = seal(raw)
        (folder / "dataset.json").write_bytes(sealed)
        for path in (folder / "commits").iterdir():
            own = json.loads(path.read_bytes()) | {"dataset": json.loads(sealed)["checksum"]}
            del own["checksum"]
            path.write_bytes(seal(own))

    return attack


def raw_record(data: bytes) -> Callable[[Path], object]:
    """Other bytes for the commit record of shard 0."""
    return lambda folder: (folder / "commits/00000.json").write_bytes(data)


def huge_groups(raw: dict[str, Any]) -> None:
    """4096 x 2^22 bytes a column, were anything allocated."""
    raw["target"] |= {"k": 250}
    raw["max_sequence_length"], raw["rows_per_group"] = 1 << 20, 1 << 21


def big_group(folder: Path) -> None:
    """A row group that unpacks to more than a reader takes, in a record and a footer that agree."""
    dataset(huge_groups)(folder)
    length = 1 << 20
    groups, total = [[length, length]], 2 * length
    record(lambda raw: raw.update(groups=groups, num_tokens=total))(folder)


def tensors(header: bytes, body: bytes = b"", *, length: int | None = None) -> Callable[[Path], str]:
    """Another basis."""
    data = struct.pack("<Q", len(header) if length is None else length) + header + body
    return lambda folder: place(folder, "basis", data)


def claimed(family: str, size: int) -> Callable[[Path], str]:
    """A sidecar whose record claims a size."""
    return lambda folder: place(folder, family, b"x", claim=size)


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """A file of holes in place of one, which takes no room on disk."""

    def attack(folder: Path) -> None:
        (path,) = folder.glob(name)
        with path.open("wb") as file:
            file.truncate(size)

    return attack


def second_record(folder: Path) -> None:
    """Shard 0 a second time under another spelling, in place of shard 1."""
    (folder / "commits/00001.json").rename(folder / "commits/000000.json")
    (folder / "commits/000000.json").write_bytes((folder / "commits/00000.json").read_bytes())


def other_rows(folder: Path) -> None:
    """Row groups that do not end where the dataset says."""
    dataset(lambda raw: raw.update(rows_per_group=2))(folder)
    record(lambda raw: raw.update(groups=[[n for g in raw["groups"] for n in g]]))(folder)


_JSON = "must be strict JSON"
_PARQUET = "must be Parquet as the format allows it"
ATTACKS: dict[str, Attack] = {
    "page without a checksum": (page(lambda h: h.pop(4)), "pages must have a CRC"),
    "page that unpacks to 2 GiB": (page(lambda h: h.__setitem__(2, (5, BILLION))), "a page must unpack to"),
    "page that unpacks to less than nothing": (page(lambda h: h.__setitem__(2, (5, -5))), "must be readable"),
    "page of 2^31 rows": (page(data_header(1, BILLION)), "pages must have a CRC, rows"),
    "page of no rows": (page(data_header(1, 0)), "pages must have a CRC, rows"),
    "page beyond its chunk": (page(lambda h: h.__setitem__(3, (5, 1 << 30))), "a page must end at byte"),
    "page that begins before itself": (page(lambda h: h.__setitem__(3, (5, -64))), "must be readable"),
    "page that is a dictionary": (page(lambda h: h.__setitem__(1, (5, 2))), "page type 2"),
    "page of version 2": (page(lambda h: h.__setitem__(1, (5, 3))), "page type 3"),
    "page that looks up a dictionary": (page(data_header(2, 8)), "a plain encoding"),
    "page with a long header": (page(lambda h: h.__setitem__(40, (8, bytes(5000)))), "must be readable"),
    "page with a deep header": (page(lambda h: h.__setitem__(40, deep(20))), "field 40"),
    "zip bomb in bytes": (bomb("id0", 200_000_000), "must unpack"),
    "zip bomb in integers": (bomb("seq", 200_000_000), "must unpack"),
    "delta bomb": (delta_bomb, "must be readable|must be those of its commit record"),
    "column in another file": (put(column, 1, 8, b"/etc/passwd"), _PARQUET),
    "encrypted column": (put(column, 8, 12, {1: (12, {})}), _PARQUET),
    "encrypted footer": (put(top, 8, 12, {1: (12, {})}), _PARQUET),
    "schema of its own": (own_schema, "a schema of its own"),
    "author who is no text": (put(top, 6, 8, b"\xff\xfe"), _PARQUET),
    "footer with a deep field": (put(top, 5, 9, (12, [{1: deep(30)}])), "kind 12 for kind 8"),
    "footer with an unknown field": (put(top, 50, 5, 1), "field 50"),
    "footer without rows": (footer(lambda p: p.footer.pop(3)), _PARQUET),
    "row group of 2^40 rows": (put(group, 3, 6, 1 << 40), _PARQUET),
    "row group of fewer rows": (put(group, 3, 6, 1), _PARQUET),
    "row groups by the thousand": (footer(many_groups), _PARQUET),
    "sorted row group": (put(group, 4, 9, (12, [])), _PARQUET),
    "chunk beyond the file": (put(meta, 9, 6, 1 << 40), "from byte"),
    "chunk before the file": (put(meta, 9, 6, -1), "from byte"),
    "chunk of negative size": (put(meta, 7, 6, -1), "from byte"),
    "chunk that unpacks to much": (put(meta, 6, 6, 1 << 40), "must unpack to"),
    "chunk in another compression": (put(meta, 4, 5, 4), "of another type, name, compression"),
    "chunk with a dictionary": (put(meta, 11, 6, 4), _PARQUET),
    "chunk with a Bloom filter": (put(meta, 14, 6, 4), _PARQUET),
    "chunk of other rows": (put(meta, 5, 6, 3), "number of rows"),
    "chunk of another name": (put(meta, 3, 9, (8, [b"id1"])), "of another type, name"),
    "chunk of a nested name": (put(meta, 3, 9, (8, [b"id0", b"x"])), "of another type, name"),
    "chunk encoded as a dictionary": (put(meta, 2, 9, (5, [8])), "encoded as"),
    "column that may be null": (put(element, 3, 5, 1), "may be null"),
    "column that repeats": (put(element, 3, 5, 2), "may be null"),
    "column with children": (put(element, 5, 5, 3), "may be null"),
    "column of another type": (put(element, 1, 5, 2), "a column of type"),
    "column of another width": (put(element, 2, 5, 7), "columns must be"),
    "column of no width": (put(element, 2, 5, 0), "a column of width 0"),
    "column of another name": (put(element, 4, 8, b"tok9"), "of another type, name"),
    "column of no text": (put(element, 4, 8, b"\xff"), "a column"),
    "schema with fewer columns": (footer(lambda p: p.footer[2][1][1].pop()), "a schema of"),
    "footer that is longer than the file": (
        lambda f: forge_shard(f, lambda p: p.to_bytes()[:-8] + struct.pack("<I", BILLION) + b"PAR1"),
        "a footer of",
    ),
    "no Parquet": (lambda f: forge_shard(f, lambda p: b"PAR1" + bytes(200)), "another magic number"),
    "empty footer": (
        lambda f: forge_shard(f, lambda p: b"PAR1" + write_struct({}) + b"\1\0\0\0PAR1"),
        "bytes",
    ),
    "record as deep as a well": (raw_record(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), _JSON),
    "record of 40 levels": (raw_record(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"), "more than 32 levels"),
    "record of 17 MiB": (raw_record(b" " * (17 << 20)), "must be at most 16777216 bytes"),
    "record with a key twice": (raw_record(b'{"shard": 0, "shard": 0}'), "a duplicate key"),
    "record with NaN": (raw_record(b'{"shard": NaN}'), "the constant NaN"),
    "record that is no text": (raw_record(b'{"\xff": 1}'), _JSON),
    "record with half a character": (raw_record(b'{"\\ud800": 1}'), _JSON),
    "record with a number of 5000 digits": (raw_record(b'{"a": ' + b"9" * 5000 + b"}"), _JSON),
    "record with a huge integer": (
        record(lambda r: r["measured"].update(x=10**400)),
        "must be a number from",
    ),
    "record with an infinite number": (
        raw_record(seal({"format_version": 1, "shard": 0, "x": 1}).replace(b'"x": 1', b'"x": 1e999')),
        "must match its checksum",
    ),
    "record with a list for a number": (record(lambda r: r.update(shard=[0])), "must be an integer"),
    "record of 100,000 row groups": (record(lambda r: r.update(groups=[[1]] * 10**5)), "a list of at most"),
    "record with an empty row group": (record(lambda r: r.update(groups=[[], [1, 1]])), "row groups of 1 to"),
    "record with a negative length": (
        record(lambda r: r.update(groups=[[-1, 2]])),
        "a list of integers from 1",
    ),
    "record with a long sequence": (
        record(lambda r: r.update(groups=[[1 << 30, 1]])),
        "integers from 1 to 24",
    ),
    "record whose groups go on": (other_rows, "row groups that end at 2 tokens"),
    "record twice, another missing": (second_record, "all shards must be committed, found 1 of 2"),
    "record of another shard": (record(lambda r: r.update(shard=1)), "must be named targets-00001"),
    "row group that unpacks to 5 GB": (big_group, "must unpack to at most 2147483648 bytes"),
    "vocabulary beyond all bounds": (dataset(lambda r: r["target"].update(vocab_size=1 << 25)), "from 2 to"),
    "head beyond all bounds": (dataset(lambda r: r["target"].update(k=1 << 20)), "from 1 to 4096"),
    "head larger than the vocabulary": (dataset(lambda r: r["target"].update(k=300)), "k <= 299"),
    "sequences beyond all bounds": (
        dataset(lambda r: r.update(num_sequences=1 << 40)),
        "from 1 to 2147483647",
    ),
    "shards beyond all bounds": (
        dataset(lambda r: r.update(num_sequences=BILLION, sequences_per_shard=1)),
        "at most 16777216 shards",
    ),
    "layers beyond all bounds": (dataset(lambda r: r["hidden"].update(layers=[5000])), "from 0 to 1023"),
    "rank beyond the width": (dataset(lambda r: r["hidden"].update(rank=21)), "rank <= hidden_size 20"),
    "basis that claims 4 GiB": (claimed("basis", 1 << 32), "must be at most"),
    "codebook that claims 1 GiB": (claimed("codebook", 1 << 30), "must be at most"),
    "hidden basis that claims 1 GiB": (claimed("hidden_basis", 1 << 30), "must be at most"),
    "basis that claims 2 MB": (claimed("basis", 2_000_000), "must have 2000000 bytes"),
    "tensors with a header of 2^60 bytes": (
        tensors(b"{}", length=1 << 60),
        "header must end inside the file",
    ),
    "tensors with a shape of 2^96": (
        tensors(b'{"mean":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}'),
        "sizes whose product",
    ),
    "tensors with nothing of a huge shape": (
        tensors(
            b'{"mean":{"dtype":"F32","shape":[0,4294967296,4294967296,4294967296],"data_offsets":[0,0]}}'
        ),
        "sizes whose product",
    ),
    "tensors that overlap": (
        tensors(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "offsets from 4",
    ),
    "tensors as objects": (
        tensors(b'{"mean":{"dtype":"O","shape":[1],"data_offsets":[0,8]}}', bytes(8)),
        "one of F16",
    ),
    "a terabyte of nothing for a shard": (sparse("shards/targets-00000*", 1 << 40), "bytes"),
    "a terabyte of nothing for a basis": (sparse("bases/basis*", 1 << 40), "must be at most"),
    "a terabyte of nothing for a record": (sparse("commits/00000.json", 1 << 40), "must be at most 16777216"),
    "a terabyte of nothing for the dataset": (sparse("dataset.json", 1 << 40), "must be at most 1048576"),
    "a terabyte of nothing for a tokenizer": (
        sparse("tokenizer/tokenizer.json", 1 << 40),
        "must be at most 2",
    ),
}
