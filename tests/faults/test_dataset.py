"""A `dataset.json` that is damaged beyond one byte, lost, or of another cache: nothing else is blamed."""

import json
from pathlib import Path

import pytest

from pipeline.cli import main
from pmetal_distill.offline.mending import mended
from pmetal_distill.offline.repair import repair_cache
from pmetal_distill.offline.verify import verify_cache
from schemas.errors import CorruptionError
from schemas.manifest import checksum_of
from tests.faults.world import World, contents


def test_one_byte_is_found_wherever_it_is(world: World) -> None:
    data = world.files["dataset.json"]
    checksum = checksum_of(data)
    digits = data.find(checksum.encode())
    for at in (0, len(data) - 1, digits - 13, digits - 1, digits, digits + 63, len(data) // 2):
        wrong = bytearray(data)
        wrong[at] ^= 0x21
        assert mended(bytes(wrong), checksum) == data, at
    assert mended(data.replace(checksum.encode(), b"f" * 64), checksum) == data
    assert mended(data[:-2], checksum) is None
    assert mended(data.replace(b"sha256:aaaa", b"sha256:bbaa"), checksum) is None


SPARE = ".dataset.json"


def older(world: World, folder: Path) -> Path:
    """A copy of the cache as it was before there were spare copies."""
    world.copy(folder)
    (folder / SPARE).unlink()
    return folder


@pytest.mark.parametrize("how", ["one byte", "two bytes", "emptied", "cut", "deleted"])
@pytest.mark.parametrize("by", ["repair", "resume"])
def test_the_spare_copy_brings_it_back(world: World, tmp_path: Path, how: str, by: str) -> None:
    folder = world.copy(tmp_path / "c")
    path = folder / "dataset.json"
    data = path.read_bytes()
    path.unlink()
    if how != "deleted":
        wrong = {"one byte": b"sha256:abaa", "two bytes": b"sha256:bbaa"}
        changed = data.replace(b"sha256:aaaa", wrong[how]) if how in wrong else data[: 9 * (how == "cut")]
        path.write_bytes(changed)
    if by == "repair":
        assert repair_cache(folder).mended == ["dataset.json"]
    else:
        world.write(folder)
    world.check_whole(folder)


@pytest.mark.parametrize("damaged", [b"sha256:abaa", b"sha256:bbaa"])
def test_an_older_cache_is_mended_by_what_is_written_again(
    world: World, tmp_path: Path, damaged: bytes
) -> None:
    folder = older(world, tmp_path / "c")
    path = folder / "dataset.json"
    path.write_bytes(path.read_bytes().replace(b"sha256:aaaa", damaged))
    world.write(folder)
    world.check_whole(folder)


def test_a_spare_copy_of_another_cache_is_not_believed(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other", teacher="sha256:other")
    folder = world.copy(tmp_path / "c")
    (folder / SPARE).write_bytes(other.files["dataset.json"])
    assert [finding.path for finding in verify_cache(folder).findings] == [SPARE]
    path = folder / "dataset.json"
    path.write_bytes(path.read_bytes().replace(b"sha256:aaaa", b"sha256:abaa"))
    assert repair_cache(folder).mended == ["dataset.json", SPARE]
    world.check_whole(folder)


def test_the_commands_bring_it_back(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = older(world, tmp_path / "c")
    path = folder / "dataset.json"
    path.write_bytes(path.read_bytes().replace(b"sha256:aaaa", b"sha256:abaa"))
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(folder)])
    assert stopped.value.code == 1
    main(["repair", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["mended"] == ["dataset.json"]
    world.check_committed(folder)


def test_more_is_said_and_nothing_moves(world: World, tmp_path: Path) -> None:
    folder = older(world, tmp_path / "c")
    path = folder / "dataset.json"
    path.write_bytes(path.read_bytes().replace(b"sha256:aaaa", b"sha256:bbaa"))
    before = contents(folder)
    for dry_run in (True, False):
        with pytest.raises(CorruptionError, match="restore it from a copy, or move it away and run"):
            repair_cache(folder, dry_run=dry_run)
    assert contents(folder) == before
    path.unlink()
    world.write(folder)
    world.check_whole(folder)


def test_a_dry_run_changes_nothing(world: World, tmp_path: Path) -> None:
    folder = world.copy(tmp_path / "c")
    path = folder / "dataset.json"
    path.write_bytes(path.read_bytes().replace(b"sha256:aaaa", b"sha256:abaa"))
    before = contents(folder)
    assert repair_cache(folder, dry_run=True).moved == ["dataset.json"]
    assert contents(folder) == before
    assert repair_cache(folder).moved == ["dataset.json"]
    assert contents(folder) == world.files
    assert (folder / "quarantine/0000/dataset.json").read_bytes() == before["dataset.json"]


def test_one_that_no_record_needs_is_set_aside(world: World, tmp_path: Path) -> None:
    folder = world.copy(tmp_path / "c")
    for path in (folder / "commits").iterdir():
        path.unlink()
    (folder / "dataset.json").write_bytes(b"{")
    assert repair_cache(folder).moved == ["dataset.json"]
    world.write(folder)
    world.check_whole(folder)


def test_that_of_another_cache_is_what_is_wrong_and_not_all_shards(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other", teacher="sha256:other")
    folder = world.copy(tmp_path / "c")
    (folder / "dataset.json").write_bytes(other.files["dataset.json"])
    (finding,) = verify_cache(folder).findings
    checksum = json.loads(world.files["dataset.json"])["checksum"]
    assert str(finding).startswith(
        f"dataset.json: must be the dataset {checksum[:16]} that the commit records name"
    )
    before = contents(folder)
    report = repair_cache(folder)
    assert (report.shards, report.moved, report.left) == ([], [], [finding])
    assert contents(folder) == before


def test_a_sound_one_is_not_mended_for_the_sake_of_its_folders(world: World, tmp_path: Path) -> None:
    folder = world.copy(tmp_path / "c")
    (folder / "bases").rename(tmp_path / "bases")
    (folder / "bases").symlink_to(tmp_path / "bases")
    with pytest.raises(CorruptionError, match="bases: must be a folder inside the cache"):
        repair_cache(folder)
    assert (folder / "dataset.json").read_bytes() == world.files["dataset.json"]


def test_a_cache_without_its_folder_of_shards_is_repaired(world: World, tmp_path: Path) -> None:
    folder = world.copy(tmp_path / "c")
    for path in (folder / "shards").iterdir():
        path.unlink()
    (folder / "shards").rmdir()
    assert repair_cache(folder).shards == [0, 1]
    world.write(folder)
    world.check_whole(folder)
