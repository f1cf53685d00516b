"""Shards written on threads: the same bytes, in order, bounded; errors surface, what is committed stays."""

import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from caches import TOKENIZER, hidden_spec, make_dataset, make_sequence, sidecars, write_cache

from pmetal_distill.offline.background import BackgroundWriter
from pmetal_distill.offline.shard import ShardDraft
from pmetal_distill.offline.writer import CacheWriter, Sidecars
from schemas.errors import CacheError, CorruptionError, IncompatibleError, NonFiniteError


def open_writer(folder, dataset=None):
    return CacheWriter.create_or_resume(folder, dataset or make_dataset(), TOKENIZER)


def content(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def write_all(writer, *, shards=None, change=lambda sequence, number: sequence, encoders=2, checkers=2):
    dataset = writer.dataset
    extra = Sidecars(**sidecars(dataset))
    with BackgroundWriter(writer, encoders=encoders, checkers=checkers) as out:
        for shard in writer.missing_shards() if shards is None else shards:
            out.begin(shard, extra)
            for number in dataset.shard_range(shard):
                out.add(change(make_sequence(dataset, number), number))


@pytest.mark.parametrize("encoders", [1, 3])
def test_bytes_are_those_of_a_writer_without_threads(tmp_path, monkeypatch, encoders):
    dataset = make_dataset(hidden=hidden_spec(rank=4))
    reference = write_cache(tmp_path / "r", dataset)
    encode = ShardDraft.encode

    def uneven(self, group):  # the first sequence of every second group takes longest
        time.sleep(0.01 * (group[0][0] % 2))
        return encode(self, group)

    monkeypatch.setattr(ShardDraft, "encode", uneven)
    with open_writer(tmp_path / "c", dataset) as writer:
        write_all(writer, encoders=encoders)
    assert content(tmp_path / "c") == content(reference)


def checking(monkeypatch, work):
    """Calls `work` with the number of each shard before it is flushed and read back."""
    numbers, draft, finish = {}, CacheWriter.draft, ShardDraft.finish

    def numbered(self, index, extra):
        made = draft(self, index, extra)
        numbers[made] = index
        return made

    def worked(self):
        work(numbers[self])
        return finish(self)

    monkeypatch.setattr(CacheWriter, "draft", numbered)
    monkeypatch.setattr(ShardDraft, "finish", worked)


def test_commits_come_in_order_though_shards_are_checked_side_by_side(tmp_path, monkeypatch):
    last, seen = threading.Event(), []

    def work(index):  # the first of three waits for the last of them
        if index == 5:
            last.set()
        elif index == 3:
            assert last.wait(20)

    checking(monkeypatch, work)
    commit = CacheWriter.commit
    monkeypatch.setattr(
        CacheWriter, "commit", lambda self, index, *rest: (seen.append(index), commit(self, index, *rest))[1]
    )
    with open_writer(tmp_path / "c", make_dataset(num_sequences=60, per_shard=2)) as writer:
        write_all(writer, checkers=3)
    assert seen == list(range(30))


def test_a_shard_that_does_not_read_back_stops_those_after_it(tmp_path, monkeypatch):
    later = threading.Event()

    def work(index):
        if index > 2:
            later.set()
        elif index == 2:
            later.wait(20)  # others were sound before
            raise CorruptionError("shard 2 must read back as written")

    checking(monkeypatch, work)
    with open_writer(tmp_path / "c") as writer:
        with pytest.raises(CorruptionError, match="shard 2 must read back"):
            write_all(writer, checkers=3)
        assert writer.missing_shards() == [2, 3, 4]


def damaged(sequence, number):
    if number != 12 or sequence is None:
        return sequence
    targets = sequence.targets
    coordinates = targets.coordinates.copy()
    coordinates[:] = np.nan
    return dataclasses.replace(sequence, targets=dataclasses.replace(targets, coordinates=coordinates))


def test_a_failing_encode_surfaces_and_the_shards_before_it_stay(tmp_path):
    with open_writer(tmp_path / "c") as writer:
        with pytest.raises(NonFiniteError, match=r"\(sequence 12, token \d+\): coordinates must be finite"):
            write_all(writer, change=damaged)
        assert writer.missing_shards() == [2, 3, 4]
        write_all(writer)
    assert content(tmp_path / "c") == content(write_cache(tmp_path / "r"))


@pytest.mark.parametrize("step", ["shard.flush_file", "writer.move", "writer.put_if_absent"])
def test_a_failing_disk_surfaces_and_the_shards_before_it_stay(tmp_path, monkeypatch, step):
    name = f"pmetal_distill.offline.{step}"
    module, attribute = name.rsplit(".", 1)
    works = getattr(sys.modules[module], attribute)
    committed, flushed = [], []

    def full(*arguments):
        flushed.append(step == "shard.flush_file")
        if len(committed) == 2 or sum(flushed) > 2:
            raise OSError(28, "No space left on device")
        return works(*arguments)

    publish = CacheWriter._publish

    def counted(self, record):
        standing = publish(self, record)
        committed.append(standing.shard)
        return standing

    monkeypatch.setattr(CacheWriter, "_publish", counted)
    with open_writer(tmp_path / "c") as writer:
        monkeypatch.setattr(name, full)
        with pytest.raises(CacheError, match=r"shard 2: must be written in full, found .*No space left"):
            write_all(writer, checkers=1)
        assert writer.missing_shards() == [2, 3, 4]
        monkeypatch.undo()
        write_all(writer)
    assert content(tmp_path / "c") == content(write_cache(tmp_path / "r"))


def test_the_caller_waits_while_the_threads_have_enough_to_do(tmp_path, monkeypatch):
    """Nothing is written until the caller stands still: by then it has handed over a few row groups only."""
    go = threading.Event()
    write = ShardDraft.write
    monkeypatch.setattr(ShardDraft, "write", lambda self, group: (go.wait(30), write(self, group))[1])
    dataset = make_dataset(num_sequences=60, per_shard=30, rows_per_group=20)
    tokens = []

    def counted(sequence, number):
        tokens.append(len(sequence.token_ids))
        return sequence

    with open_writer(tmp_path / "c", dataset) as writer:
        feeder = threading.Thread(target=write_all, args=(writer,), kwargs={"change": counted, "encoders": 2})
        feeder.start()
        before = -1
        while len(tokens) > before:
            before = len(tokens)
            time.sleep(0.2)
        handed_over = sum(tokens)
        go.set()
        feeder.join()
        assert writer.missing_shards() == []
    groups = 2 + 2 + 1  # on the threads and waiting, and the one that found no room
    assert 20 * (groups - 1) < handed_over <= (20 + 24) * groups
    assert handed_over < dataset.num_tokens / 3


def test_an_interrupt_keeps_what_is_committed_and_can_be_resumed(tmp_path):
    def interrupted(sequence, number):
        if number == 13:
            raise KeyboardInterrupt
        return sequence

    with open_writer(tmp_path / "c") as writer:
        with pytest.raises(KeyboardInterrupt):
            write_all(writer, change=interrupted)
        left = writer.missing_shards()
        assert left == list(range(left[0], 5))
        assert left[0] <= 2
    assert not list((tmp_path / "c/_tmp").iterdir())
    with open_writer(tmp_path / "c") as writer:
        write_all(writer)
    assert content(tmp_path / "c") == content(write_cache(tmp_path / "r"))


def write_one(writer, sequences):
    with BackgroundWriter(writer) as out:
        out.begin(0, Sidecars(**sidecars(writer.dataset)))
        for sequence in sequences:
            out.add(sequence)


def test_too_few_and_too_many_sequences(tmp_path):
    with open_writer(tmp_path / "c") as writer:
        sequences = [make_sequence(writer.dataset, number) for number in writer.dataset.shard_range(0)]
        with pytest.raises(IncompatibleError, match="shard 0: must have 5 sequences, found 4"):
            write_one(writer, sequences[:4])
        with pytest.raises(IncompatibleError, match="shard 0: must have 5 sequences, found more"):
            write_one(writer, [*sequences, sequences[0]])
        assert writer.missing_shards() == [0, 1, 2, 3, 4]


WORKER = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
from test_background import *
with open_writer(pathlib.Path(sys.argv[1]), make_dataset(num_sequences=60, per_shard=2)) as writer:
    print("open", flush=True)
    write_all(writer)
"""


@pytest.mark.parametrize("rounds", [4, pytest.param(40, marks=pytest.mark.faults)])
def test_sigkill_at_any_moment(tmp_path, rounds):
    command = [sys.executable, "-c", WORKER, str(tmp_path / "c"), str(Path(__file__).parent)]
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        worker = subprocess.Popen(command, cwd=Path.cwd(), stdout=subprocess.PIPE)
        with worker:
            worker.stdout.readline()
            time.sleep(rng.uniform(0, 0.15))
            worker.kill()
    assert subprocess.run(command, cwd=Path.cwd(), capture_output=True, check=False).returncode == 0
    assert content(tmp_path / "c") == content(
        write_cache(tmp_path / "r", make_dataset(num_sequences=60, per_shard=2))
    )
