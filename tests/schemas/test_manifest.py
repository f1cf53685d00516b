"""Hostile and damaged JSON: whatever it says, only a CacheError comes out, or a value within its bounds."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import CacheError, CorruptionError, VersionError
from schemas.hidden_spec import HiddenSpec
from schemas.manifest import CommitRecord, Dataset, FileRef, checksum_of, hashed_name, seal
from schemas.spec import TargetSpec
from schemas.strict import parse_object

PARTS = ("teacher", "tokenizer", "chat_template", "data", "packing", "codec")
DATASET = Dataset(
    dict.fromkeys(PARTS, "x"),
    TargetSpec(vocab_size=300, k=6),
    23,
    300,
    5,
    24,
    40,
    HiddenSpec((1, 3), 20, rank=4),
    (FileRef.of("tokenizer.json", b"{}"),),
    {"teacher": "noise"},
)


def reference(stem, suffix):
    sha256 = FileRef.of("", stem.encode()).sha256
    return FileRef(hashed_name(stem, sha256, suffix), 100, sha256)


RECORD = CommitRecord(
    shard=1,
    dataset_checksum=checksum_of(DATASET.to_bytes()),
    targets=reference("targets-00001", ".parquet"),
    groups=((20, 24), (3, 24, 9)),
    num_trained_tokens=70,
    basis=reference("basis", ".safetensors"),
    codebook=reference("codebook", ".safetensors"),
    hidden=reference("hidden-00001", ".parquet"),
    hidden_basis=reference("hidden_basis", ".safetensors"),
    measured={"error": 0.5},
)
PARSERS = {
    "dataset": (DATASET, lambda data: Dataset.from_bytes(data, where="x")),
    "record": (RECORD, lambda data: CommitRecord.from_bytes(data, DATASET, where="x")),
}
STRANGE = st.one_of(
    st.sampled_from(
        [None, True, False, -1, 0, 1, 1.0, -0.5, 1e300, 2**31, 2**63, 2**80, "", "../x", "/x", {}, []]
    ),
    st.sampled_from(
        ["a" * 600, "\x00", "targets-00001-0123456789abcdef.parquet", [[]], [0], [[1, 2]], {"a": 1}]
    ),
    st.integers(),
    st.text(max_size=5),
)


def paths(value, prefix=()):
    """Every place in nested JSON."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*prefix, key))


def edited(value, path, edit):
    value = copy.deepcopy(value)
    *way, last = path
    inside = value
    for key in way:
        inside = inside[key]
    edit(inside, last)
    return value


@pytest.mark.parametrize("kind", PARSERS)
def test_round_trip(kind):
    value, parse = PARSERS[kind]
    assert parse(value.to_bytes()) == value
    assert parse(value.to_bytes()).to_bytes() == value.to_bytes()


@pytest.mark.parametrize("kind", PARSERS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_hostile_value_anywhere_is_refused_or_harmless(kind, data):
    value, parse = PARSERS[kind]
    raw = json.loads(value.to_bytes())
    del raw["checksum"]
    path = data.draw(st.sampled_from(sorted((p for p in paths(raw) if p), key=repr)))
    strange = data.draw(STRANGE)
    how = data.draw(st.sampled_from(["replace", "remove", "add"]))

    def edit(inside, key):
        if how == "replace":
            inside[key] = strange
        elif how == "remove":
            del inside[key]
        elif isinstance(inside, dict):
            inside["unheard of"] = strange

    sealed = seal(edited(raw, path, edit))
    try:
        result = parse(sealed)
    except CacheError as error:
        assert str(error).startswith("x")  # noqa: PT017 - whether it raises is the question
    else:
        assert parse(result.to_bytes()) == result


@pytest.mark.parametrize("kind", PARSERS)
def test_every_missing_and_every_unknown_key_is_refused(kind):
    value, parse = PARSERS[kind]
    raw = json.loads(value.to_bytes())
    for key in raw:
        short = {k: v for k, v in raw.items() if k != key}
        with pytest.raises(CacheError):
            parse(seal(short) if key != "checksum" else json.dumps(short).encode())
    with pytest.raises(CorruptionError, match=r"found unknown \['more'\]"):
        parse(seal(raw | {"more": 1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [[20, 24], [3, 24]]}, "must be 5 sequences, found 4|'num_sequences'"),
        ({"groups": [[20, 24], [], [3, 24, 9]]}, "row groups of 1 to"),
        ({"groups": [[20, 24], [3, 25, 9]]}, "'groups': must be a list of integers from 1 to 24"),
        ({"num_tokens": 81}, "'num_tokens': must be an integer from 80 to 80, found 81"),
        ({"num_trained_tokens": 81}, "at most 80 trained tokens"),
        ({"basis": None}, "a basis exactly with tail 'sketch'"),
        ({"hidden": None}, "a hidden file exactly when"),
        ({"hidden_basis": None}, "a hidden basis exactly when"),
        ({"shard": 5}, "'shard': must be an integer from 0 to 4"),
        ({"shard": 2}, "'targets': must be named targets-00002-"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(CorruptionError, match=message):
        PARSERS["record"][1](seal(json.loads(RECORD.to_bytes()) | change))


def test_versions():
    parse = PARSERS["dataset"][1]
    raw = json.loads(DATASET.to_bytes())
    with pytest.raises(
        VersionError, match="format_version must be at most 1, found 7; upgrade pmetal-distill"
    ):
        parse(seal(raw | {"format_version": 7}))
    for version in (0, True, "1", 1.5, None):
        with pytest.raises(CorruptionError):
            parse(seal(raw | {"format_version": version}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must be strict JSON"),
        (b"\xff\xfe{}", "must be strict JSON"),
        (b'{"a": 1, "a": 2}', "a duplicate key"),
        (b'{"a": NaN}', "the constant NaN"),
        (b"[1]", "must be a JSON object, found list"),
        (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "must be strict JSON"),
        (b'{"a":' + b"9" * 50_000 + b"}", "must be strict JSON"),
        (b" " * 200_000, "at most 150000 bytes of JSON, found 200000"),
    ],
    ids=["empty", "encoding", "duplicate", "nan", "list", "deep", "long number", "long"],
)
def test_strict_json(data, message):
    with pytest.raises(CorruptionError, match=message):
        parse_object(data, where="x", max_bytes=150_000)


def test_checksum_covers_every_byte():
    data = DATASET.to_bytes()
    for position in range(0, len(data), 7):
        for byte in (b" ", b"0", b"\n"):
            changed = data[:position] + byte + data[position + 1 :]
            if changed != data:
                with pytest.raises(CacheError):
                    PARSERS["dataset"][1](changed)
