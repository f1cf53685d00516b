import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from caches import (
    SPEC,
    TOKENIZER,
    files_in,
    hidden_spec,
    make_dataset,
    make_sequence,
    open_writer,
    sidecars,
    write_cache,
    write_shard,
)

from pmetal_distill.offline.store import Store
from pmetal_distill.offline.verify import verify_cache
from pmetal_distill.offline.writer import CacheWriter
from schemas.errors import (
    CacheError,
    CorruptionError,
    FingerprintError,
    IncompatibleError,
    NonFiniteError,
    UsageError,
)


def test_a_complete_cache_has_the_promised_files_and_nothing_else(tmp_path):
    cache = write_cache(tmp_path / "c", make_dataset(hidden=hidden_spec(rank=4)))
    store = Store.open(cache)
    records = [store.record(i) for i in store.committed()]
    expected = {
        "dataset.json",
        ".dataset.json",
        *(f"tokenizer/{n}" for n in TOKENIZER),
        *(f"commits/{i:05d}.json" for i in range(5)),
    }
    expected |= {path for record in records for path in record.files()}
    assert set(files_in(cache)) == expected
    assert [r.num_sequences for r in records] == [5, 5, 5, 5, 3]
    assert sum(r.num_tokens for r in records) == store.dataset.num_tokens


def test_row_groups_hold_whole_sequences_of_about_the_wanted_size(tmp_path):
    store = Store.open(write_cache(tmp_path / "c"))
    for shard in store.committed():
        record = store.record(shard)
        meta = pq.ParquetFile(store.root / "shards" / record.targets.name).metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        assert sizes == [sum(g) for g in record.groups]
        assert all(size >= 40 for size in sizes[:-1])
        assert all(sum(g[:-1]) < 40 for g in record.groups)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    a, b = write_cache(tmp_path / "a"), write_cache(tmp_path / "b", shards=[4, 2, 0, 1, 3])
    assert files_in(a) == files_in(b)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files_in(a))


def test_resume_writes_what_is_missing_only(tmp_path):
    cache = write_cache(tmp_path / "c", shards=[1, 3])
    before = {name: (cache / name).stat().st_mtime_ns for name in files_in(cache)}
    with open_writer(cache) as writer:
        assert writer.missing_shards() == [0, 2, 4]
        for index in writer.missing_shards():
            write_shard(writer, index)
        assert writer.missing_shards() == []
    assert all((cache / name).stat().st_mtime_ns == at for name, at in before.items() if "bases" not in name)


def test_a_committed_shard_is_not_computed_again(tmp_path):
    with open_writer(write_cache(tmp_path / "c")) as writer:
        record = writer.write_shard(2, iter(lambda: pytest.fail("consumed"), None))
        assert record == writer.store.record(2)


def test_measured_figures_are_read_after_the_sequences(tmp_path):
    figures = {}

    def sequences(writer):
        for n in writer.dataset.shard_range(0):
            figures["error_t2"] = 0.25 * n
            yield make_sequence(writer.dataset, n)

    with open_writer(tmp_path / "c") as writer:
        writer.write_shard(0, sequences(writer), measured=figures, **sidecars(writer.dataset))
        assert writer.store.record(0).measured["error_t2"] == 1.0
        assert writer.store.record(0).measured["clipped_coordinates"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": "sha256:zzzz"},
            r"^--teacher \(teacher\): 'sha256:aaaa' in the cache, 'sha256:zzzz' now",
        ),
        ({"chat_template": "other"}, "chat_template: 'none' in the cache"),
        ({"per_shard": 6}, r"^--sequences-per-shard \(sequences_per_shard\): 5 in the cache, 6 now"),
        (
            {"spec": dataclasses.replace(SPEC, logprob_step=0.5)},
            "target.logprob_step: 0.0078125 in the cache, 0.5 now",
        ),
        ({"hidden": hidden_spec()}, r"^--hidden-layers \(hidden\): None in the cache"),
    ],
)
def test_another_fingerprint_is_refused_by_name(tmp_path, changes, message):
    cache = write_cache(tmp_path / "c", shards=[0])
    before = files_in(cache)
    with pytest.raises(FingerprintError, match=message):
        open_writer(cache, **changes)
    assert files_in(cache) == before


def test_a_teacher_of_another_name_is_named_before_its_hash(tmp_path):
    dataset = dataclasses.replace(make_dataset(), meta={"teacher": "models/big", "data": "text"})
    CacheWriter.create_or_resume(tmp_path / "c", dataset, TOKENIZER).close()
    other = dataclasses.replace(make_dataset(teacher="sha256:zzzz"), meta={"teacher": "models/bigger"})
    with pytest.raises(FingerprintError) as caught:
        CacheWriter.create_or_resume(tmp_path / "c", other, TOKENIZER)
    expected = "--teacher (teacher): models/big (aaaa) in the cache, models/bigger (zzzz) now; dataset.json: "
    assert str(caught.value).startswith(expected)


def test_other_tokenizer_files_are_refused_and_lost_ones_restored(tmp_path):
    cache = write_cache(tmp_path / "c", shards=[0])
    with pytest.raises(FingerprintError, match="tokenizer files: other in the cache"):
        CacheWriter.create_or_resume(cache, make_dataset(), TOKENIZER | {"tokenizer.json": b"[]"})
    (cache / "tokenizer/tokenizer.json").unlink()
    (cache / "tokenizer/tokenizer_config.json").write_bytes(b'{"a": 2}')
    open_writer(cache).close()
    assert {n: (cache / "tokenizer" / n).read_bytes() for n in TOKENIZER} == TOKENIZER


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"must be empty or a cache, found \['thesis.tex'\]"):
        open_writer(tmp_path)
    with pytest.raises(UsageError, match="must be a folder, found a file"):
        open_writer(tmp_path / "thesis.tex")


def test_wrong_sequences_are_refused_and_nothing_is_committed(tmp_path):
    with open_writer(tmp_path / "c") as writer:
        dataset, extra = writer.dataset, sidecars(writer.dataset)
        good = [make_sequence(dataset, n) for n in dataset.shard_range(0)]
        with pytest.raises(IncompatibleError, match="shard 0: must have 5 sequences, found 4"):
            writer.write_shard(0, good[:4], **extra)
        with pytest.raises(IncompatibleError, match="shard 0: must have 5 sequences, found more"):
            writer.write_shard(0, good + good, **extra)
        short = dataclasses.replace(good[1], documents=good[1].documents[:-1])
        with pytest.raises(IncompatibleError, match="sequence 1: all arrays must have one length"):
            writer.write_shard(0, [good[0], short, *good[2:]], **extra)
        good[3].targets.coordinates[1, 0] = np.nan
        good[3].loss_mask[1] = True
        with pytest.raises(NonFiniteError, match=r"\(sequence 3, token 1\): coordinates must be finite"):
            writer.write_shard(0, good, **extra)
        assert writer.missing_shards() == [0, 1, 2, 3, 4]
    assert files_in(tmp_path / "c") == [
        ".dataset.json",
        "dataset.json",
        *(f"tokenizer/{n}" for n in sorted(TOKENIZER)),
    ]


def test_targets_of_the_trained_positions_alone_give_the_same_bytes(tmp_path):
    reference = write_cache(tmp_path / "r", shards=[0])
    with open_writer(tmp_path / "c") as writer:
        whole = [make_sequence(writer.dataset, n) for n in writer.dataset.shard_range(0)]
        short = [dataclasses.replace(s, targets=s.targets[s.loss_mask]) for s in whole]
        assert any(len(s.loss_mask) > s.loss_mask.sum() for s in whole)
        wrong = dataclasses.replace(whole[1], targets=whole[1].targets[:1])
        with pytest.raises(IncompatibleError, match="sequence 1: targets must be those of all"):
            writer.write_shard(0, [whole[0], wrong, *whole[2:]], **sidecars(writer.dataset))
        writer.write_shard(0, short, **sidecars(writer.dataset))
    assert files_in(tmp_path / "c") == files_in(reference)


def test_a_higher_level_of_zstd_takes_fewer_bytes_for_the_same_rows(tmp_path):
    dataset = make_dataset(rows_per_group=4096)
    sizes = {}
    for level in (1, 19):
        folder = tmp_path / str(level)
        with CacheWriter.create_or_resume(folder, dataset, TOKENIZER, zstd_level=level) as writer:
            sizes[level] = write_shard(writer, 0).targets.num_bytes
        assert verify_cache(folder).sequences == 5
    assert sizes[19] < sizes[1]


def test_a_full_disk_is_reported_and_nothing_is_committed(tmp_path, monkeypatch):
    with open_writer(tmp_path / "c") as writer:
        write_shard(writer, 0)

        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pmetal_distill.offline.shard.flush_file", full)
        with pytest.raises(
            CacheError, match=r"shard 1: must be written in full, found .*No space left.*--resume"
        ):
            write_shard(writer, 1)
        monkeypatch.undo()
        assert writer.missing_shards() == [1, 2, 3, 4]
        write_shard(writer, 1)


def test_a_file_that_does_not_read_back_is_not_committed(tmp_path, monkeypatch):
    with open_writer(tmp_path / "c") as writer:

        def rot(handle):
            handle.flush()
            with Path(handle.name).open("r+b") as same:
                same.seek(300)
                byte = same.read(1)
                same.seek(300)
                same.write(bytes([byte[0] ^ 1]))

        monkeypatch.setattr("pmetal_distill.offline.shard.flush_file", rot)
        with pytest.raises((CorruptionError, CacheError)):
            write_shard(writer, 0)
        assert writer.missing_shards() == [0, 1, 2, 3, 4]


def test_a_file_system_without_links_is_named(tmp_path, monkeypatch):
    def no_link(source, target):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(CacheError, match=r"dataset.json: the file system must support hard links"):
        open_writer(tmp_path / "c")
