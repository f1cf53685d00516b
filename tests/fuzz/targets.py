"""One function a target: bytes in, whether they were accepted out; errors that no user may see are findings.

What is accepted must be sound: written and read again it is the same, ids are inside the vocabulary, and
numbers are finite.
"""

import contextlib
import hashlib
import io
import math
import re
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from pmetal_distill.checkpoint import StateFile
from pmetal_distill.modelling.gguf_format import read_gguf
from pmetal_distill.offline.footer import check_structure
from pmetal_distill.offline.pages import read_pages
from pmetal_distill.offline.shard_reader import CheckedFiles, Shard, ShardReader, open_parquet
from pmetal_distill.offline.store import Store
from pmetal_distill.yaml_files import MAX_NODES, read_yaml, write_yaml
from schemas.basis import SketchBasis
from schemas.codebook import Codebook
from schemas.codec import Codec
from schemas.errors import CacheError, CheckpointError, ModelError, UsageError
from schemas.hidden import HiddenBasis
from schemas.hidden_spec import HiddenSpec
from schemas.manifest import CommitRecord, Dataset, FileRef, checksum_of, hashed_name
from schemas.spec import TargetSpec

Target = Callable[[bytes], bool]
MAX_TABLE_ITEMS = 1 << 16

SPEC = TargetSpec(vocab_size=300, k=2, tail="bucket", curve_nodes=(0.5, 1.0))
FINGERPRINT = dict.fromkeys(("teacher", "tokenizer", "chat_template", "data", "packing", "codec"), "x")
RICH = Dataset(FINGERPRINT, TargetSpec(vocab_size=300), 4, 60, 2, 24, 30, HiddenSpec((1, 3), 20, rank=4))
PLAIN = Dataset(FINGERPRINT, SPEC, 3, 12, 2, 6, 5)
GROUPS = ((4, 3),)


@cache
def folder() -> Path:
    """A place for files that only a path can be given of."""
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=shm if shm.is_dir() else None))


def resealed(data: bytes) -> bytes:
    """`data` with the checksum that it should have, so that mutations get past it."""
    checksum = checksum_of(data).encode()
    return re.sub(rb'("checksum": ")[0-9a-f]{64}', rb"\g<1>" + checksum, data) if checksum else data


def dataset(data: bytes) -> bool:
    """`dataset.json`, as it is and with its checksum put right."""
    for text in {data, resealed(data)}:
        with contextlib.suppress(CacheError):
            found = Dataset.from_bytes(text, where="x")
            assert Dataset.from_bytes(found.to_bytes(), where="x") == found
            assert found.num_shards >= 1
            return True
    return False


def record(data: bytes) -> bool:
    """A commit record, as it is and with its checksum put right."""
    for text in {data, resealed(data)}:
        for of in (RICH, PLAIN):
            with contextlib.suppress(CacheError):
                found = CommitRecord.from_bytes(text, of, where="x")
                assert CommitRecord.from_bytes(found.to_bytes(), of, where="x") == found
                assert found.num_sequences == len(of.shard_range(found.shard))
                assert all(re.fullmatch(r"(shards|bases)/[\w.-]+", path) for path in found.files())
                return True
    return False


def sidecar(data: bytes) -> bool:
    """The three kinds of sidecars."""
    with contextlib.suppress(CacheError):
        basis = SketchBasis.from_bytes(data, where="x")
        assert SketchBasis.from_bytes(basis.to_bytes(), where="x").to_bytes() == basis.to_bytes()
        if basis.vocab_size * basis.rank <= MAX_TABLE_ITEMS:
            basis.tables(basis.rank)
        assert np.isfinite(basis.components).all()
        return True
    with contextlib.suppress(CacheError):
        codebook = Codebook.from_bytes(data, where="x")
        assert (codebook.token_order[codebook.token_codes] == np.arange(len(codebook.token_order))).all()
        return True
    with contextlib.suppress(CacheError):
        hidden = HiddenBasis.from_bytes(data, where="x")
        assert HiddenBasis.from_bytes(hidden.to_bytes(), where="x").to_bytes() == hidden.to_bytes()
        return True
    return False


def gguf(data: bytes) -> bool:
    """A model file: its header and its first tensors."""
    path = folder() / "x.gguf"
    path.write_bytes(data)
    with contextlib.suppress(ModelError):
        found = read_gguf(path)
        for name, info in list(found.tensors.items())[:4]:
            assert found.data_start + info.offset + info.num_bytes <= len(data)
            if math.prod(info.shape) <= MAX_TABLE_ITEMS:
                with contextlib.suppress(ModelError):
                    assert np.isfinite(found.read(name)).all()
        return True
    return False


def yaml(data: bytes) -> bool:
    """A recipe."""
    path = folder() / "x.yaml"
    path.write_bytes(data)
    try:
        values, lines = read_yaml(path)
    except UsageError as error:
        return str(error) == ""
    assert count(values) <= MAX_NODES
    assert all(line >= 1 for line in lines.values())
    repr(values)
    if plain(values):
        write_yaml(values, path)
        assert repr(read_yaml(path)[0]) == repr(values)
    return True


def count(value: object) -> int:
    """Values in a value."""
    if isinstance(value, dict):
        return 1 + sum(map(count, value.values()))
    return 1 + sum(map(count, value)) if isinstance(value, list) else 1


def plain(value: object) -> bool:
    """Made of what a recipe holds."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(v) for key, v in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return (
        value is None
        or isinstance(value, (bool, int, float))
        or (isinstance(value, str) and value.isprintable())
    )


def pages(data: bytes) -> bool:
    """Page headers, which must fill the bytes."""
    file = io.BytesIO(b"PAR1" + data)
    with contextlib.suppress(CacheError):
        found = read_pages(file, 4, len(data), where="x")
        assert sum(page.header_bytes + page.packed_bytes for page in found) == len(data)
        return True
    return False


def footer(data: bytes) -> bool:
    """A footer behind 4 kB of zeros: what is let through must not end the process in Parquet's library."""
    file = io.BytesIO(b"PAR1" + bytes(4096) + data + struct.pack("<I", len(data)) + b"PAR1")
    with contextlib.suppress(CacheError):
        check_structure(file, where="x")
        parquet = open_parquet(file, where="x")
        meta = parquet.metadata
        for number in range(meta.num_row_groups):
            for column in range(meta.num_columns):
                chunk = meta.row_group(number).column(column)
                assert 4 <= chunk.data_page_offset <= 4100 - chunk.total_compressed_size
                assert chunk.num_values == meta.row_group(number).num_rows
        assert meta.num_columns == len(parquet.schema_arrow.names)
        return True
    return False


@cache
def cache_folder() -> Store:
    """A cache with room for one shard."""
    root = folder() / "cache"
    for name in ("shards", "commits", "bases"):
        (root / name).mkdir(parents=True)
    (root / "dataset.json").write_bytes(PLAIN.to_bytes())
    return Store.open(root)


def shard(data: bytes) -> bool:
    """A target file whose record vouches for it."""
    store = cache_folder()
    name = hashed_name("targets-00000", "0" * 16, ".parquet")
    path = store.root / "shards" / name
    path.write_bytes(data)
    found = CommitRecord(0, store.checksum, FileRef(name, len(data), "0" * 64), GROUPS, 0)
    reader = ShardReader(store, checked=CheckedFiles(), verify=False)
    try:
        rows, targets = reader.targets(Shard(found, 0, Codec(SPEC), None), 0)
    except CacheError:
        return False
    finally:
        reader.close()
    assert len(rows) == sum(GROUPS[0]) == len(targets.head_ids)
    assert rows.sequences.tolist() == [0] * 4 + [1] * 3
    for ids in (rows.token_ids, targets.head_ids):
        assert ids.min() >= 0
        assert ids.max() < SPEC.vocab_size
    assert np.isfinite(targets.head_logprobs).all()
    assert np.isfinite(targets.tail_curve).all()
    return True


def checkpoint(data: bytes) -> bool:
    """A training state whose name vouches for it."""
    path = folder() / f"00000001-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    path.write_bytes(data)
    try:
        state = StateFile(1, path).read()
    except (CacheError, CheckpointError):
        return False
    finally:
        path.unlink()
    assert sum(array.nbytes for array in state.arrays.values()) <= len(data)
    assert isinstance(state.record, dict)
    return True


TARGETS: dict[str, Target] = {
    "dataset": dataset,
    "record": record,
    "sidecar": sidecar,
    "gguf": gguf,
    "yaml": yaml,
    "pages": pages,
    "footer": footer,
    "shard": shard,
    "checkpoint": checkpoint,
}
