"""Several writers of one cache: races, dead ones and what they leave."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from caches import (
    TOKENIZER,
    files_in,
    make_dataset,
    make_sequence,
    open_writer,
    sidecars,
    write_cache,
    write_shard,
)

from pmetal_distill.offline.commit import Scratch
from pmetal_distill.offline.verify import verify_cache


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
    assert files_in(tmp_path / "c") == [
        ".dataset.json",
        "dataset.json",
        *(f"tokenizer/{n}" for n in sorted(TOKENIZER)),
    ]
