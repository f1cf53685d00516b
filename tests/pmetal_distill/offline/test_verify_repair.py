import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caches import SPEC, TOKENIZER, hidden_spec, make_dataset, sidecars, write_cache, write_shard

from pmetal_distill.offline.invariants import broken_rows
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.repair import repair_cache
from pmetal_distill.offline.store import Store
from pmetal_distill.offline.verify import verify_cache
from pmetal_distill.offline.writer import CacheWriter
from schemas.arrays import TargetArrays
from schemas.codec import Codec
from schemas.errors import CacheError, CorruptionError
from schemas.layout import parquet_options
from schemas.manifest import FileRef, hashed_name


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cache") / "c", make_dataset(hidden=hidden_spec(rank=4)))


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "c")


def messages(folder):
    return [str(f) for f in verify_cache(folder).findings]


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def restore(folder):
    """What `cache --resume` does."""
    with CacheWriter.create_or_resume(folder, make_dataset(hidden=hidden_spec(rank=4)), TOKENIZER) as writer:
        for shard in writer.missing_shards():
            write_shard(writer, shard)


def contents(folder):
    kept = (p for p in folder.rglob("*") if p.is_file() and "quarantine" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def everything(folder):
    """All that a reader returns, as bytes."""
    with_states = LogitCache(folder, hidden_layers=(1, 3))
    for number in range(with_states.num_sequences):
        s = with_states.sequence(number)
        arrays = (s.token_ids, s.documents, s.loss_mask, *s.targets.parts(), s.hidden[1], s.hidden[3])
        yield b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
    yield repr((with_states.spec, with_states.dataset)).encode()
    yield b"".join(b.to_bytes() for b in with_states.bases)
    with_states.tokenizer_path.exists()


def test_a_sound_cache_has_no_findings(folder):
    seen = []
    report = verify_cache(folder, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert report.findings == []
    store = Store.open(folder)
    assert (report.shards, report.sequences, report.tokens) == (5, 23, store.dataset.num_tokens)
    assert report.num_bytes == sum(p.stat().st_size for p in (folder / "shards").iterdir())
    assert seen == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize("flips", [1, pytest.param(40, marks=pytest.mark.faults)])
def test_single_bit_flips_are_caught_by_reader_and_verify_and_repaired(folder, pristine, flips):
    """In every file: the reader raises or returns the same, verify names the file, repair heals it."""
    rng = np.random.default_rng(0)
    truth = list(everything(pristine))
    for name in sorted(contents(pristine)):
        for bit in rng.integers(0, 8 * (folder / name).stat().st_size, flips):
            flip(folder / name, int(bit))
            try:
                assert list(everything(folder)) == truth
            except CacheError:
                pass
            else:
                assert name == ".dataset.json", f"bit {bit} of {name} was not noticed"
            if name == "dataset.json":
                with pytest.raises(CacheError, match=r"dataset\.json"):
                    verify_cache(folder)
            else:
                assert any(name in message for message in messages(folder)), name
            repair_cache(folder)
            restore(folder)
            assert contents(folder) == contents(pristine)


def test_verify_names_missing_shards_and_orphans(folder):
    store = Store.open(folder)
    store.record_path(2).unlink()
    report = verify_cache(folder)
    assert not report.ok
    assert [f.kind for f in report.findings] == ["missing", "orphan", "orphan"]
    assert str(report.findings[0]).startswith("commits/00002.json: must exist in a complete cache")
    assert repair_cache(folder).moved == []
    restore(folder)
    orphan = folder / "shards/targets-00002-0123456789abcdef.parquet"
    orphan.write_bytes(b"x")
    assert verify_cache(folder).ok
    assert repair_cache(folder).moved == ["shards/targets-00002-0123456789abcdef.parquet"]
    assert not orphan.exists()
    assert (folder / "quarantine/0000" / orphan.relative_to(folder).as_posix().replace("/", "-")).exists()


@pytest.mark.parametrize("how", ["truncate", "delete", "swap", "empty", "folder", "link"])
@pytest.mark.parametrize("family", ["targets", "hidden"])
def test_damaged_files_are_found_and_written_again(folder, pristine, how, family):
    store = Store.open(folder)
    path = folder / "shards" / getattr(store.record(1), family).name
    other = folder / "shards" / getattr(store.record(2), family).name
    if how == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "swap":
        path.write_bytes(other.read_bytes())
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(pristine / "shards" / path.name)
    with pytest.raises(CorruptionError, match=f"shards/{path.name}"):
        list(everything(folder))
    assert [(f.path, f.shard) for f in verify_cache(folder).findings] == [(f"shards/{path.name}", 1)]
    dry = repair_cache(folder, dry_run=True)
    assert dry.shards == [1]
    assert Store.open(folder).committed() == [0, 1, 2, 3, 4]
    assert repair_cache(folder).moved == dry.moved
    assert Store.open(folder).committed() == [0, 2, 3, 4]
    restore(folder)
    assert contents(folder) == contents(pristine)


@pytest.mark.parametrize("kind", ["basis", "codebook", "hidden_basis"])
def test_a_lost_sidecar_takes_its_shards_with_it(folder, pristine, kind):
    (path,) = (folder / "bases").glob(f"{kind}-*")
    path.unlink()
    report = repair_cache(folder)
    assert report.shards == [0, 1, 2, 3, 4]
    restore(folder)
    assert contents(folder) == contents(pristine)


def test_a_sidecar_of_another_cache_is_refused(folder, tmp_path):
    other = make_dataset(spec=dataclasses.replace(SPEC, vocab_size=400))
    (path,) = (folder / "bases").glob("basis-*")
    path.write_bytes(sidecars(other)["basis"].to_bytes())
    with pytest.raises(CorruptionError, match=f"bases/{path.name}: must"):
        LogitCache(folder)


def forge(folder, change):
    """Rewrite shard 0 with changed columns and a commit record that vouches for them."""
    store = Store.open(folder)
    record = store.record(0)
    old = folder / "shards" / record.targets.name
    codec = Codec(store.dataset.target, store.basis(record.basis), store.codebook(record.codebook))
    file = pq.ParquetFile(old)
    new = folder / "shards/new"
    with pq.ParquetWriter(new, codec.schema, **parquet_options(codec.schema)) as writer:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            writer.write_table(change(table) if group == 0 else table)
    sha256 = hashlib.sha256(new.read_bytes()).hexdigest()
    ref = FileRef(hashed_name("targets-00000", sha256, ".parquet"), new.stat().st_size, sha256)
    old.unlink()
    new.rename(folder / "shards" / ref.name)
    store.record_path(0).write_bytes(dataclasses.replace(record, targets=ref).to_bytes())
    return ref.name


def replace_column(table, name, edit):
    column = table.column(name).combine_chunks()
    values = [edit(i, v) for i, v in enumerate(column.to_pylist())]
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, column.type))


def trained_row(folder):
    return int(LogitCache(folder).sequence(0).loss_mask.argmax())


def masked_row(folder):
    return int((~LogitCache(folder).sequence(0).loss_mask).argmax())


@pytest.mark.parametrize(
    ("columns", "edit", "row_of", "message"),
    [
        (("id0", "id1"), lambda v: v[:1] * len(v), trained_row, "head ids must be distinct"),
        (("crv1",), lambda v: v[:-1] + b"\x05", trained_row, "the tail curve must fall"),
        (("crv1",), lambda v: v[:3] + b"\xfa" + v[4:], trained_row, "the tail curve must be convex"),
        (("sk0l",), lambda v: b"\x01" * len(v), masked_row, "rows outside the loss mask must be zero"),
        (("seq",), lambda v: v + 1, trained_row, "sequence numbers must be those of its commit record"),
        (("doc",), lambda v: -3, trained_row, "documents must be numbered from 0"),
        (("msk",), lambda v: not v, masked_row, "trained tokens must be|log-prob|head ids|curve"),
        (("id1",), lambda v: b"\xff" * len(v), trained_row, "head ids must be below V=300"),
        (("sk2",), lambda v: b"\xff" * len(v), trained_row, "bytes of 'sk2' must be digits of base 5"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else None,
)  # fmt: skip
def test_forged_values_are_named_even_when_every_hash_agrees(folder, columns, edit, row_of, message):
    row = row_of(folder)

    def change(table):
        for name in columns:
            table = replace_column(table, name, lambda i, v: edit(v) if i == row else v)
        return table

    name = forge(folder, change)
    found = messages(folder)
    assert any(name in m for m in found)
    assert any(part in m for part in message.split("|") for m in found), found
    assert repair_cache(folder).shards == [0]


def test_findings_name_row_and_sequence(folder):
    row = trained_row(folder)
    name = forge(folder, lambda t: replace_column(t, "doc", lambda i, v: -1 if i == row else v))
    place = f"shards/{name} row {row} (sequence 0)"
    assert messages(folder) == [f"{place}: documents must be numbered from 0; run 'pmetal-pipeline repair'"]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.slice(0, t.num_rows - 1),
        lambda t: pa.concat_tables([t, t]),
    ],
    ids=["short", "long"],
)
def test_rows_that_the_record_does_not_promise_are_refused(folder, change):
    forge(folder, change)
    with pytest.raises(CorruptionError, match="row groups must have"):
        LogitCache(folder).sequence(0)


def test_a_record_that_lies_about_tokens_is_found(folder):
    store = Store.open(folder)
    record = dataclasses.replace(store.record(0), num_trained_tokens=1)
    store.record_path(0).write_bytes(record.to_bytes())
    assert any("trained tokens must be 1 as in the commit record" in m for m in messages(folder))


def test_a_damaged_record_takes_all_files_of_its_shard(folder, pristine):
    path = folder / "commits/00003.json"
    path.write_bytes(json.dumps(json.loads(path.read_bytes())).encode().replace(b"3", b"4"))
    report = repair_cache(folder)
    assert report.shards == [3]
    assert len(report.moved) == 3
    restore(folder)
    assert contents(folder) == contents(pristine)


def test_tokenizer_damage_is_repaired(folder, pristine):
    (folder / "tokenizer/tokenizer.json").write_bytes(b"[]")
    assert repair_cache(folder).moved == ["tokenizer/tokenizer.json"]
    restore(folder)
    assert contents(folder) == contents(pristine)


def test_broken_rows_names_the_first_of_each_kind():
    sequence = LogitCacheRows()
    targets = sequence.targets(head_logprobs=lambda a: np.flip(a, axis=1))
    assert next(broken_rows(sequence.rows, targets, SPEC))[1] == "log-probabilities must not rise"
    targets = sequence.targets(coordinates=lambda a: a * np.nan)
    assert [m for _, m in broken_rows(sequence.rows, targets, SPEC)] == ["coordinates must be finite"]
    assert list(broken_rows(sequence.rows, sequence.targets(), SPEC)) == []


class LogitCacheRows:
    """Rows of one sequence, with a way to change a part of the targets."""

    def __init__(self):
        from caches import make_sequence

        from schemas.arrays import TokenRows

        s = make_sequence(make_dataset(), 3)
        n = len(s.token_ids)
        self.rows = TokenRows(s.token_ids, np.full(n, 3, np.int32), s.documents, np.ones(n, np.bool_))
        self.parts = dict(
            zip(("head_ids", "head_logprobs", "tail_curve", "coordinates"), s.targets.parts(), strict=True)
        )

    def targets(self, **changes):
        return TargetArrays(**{name: changes.get(name, lambda a: a)(a) for name, a in self.parts.items()})
