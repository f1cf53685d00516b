"""ENOSPC and EIO wherever a cache or a repair writes: what is committed stays, a resume writes the rest."""

import random
from pathlib import Path

import pytest

from pmetal_distill.offline.repair import repair_cache
from tests.faults.disk import Disk
from tests.faults.worker import attempt
from tests.faults.world import World

SAMPLE = 12

# A ParquetWriter whose first bytes cannot be written leaves its file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def sites(world: World, tmp_path: Path) -> int:
    with Disk(tmp_path / "count") as disk:
        world.write(tmp_path / "count")
    world.check_whole(tmp_path / "count")
    return len(disk.log)


def chosen(count: int, request: pytest.FixtureRequest, seed: int) -> list[int]:
    """All sites in the long form, else a few by chance, the first and the last among them."""
    if request.param == "all":
        return list(range(count))
    return sorted({0, count - 1, *random.Random(seed).sample(range(count), SAMPLE)})


@pytest.fixture(params=["some", pytest.param("all", marks=[pytest.mark.faults, pytest.mark.timeout(1800)])])
def extent(request: pytest.FixtureRequest) -> pytest.FixtureRequest:
    return request


@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "threads"])
@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_a_write_that_fails_anywhere_loses_nothing(
    world: World, tmp_path: Path, extent: pytest.FixtureRequest, action: str, threads: bool
) -> None:
    count = sites(world, tmp_path)
    assert count > 50
    clean = 0
    for at in chosen(count, extent, seed=1):
        folder = tmp_path / f"{action}-{at}"
        with Disk(folder, action, at) as disk:  # type: ignore[arg-type]
            message = attempt(lambda folder=folder: world.write(folder, threads=threads))  # type: ignore[misc]
        assert len(disk.log) > at
        clean += message == ""
        if message:
            assert message.startswith((folder.name, "shard ", "bases/"))
            assert "must be written in full, found [Errno" in message
            assert "free space or fix the disk, then run the same command with --resume" in message
        world.check_committed(folder)
        world.write(folder)
        world.check_whole(folder)
    assert clean <= 6  # only where a scratch folder is cleaned up


@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_a_repair_that_fails_anywhere_loses_nothing(world: World, tmp_path: Path, action: str) -> None:
    def damaged(name: str) -> Path:
        folder = world.copy(tmp_path / name)
        shard = next((folder / "shards").glob("targets-00001-*"))
        shard.write_bytes(shard.read_bytes()[:-1])
        (folder / "tokenizer/tokenizer.json").write_bytes(b"[]")
        data = bytearray((folder / "dataset.json").read_bytes())
        data[40] ^= 4
        (folder / "dataset.json").write_bytes(data)
        return folder

    folder = damaged("count")
    with Disk(folder) as disk:
        repair_cache(folder)
    count = len(disk.log)
    assert count > 8
    for at in range(count):
        folder = damaged(f"{action}-{at}")
        with Disk(folder, action, at) as disk:  # type: ignore[arg-type]
            message = attempt(lambda folder=folder: repair_cache(folder))  # type: ignore[misc]
        assert message == "" or "must be written in full" in message
        world.mend(folder)
        world.check_whole(folder)
