import dataclasses
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from caches import (
    FINGERPRINT,
    SPEC,
    TOKENIZER,
    hidden_spec,
    make_dataset,
    make_sequence,
    sidecars,
    write_cache,
    write_shard,
)

from pmetal_distill.offline.commit import Scratch
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
from schemas.manifest import CommitRecord, Dataset, checksum_of, seal


def open_writer(folder, dataset=None, **changes):
    return CacheWriter.create_or_resume(folder, dataset or make_dataset(**changes), TOKENIZER)


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_complete_cache_has_the_promised_files_and_nothing_else(tmp_path):
    cache = write_cache(tmp_path / "c", make_dataset(hidden=hidden_spec(rank=4)))
    store = Store.open(cache)
    records = [store.record(i) for i in store.committed()]
    expected = {
        "dataset.json",
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
        ({"teacher": "sha256:zzzz"}, "teacher: 'sha256:aaaa' in the cache, 'sha256:zzzz' now"),
        ({"chat_template": "other"}, "chat_template: 'none' in the cache"),
        ({"per_shard": 6}, "sequences_per_shard: 5 in the cache, 6 now"),
        (
            {"spec": dataclasses.replace(SPEC, logprob_step=0.5)},
            "target.logprob_step: 0.0078125 in the cache, 0.5 now",
        ),
        ({"hidden": hidden_spec()}, "hidden: None in the cache"),
    ],
)
def test_another_fingerprint_is_refused_by_name(tmp_path, changes, message):
    cache = write_cache(tmp_path / "c", shards=[0])
    before = files_in(cache)
    with pytest.raises(FingerprintError, match=message):
        open_writer(cache, **changes)
    assert files_in(cache) == before


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
    assert files_in(tmp_path / "c") == ["dataset.json", *(f"tokenizer/{n}" for n in sorted(TOKENIZER))]


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


def test_the_loser_of_a_race_discards_its_files(tmp_path):
    """A second writer commits shard 0, with other content, while the first is still reading its sequences."""
    first, second = open_writer(tmp_path / "c"), open_writer(tmp_path / "c")

    def slow():
        for n in first.dataset.shard_range(0):
            yield make_sequence(first.dataset, n)
        write_shard(second, 0, seed=7)

    with first, second:
        record = first.write_shard(0, slow(), **sidecars(first.dataset))
        assert record == second.store.record(0)
        names = [p.name for p in (tmp_path / "c/shards").iterdir()]
        assert names == [record.targets.name]


def test_files_left_by_a_dead_writer_go_once_their_shard_is_written(tmp_path):
    cache = tmp_path / "c"
    with open_writer(cache) as writer:
        orphan = cache / "shards/targets-00000-0123456789abcdef.parquet"
        orphan.write_bytes(b"half")
        other = cache / "shards/targets-00001-0123456789abcdef.parquet"
        other.write_bytes(b"may belong to a living writer")
        write_shard(writer, 0)
        assert writer.missing_shards() == [1, 2, 3, 4]
        assert not orphan.exists()
        assert other.exists()


SCRATCH_USER = """
import sys, time, pathlib
from pmetal_distill.offline.commit import Scratch
scratch = Scratch(pathlib.Path(sys.argv[1]))
scratch.path("x").write_text("x")
print("up", flush=True)
time.sleep(60)
"""


def test_scratch_of_a_dead_process_is_removed_and_that_of_a_living_one_kept(tmp_path):
    command = [sys.executable, "-c", SCRATCH_USER, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path.cwd())
    with child:
        assert child.stdout.readline() == b"up\n"
        with Scratch(tmp_path) as living:
            assert len(list((tmp_path / "_tmp").iterdir())) == 4
            child.kill()
            child.wait()
            with Scratch(tmp_path) as third:
                left = {p.name for p in (tmp_path / "_tmp").iterdir()}
                assert left == {p for s in (living, third) for p in (s.folder.name, f"{s.folder.name}.lock")}
    assert list((tmp_path / "_tmp").iterdir()) == []


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


def test_every_flipped_bit_of_dataset_and_records_is_caught(tmp_path):
    cache = write_cache(tmp_path / "c", shards=[0])
    dataset = make_dataset()
    for path, stride in ((cache / "dataset.json", 13), (cache / "commits/00000.json", 11)):
        data = path.read_bytes()
        for bit in range(0, 8 * len(data), stride):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(CacheError):
                Store.open(cache).record(0)
        path.write_bytes(data)
    assert Store.open(cache).record(0).num_sequences == len(dataset.shard_range(0))


def test_a_newer_version_is_named(tmp_path):
    raw = make_dataset().to_bytes().replace(b'"format_version": 1', b'"format_version": 2')
    with pytest.raises(Exception, match="format_version must be at most 1, found 2; upgrade pmetal-distill"):
        Dataset.from_bytes(raw, where="x")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.parquet", "targets-00001-{}.parquet", "a/b", "", ".x"])
def test_records_cannot_name_other_files(tmp_path, name):
    import json

    store = Store.open(write_cache(tmp_path / "c", shards=[0]))
    raw = json.loads(store.record_path(0).read_bytes())
    raw["targets"]["name"] = name.format(raw["targets"]["sha256"][:16])
    del raw["checksum"]
    with pytest.raises(CorruptionError, match="commits/0: 'targets'"):
        CommitRecord.from_bytes(seal(raw), store.dataset, where="commits/0")


def test_links_inside_a_cache_are_refused(tmp_path):
    cache = write_cache(tmp_path / "c", shards=[0])
    record = cache / "commits/00000.json"
    record.rename(tmp_path / "elsewhere.json")
    record.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CorruptionError, match=r"commits/00000.json: must be a plain readable file"):
        Store.open(cache).record(0)
    (cache / "bases").rename(tmp_path / "bases")
    (cache / "bases").symlink_to(tmp_path / "bases")
    with pytest.raises(CorruptionError, match="bases: must be a folder inside the cache"):
        Store.open(cache)


def test_a_record_of_another_cache_is_refused(tmp_path):
    a = write_cache(tmp_path / "a", shards=[0])
    b = write_cache(tmp_path / "b", make_dataset(teacher="other"), shards=[0])
    (a / "commits/00000.json").write_bytes((b / "commits/00000.json").read_bytes())
    with pytest.raises(CorruptionError, match="must be shard 0 of this dataset"):
        Store.open(a).record(0)
    assert FINGERPRINT["teacher"] != "other"


def test_checksum_needs_exactly_one_place():
    assert checksum_of(b"{}") == ""
    sealed = make_dataset().to_bytes()
    assert checksum_of(sealed).encode() in sealed
    assert checksum_of(sealed + sealed) == ""


WORKER = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
from caches import *
dataset = make_dataset(num_sequences=60, per_shard=2)
with CacheWriter.create_or_resume(pathlib.Path(sys.argv[1]), dataset, TOKENIZER) as writer:
    print("open", flush=True)
    for i in writer.missing_shards()[:: int(sys.argv[3])]:
        write_shard(writer, i, seed=int(sys.argv[4]))
"""


def start_worker(cache, direction, seed):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", WORKER, str(cache), here, direction, seed]
    return subprocess.Popen(command, cwd=Path.cwd(), stdout=subprocess.PIPE)


def kill_two_writers(cache, rounds, rng, *, seeds):
    """Kill two racing writers at random moments, `rounds` times; let the last pair finish."""
    for _ in range(rounds):
        workers = [start_worker(cache, d, s) for d, s in zip(("1", "-1"), seeds, strict=True)]
        for worker in workers:
            worker.stdout.readline()
            time.sleep(rng.uniform(0, 0.12))
            worker.kill()
            worker.communicate()
    workers = [start_worker(cache, d, s) for d, s in zip(("1", "-1"), seeds, strict=True)]
    assert [worker.communicate() and worker.returncode for worker in workers] == [0, 0]


@pytest.mark.parametrize("rounds", [5, pytest.param(60, marks=pytest.mark.faults)])
def test_two_writers_of_the_same_content_under_sigkill(tmp_path, rounds):
    cache, reference = (
        tmp_path / "c",
        write_cache(tmp_path / "r", make_dataset(num_sequences=60, per_shard=2)),
    )
    kill_two_writers(cache, rounds, np.random.default_rng(0), seeds=("0", "0"))
    assert files_in(cache) == files_in(reference)
    assert all((cache / name).read_bytes() == (reference / name).read_bytes() for name in files_in(cache))


@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.faults)])
def test_two_writers_of_different_content_under_sigkill(tmp_path, rounds):
    """Different bases: every shard is wholly of one writer, every sequence is there once."""
    kill_two_writers(tmp_path / "c", rounds, np.random.default_rng(1), seeds=("0", "7"))
    with open_writer(tmp_path / "c", num_sequences=60, per_shard=2) as writer:
        assert writer.missing_shards() == []
    report = verify_cache(tmp_path / "c")
    assert report.ok
    assert report.sequences == 60
    assert not any(f.path.startswith("shards/") for f in report.findings)


def test_a_file_size_limit_is_a_clear_error_and_leaves_no_trace(tmp_path):
    code = WORKER.replace("import sys, pathlib", "import sys, pathlib, resource, signal").replace(
        'print("open"', "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); print('open'"
    )
    code = code.replace(
        "from caches import *", "from caches import *; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    )
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", code, str(tmp_path / "c"), here, "1", "0"]
    done = subprocess.run(command, cwd=Path.cwd(), capture_output=True, text=True, check=False)
    assert "must be written in full, found [Errno 27] File too large; free space" in done.stderr
    assert files_in(tmp_path / "c") == ["dataset.json", *(f"tokenizer/{n}" for n in sorted(TOKENIZER))]


def test_a_file_system_without_links_is_named(tmp_path, monkeypatch):
    def no_link(source, target):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(CacheError, match=r"dataset.json: the file system must support hard links"):
        open_writer(tmp_path / "c")
