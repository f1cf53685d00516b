"""The fuzz targets on their seeds, on mutants that know the structure, and on random bytes."""

import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pmetal_distill.offline.thrift import I32, I64, CompactReader, Kind, ListOf, Shape
from pmetal_distill.yaml_files import read_yaml, write_yaml
from schemas.hidden_spec import HiddenSpec
from schemas.manifest import CommitRecord, Dataset, FileRef, hashed_name
from schemas.spec import TargetSpec
from tests.faults.forge import write_struct
from tests.fuzz.corpus import read_corpus
from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import FOLDER, seeds
from tests.fuzz.targets import FINGERPRINT, TARGETS, folder

EXAMPLES = 150


@pytest.mark.parametrize("target", TARGETS)
def test_sound_seeds_are_accepted_and_found_ones_do_no_harm(target: str) -> None:
    paths = sorted((FOLDER / target).iterdir())
    assert {path.name for path in paths} >= {f"sound-{n}" for n in range(len(seeds()[target]))}
    for path in paths:
        accepted = TARGETS[target](path.read_bytes())
        assert accepted or not path.name.startswith("sound-"), path


@pytest.mark.parametrize("target", TARGETS)
def test_grown_inputs_do_no_harm(target: str) -> None:
    inputs = read_corpus(target)
    assert inputs
    for data in inputs.values():
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_mutants_are_refused_or_sound(target: str) -> None:
    inputs = [path.read_bytes() for path in sorted((FOLDER / target).iterdir())]

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.sampled_from(inputs), st.integers(0, 2**32))
    def check(data: bytes, seed: int) -> None:
        TARGETS[target](mutated(target, data, random.Random(seed)))

    check()


@pytest.mark.parametrize("target", TARGETS)
def test_random_bytes_are_refused_or_sound(target: str) -> None:
    @settings(max_examples=EXAMPLES // 3, deadline=None)
    @given(st.binary(max_size=200))
    @example(b"")
    def check(data: bytes) -> None:
        TARGETS[target](data)

    check()


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    """Any description that the format allows, of at most 20 shards."""
    vocab_size = draw(st.integers(2, 1 << 24))
    tail = draw(st.sampled_from(["none", "bucket", "sketch"]))
    k = draw(st.integers(1, min(4096, vocab_size - (tail != "none"))))
    nodes = draw(st.sets(st.floats(1e-3, 8), max_size=8)) | {1.0}
    spec = TargetSpec(
        vocab_size, k, tail, tuple(sorted(nodes)), draw(st.floats(1e-5, 1)), draw(st.floats(1e-4, 1))
    )
    size = draw(st.integers(1, 1 << 17))
    layers = tuple(sorted(draw(st.sets(st.integers(0, 1023), min_size=1, max_size=5))))
    hidden = HiddenSpec(
        layers, size, draw(st.sampled_from(["int8", "float16"])), rank=draw(st.integers(0, size))
    )
    per_shard = draw(st.integers(1, 6))
    meta = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3))
    return Dataset(
        FINGERPRINT,
        spec,
        draw(st.integers(1, 20 * per_shard)),
        draw(st.integers(1, 1 << 48)),
        per_shard,
        draw(st.integers(1, 1 << 20)),
        draw(st.integers(1, 1 << 21)),
        draw(st.sampled_from([None, hidden])),
        meta=meta,
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(datasets(), st.data())
def test_whatever_the_format_allows_reads_back(dataset: Dataset, data: st.DataObject) -> None:
    assert Dataset.from_bytes(dataset.to_bytes(), where="x") == dataset
    shard = data.draw(st.integers(0, dataset.num_shards - 1))
    longest = min(dataset.max_sequence_length, 50)
    groups = [(data.draw(st.integers(1, longest)),) for _ in dataset.shard_range(shard)]

    def file(stem: str, suffix: str, wanted: bool) -> Any:
        return (
            FileRef(hashed_name(stem, "a" * 64, suffix), data.draw(st.integers(0, 1 << 40)), "a" * 64)
            if wanted
            else None
        )

    record = CommitRecord(
        shard,
        "0" * 64,
        file(f"targets-{shard:05d}", ".parquet", True),
        tuple(groups),
        data.draw(st.integers(0, sum(map(sum, groups)))),
        basis=file("basis", ".safetensors", dataset.target.tail == "sketch"),
        codebook=file("codebook", ".safetensors", data.draw(st.booleans())),
        hidden=file(f"hidden-{shard:05d}", ".parquet", dataset.hidden is not None),
        hidden_basis=file("hidden_basis", ".safetensors", bool(dataset.hidden and dataset.hidden.rank)),
        measured=data.draw(st.dictionaries(st.text(max_size=5), st.floats(-1e300, 1e300), max_size=3)),
    )
    assert CommitRecord.from_bytes(record.to_bytes(), dataset, where="x") == record


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=10)
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=5))
def test_recipes_read_back(values: dict[str, Any]) -> None:
    path = folder() / "y.yaml"
    write_yaml(values, path)
    assert read_yaml(path)[0] == values


FIELDS = st.integers(1, 60)
THRIFT: Any = st.recursive(
    st.tuples(st.sampled_from([5, 6]), st.integers(-(2**31), 2**31 - 1))
    | st.tuples(st.just(8), st.binary(max_size=20)),
    lambda inner: (
        st.tuples(st.just(12), st.dictionaries(FIELDS, inner, max_size=4))
        | st.lists(st.integers(-9, 9), max_size=20).map(lambda items: (9, (5, items)))
        | st.lists(st.binary(max_size=5), max_size=20).map(lambda items: (9, (8, items)))
    ),
    max_leaves=10,
)


def shape_of(fields: dict[int, Any]) -> Shape:
    """The shape that these fields have."""

    def kind(wire: int, content: Any) -> Kind:
        return shape_of(content) if wire == 12 else ListOf(content[0]) if wire == 9 else wire

    return {number: kind(*field) for number, field in fields.items()}


def bare(fields: dict[int, Any]) -> dict[int, Any]:
    """Values without their kinds."""

    def value(kind: int, content: Any) -> Any:
        return bare(content) if kind == 12 else content[1] if kind == 9 else content

    return {number: value(*field) for number, field in fields.items()}


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.dictionaries(FIELDS, THRIFT, max_size=6))
def test_thrift_structures_read_back(fields: dict[int, Any]) -> None:
    data = write_struct(fields)
    reader = CompactReader(data + b"rest")
    assert reader.struct(shape_of(fields)) == bare(fields)
    assert reader.at == len(data)
    for number, (kind, _) in fields.items():
        other = shape_of(fields) | {number: I32 if kind != I32 else I64}
        with pytest.raises(ValueError, match=r"kind|a list of"):
            CompactReader(data).struct(other)
        del other[number]
        with pytest.raises(ValueError, match=f"field {number}"):
            CompactReader(data).struct(other)
