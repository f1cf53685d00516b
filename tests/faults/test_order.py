"""What a power cut may take: names appear only after their bytes are on the medium, records after files."""

from pathlib import Path

import pytest

from pmetal_distill.offline.repair import repair_cache
from pmetal_distill.offline.store import Store
from tests.faults.disk import Disk
from tests.faults.world import World

Log = list[tuple[str, ...]]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="flushes by other calls than fsync"
)


def last(log: Log, event: tuple[str, ...], before: int) -> int:
    """Where an event happened last before a place; -1 if never."""
    return max((i for i in range(before) if log[i] == event), default=-1)


def published(log: Log) -> list[tuple[int, str, str]]:
    """Place, source and target of every link and rename out of a scratch folder."""
    return [(i, e[1], e[2]) for i, e in enumerate(log) if e[0] in ("link", "replace") and "/_tmp/" in e[1]]


@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "threads"])
def test_nothing_is_named_before_it_is_on_the_medium(world: World, tmp_path: Path, threads: bool) -> None:
    root = tmp_path / "c"
    with Disk(root) as disk:
        world.write(root, threads=threads)
    log, places = disk.log, published(disk.log)
    assert len(places) > 10
    where = {target: at for at, _, target in places}
    for at, source, target in places:
        flushed = last(log, ("fsync", source), at)
        assert flushed > last(log, ("write", source), at) >= 0, target
        assert ("fsync", str(Path(target).parent)) in log[at:], target
    store = Store.open(root)
    for shard in store.committed():
        at = where[str(store.record_path(shard))]
        assert log[at][0] == "link"
        for name in store.record(shard).files():
            placed = where[str(root / name)]
            folder = str((root / name).parent)
            assert placed < last(log, ("fsync", folder), at), name


def test_a_repair_takes_the_record_before_its_files(world: World, tmp_path: Path) -> None:
    root = world.copy(tmp_path / "c")
    shard = next((root / "shards").glob("targets-00001-*"))
    shard.write_bytes(b"")
    with Disk(root) as disk:
        repair_cache(root)
    moves = [i for i, event in enumerate(disk.log) if event[0] == "rename"]
    assert [Path(disk.log[i][1]).parent.name for i in moves] == ["commits", "shards", "shards"]
    assert ("fsync", str(root / "commits")) in disk.log[moves[0] : moves[1]]
