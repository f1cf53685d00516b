"""SIGKILL at every write and at random moments, several writers at once, slow disks, clocks that go back."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.repair import repair_cache
from pmetal_distill.offline.verify import verify_cache
from schemas.errors import CacheError
from tests.faults.disk import Disk
from tests.faults.processes import CacheCommand, can_mount, go, start_writer, wait, worker
from tests.faults.world import World, contents, decoded

LONG = [pytest.mark.faults, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("what", ["write", "repair"])
@pytest.mark.parametrize("extent", ["some", pytest.param("all", marks=LONG)])
def test_a_kill_at_any_write_loses_nothing(world: World, tmp_path: Path, what: str, extent: str) -> None:
    """The cache is readable right after the kill and complete after a resume, without any cleaning up."""
    with Disk(tmp_path / "count") as disk:
        if what == "write":
            world.write(tmp_path / "count")
    count = len(disk.log) if what == "write" else 30
    sites = range(count) if extent == "all" else sorted(random.Random(3).sample(range(count), 10))
    outcomes = worker("kill", world.pristine, tmp_path, what, *sites)
    assert [o["at"] for o in outcomes] == list(sites)
    killed = [o for o in outcomes if o["status"] == -9]
    assert len(killed) > len(outcomes) / 2
    if what == "write" and extent == "all":
        assert len(killed) == count
        assert {o["readable"] for o in killed} >= {0, 2}


def test_a_full_disk_and_a_read_only_one(world: World, tmp_path: Path) -> None:
    """Real file systems, too small at first; the same command completes the cache once there is room."""
    prefix = can_mount()
    if not prefix:
        pytest.skip("needs unshare and mount")
    world.check_whole(world.pristine)
    limits = [f"size={n}k" for n in (4, 12, 20, 28, 36, 44, 52, 400)]
    limits += [f"size=8m,nr_inodes={n}" for n in (3, 7, 12, 15, 18, 100)]
    outcomes = worker("small_disk", world.pristine, tmp_path, *limits, prefix=prefix)
    failed = [o["limit"] for o in outcomes if o["error"]]
    assert len(failed) > len(limits) / 2
    assert not {"size=400k", limits[-1]} & set(failed)
    for outcome in outcomes:
        assert not outcome["error"] or "No space left on device" in outcome["error"]
        assert not outcome["error"] or "; free space or fix the disk" in outcome["error"]
        assert all("Read-only file system" in message for message in outcome["read_only"])


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=LONG)])
def test_writers_that_start_at_once(world: World, tmp_path: Path, rounds: int, slow: bool) -> None:
    for turn in range(rounds):
        out = tmp_path / str(turn)
        processes = [
            start_writer(world.pristine, out, slow_seed=3 * turn + i if slow else None, direction=d)
            for i, d in enumerate(("forwards", "backwards", "forwards"))
        ]
        go(*processes)
        assert [wait(p) for p in processes] == [(0, "")] * 3
        world.check_whole(out)


def test_a_writer_keeps_repair_out_and_repair_a_writer(world: World, tmp_path: Path) -> None:
    folder = world.copy(tmp_path / "c")
    (folder / "commits/00001.json").unlink()
    process = start_writer(world.pristine, folder, slow_seed=0)
    go(process)
    while not any((folder / "_tmp").glob("*/*")):
        pass
    with pytest.raises(CacheError, match="nobody else must work on the cache, found another process"):
        repair_cache(folder)
    assert repair_cache(folder, dry_run=True).shards == []
    assert wait(process) == (0, "")
    world.check_whole(folder)
    (folder / "shards" / LogitCache(folder).records[0].targets.name).write_bytes(b"")
    seen = []

    def try_to_write(done: int, total: int) -> None:
        with pytest.raises(CacheError, match="found 'pmetal-pipeline repair' at work; wait for it"):
            world.write(folder)
        seen.append(done)

    assert repair_cache(folder, progress=try_to_write).shards == [0]
    assert seen == [1, 2]
    world.write(folder)
    world.check_whole(folder)


@pytest.mark.parametrize("moment", [0.0, 4e9], ids=["1970", "2096"])
def test_clocks_do_not_matter(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: float
) -> None:
    """Files of the past and the future, and a clock that goes back, change nothing."""
    folder = world.copy(tmp_path / "c")
    (folder / "commits/00000.json").unlink()
    for path in folder.rglob("*"):
        os.utime(path, (moment, moment))
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(times)))
    world.write(folder)
    world.check_whole(folder)


def test_a_file_changed_behind_the_readers_back_is_hashed_again(world: World, tmp_path: Path) -> None:
    """Same inode, size and modification time: the change time gives it away, with which nobody can tamper."""
    folder = world.copy(tmp_path / "c")
    cache = LogitCache(folder)
    cache.sequence(0)
    cache.close()
    path = folder / "shards" / cache.records[0].targets.name
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-30] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CacheError, match="must have SHA-256"):
        cache.sequence(0)


@pytest.fixture(scope="module")
def command(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheCommand:
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    sentence = "A teacher writes what it knows about every token, and a student reads it later. "
    path.write_text("".join(json.dumps({"text": sentence * (1 + n % 4)}) + "\n" for n in range(16)))
    return CacheCommand(tiny_teacher, path)


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("kills", [2, pytest.param(110, marks=LONG)])
def test_the_command_killed_at_random_moments(
    command: CacheCommand, tmp_path: Path, writers: int, kills: int
) -> None:
    """Every sequence exactly once, as an uninterrupted run has it; after a whole cache comes another."""
    command.finish(tmp_path / "whole")
    truth, files = dict(decoded(tmp_path / "whole")), contents(tmp_path / "whole")
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    moment, done, number = random.Random(seed), 0, 0
    while done < kills:
        out = tmp_path / str(number)
        done += command.kill(out, moment, writers=writers)
        complete = len(list((out / "commits").glob("*.json"))) == len(truth) if out.exists() else False
        if complete or done >= kills:
            command.finish(out)
            assert dict(decoded(out)) == truth
            assert contents(out) == files
            assert verify_cache(out).findings == []
            number += 1


def test_without_resume_a_folder_in_use_is_refused(command: CacheCommand, tmp_path: Path) -> None:
    process = command.start(tmp_path / "c")
    assert wait(process)[0] == 0
    words = [word for word in process.args if word != "--resume"]  # type: ignore[union-attr]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        "found it in use; choose another --out, or go on with an unfinished cache by --resume" in done.stderr
    )
