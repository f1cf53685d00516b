"""Makes the seeds in `tests/fuzz/seeds/TARGET/` again, small sound files: `python -m tests.fuzz.seeds`.

Names that begin with `found-` are inputs that fuzzing has found, and stay.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pyarrow.parquet as pq

from pmetal_distill.checkpoint import TrainingState, write_state
from schemas.arrays import TargetArrays, TokenRows
from schemas.basis import CoordinateGroup, SketchBasis
from schemas.codebook import Codebook
from schemas.codec import Codec, encode
from schemas.hidden import HiddenBasis
from schemas.layout import parquet_options
from schemas.manifest import CommitRecord, FileRef, hashed_name
from schemas.predictor import SketchPredictor
from tests.faults.forge import Parquet, write_struct
from tests.fuzz.targets import GROUPS, PLAIN, RICH, SPEC
from tests.tiny_gguf import write_gguf

FOLDER = Path(__file__).parent / "seeds"
RECIPE = """\
# a recipe
model: teacher
temperature: {type: linear, start: 4.0, end: 1e-1}
layers: &layers [1, 2, 0x10]
again: *layers
text: "quoted \\u00e9"
more: |
  lines
  of text
flag: true
nothing: ~
"""


def reference(stem: str, suffix: str) -> FileRef:
    """A file of no content that anybody looks at."""
    return FileRef(hashed_name(stem, "0" * 64, suffix), 10, "0" * 64)


def records() -> Iterator[bytes]:
    """One of a rich and one of a plain data set."""
    parts = {name: reference(name, ".safetensors") for name in ("basis", "codebook", "hidden_basis")}
    hidden = reference("hidden-00000", ".parquet")
    targets = reference("targets-00000", ".parquet")
    yield CommitRecord(
        0, "0" * 64, targets, ((24, 10),), 30, hidden=hidden, **parts, measured={"x": 0.5}
    ).to_bytes()
    yield CommitRecord(0, "0" * 64, targets, GROUPS, 5).to_bytes()


def sidecars() -> Iterator[bytes]:
    """Each kind, small."""
    rng = np.random.default_rng(0)
    groups = (CoordinateGroup(0, 1, 65536), CoordinateGroup(1, 3, 5))
    basis = SketchBasis(rng.normal(size=6), rng.normal(size=(6, 3)), 0.5, groups, {"a": "b"})
    yield basis.to_bytes()
    yield basis.with_predictor(SketchPredictor(np.eye(3), np.eye(3), np.ones(3))).to_bytes()
    yield Codebook(np.arange(5)[::-1], np.zeros((2, 3), np.int64)).to_bytes()
    yield HiddenBasis(rng.normal(size=(2, 4)), rng.normal(size=(2, 4, 2))).to_bytes()


def shard() -> bytes:
    """The file of `targets.shard`."""
    rng = np.random.default_rng(0)
    n = sum(GROUPS[0])
    head = -np.sort(rng.uniform(0.5, 3, (n, SPEC.k)), axis=1)
    curve = np.array([4.0, 3.0]) + rng.uniform(0, 0.1, (n, 1))
    ids = rng.permutation(SPEC.vocab_size)[: n * SPEC.k].reshape(n, SPEC.k)
    targets = TargetArrays(
        ids.astype(np.int32), head.astype(np.float32), curve.astype(np.float32), np.zeros((n, 0), np.float32)
    )
    mask = np.ones(n, np.bool_)
    rows = TokenRows(
        np.arange(n, dtype=np.int32), np.repeat(np.int32([0, 1]), GROUPS[0]), np.zeros(n, np.int32), mask
    )
    codec = Codec(SPEC)
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        with pq.ParquetWriter(file.name, codec.schema, **parquet_options(codec.schema)) as writer:
            writer.write_table(encode(targets, rows, codec)[0])
        return Path(file.name).read_bytes()


def gguf() -> bytes:
    """One tensor of each type, and values of every kind."""
    metadata = {"general.architecture": "llama", "a": 1, "b": 2.5, "c": True, "d": ["x", "yz"], "e": [1, 2]}
    tensors = {
        kind: (kind, np.linspace(-1, 1, 32).reshape(1, 32)) for kind in ("F32", "F16", "Q4_0", "Q4_1", "Q8_0")
    }
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "x.gguf", metadata, tensors).read_bytes()


def checkpoint() -> bytes:
    """A state of three arrays."""
    arrays = {
        "student.w": mx.arange(6.0).reshape(2, 3),
        "optimizer.step": mx.array(3),
        "h": mx.array([1], mx.float16),
    }
    with tempfile.TemporaryDirectory() as folder:
        return write_state(Path(folder), 1, TrainingState(arrays, {"step": 1, "seed": 0})).path.read_bytes()


def seeds() -> dict[str, list[bytes]]:
    """Sound inputs by target."""
    data = shard()
    parquet = Parquet.parse(data)
    chunks = [write_struct(chunk.header) + chunk.data for chunk in list(parquet.chunks.values())[:3]]
    return {
        "dataset": [RICH.to_bytes(), PLAIN.to_bytes()],
        "record": list(records()),
        "sidecar": list(sidecars()),
        "gguf": [gguf()],
        "yaml": [RECIPE.encode()],
        "pages": [*chunks, b"".join(chunks)],
        "footer": [write_struct(parquet.footer)],
        "shard": [data],
        "checkpoint": [checkpoint()],
    }


if __name__ == "__main__":
    for target, inputs in seeds().items():
        (FOLDER / target).mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(inputs):
            (FOLDER / target / f"sound-{number}").write_bytes(content)
