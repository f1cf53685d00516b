"""One wrong byte anywhere: no reader returns something wrong, `verify` names the file, `repair` mends it."""

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.verify import verify_cache
from schemas.errors import CacheError
from tests.faults.damage import flips
from tests.faults.world import World, contents, noticed

LONG = [pytest.mark.faults, pytest.mark.timeout(3600)]
KINDS = 17


def verdict(folder: Path) -> str:
    """What `verify` says."""
    try:
        return "\n".join(map(str, verify_cache(folder).findings))
    except CacheError as error:
        return str(error)


@pytest.mark.parametrize(("count", "mended"), [(150, 10), pytest.param(2600, 1, marks=LONG)])
def test_one_wrong_byte(world: World, tmp_path: Path, count: int, mended: int) -> None:
    """Every `mended`-th damage is repaired, too."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    folder = world.copy(tmp_path / "c")
    seen: Counter[str] = Counter()
    for number, flip in enumerate(islice(flips(world.pristine, sorted(world.files), seed), count)):
        flip.apply(folder)
        message = noticed(world, folder)
        if flip.name == ".dataset.json":  # a copy that readers need not look at
            message = verdict(folder)
        assert message, f"{flip} was not noticed"
        assert flip.name in message or "dataset.json" in message, (flip, message)
        assert flip.name in verdict(folder), flip
        seen[flip.kind] += 1
        if number % mended:
            flip.apply(folder)
        else:
            world.mend(folder)
            assert contents(folder) == world.files, flip
    print(*sorted(seen.items()), sep="\n")
    assert len(seen) == KINDS
    world.check_whole(folder)


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=LONG)])
def test_one_wrong_byte_of_a_shard_when_hashes_are_not_checked(
    world: World, tmp_path: Path, count: int
) -> None:
    """Page checksums and the bounds on headers find what is wrong in pages and their headers all the same."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    folder = world.copy(tmp_path / "c")
    shards = [name for name in sorted(world.files) if name.startswith("shards/targets")]
    seen: Counter[str] = Counter()
    for flip in islice(flips(world.pristine, shards, seed), count):
        flip.apply(folder)
        cache = LogitCache(folder, verify_hashes="never")
        try:
            found = {n: _arrays(cache, n) for n in range(cache.num_sequences)}
        except CacheError:
            seen[f"{flip.region} refused"] += 1
        else:
            same = all(data in world.truth[number] for number, data in found.items())
            seen[f"{flip.region} {'harmless' if same else 'wrong'}"] += 1
            assert same or flip.region == "footer", flip
        cache.close()
        flip.apply(folder)
    print(*sorted(seen.items()), sep="\n")


def _arrays(cache: LogitCache, number: int) -> bytes:
    """The start of what `decoded` gives of a sequence."""
    s = cache.sequence(number)
    arrays = (s.token_ids, s.documents, s.loss_mask, *s.targets.parts())
    return b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)


@pytest.mark.parametrize(
    "how", ["cut", "emptied", "longer", "deleted", "folder", "pipe", "link", "swapped", "foreign"]
)
def test_a_file_that_is_not_the_one_that_was_written(world: World, tmp_path: Path, how: str) -> None:
    """Every file in turn; `swapped` with its neighbour, `foreign` from a cache of other data."""
    other = World(tmp_path / "other", seed=7, teacher="sha256:other")
    copies = {"dataset.json", ".dataset.json"}
    names = [name for name in sorted(world.files) if how != "deleted" or name not in copies]
    for number, name in enumerate(names):
        folder = world.copy(tmp_path / f"c{number}")
        path = folder / name
        data = path.read_bytes()
        replacement = {
            "cut": data[: len(data) // 2],
            "emptied": b"",
            "longer": data + data,
            "swapped": world.files[names[number - 1]],
            "foreign": other.files[sorted(other.files)[number]],
        }
        path.unlink()
        if how in replacement:
            path.write_bytes(replacement[how])
        elif how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "link":
            path.symlink_to(world.pristine / name)
        message = noticed(world, folder)
        if path.is_file() and not path.is_symlink() and path.read_bytes() == data:
            continue  # the tokenizer of the other cache is the same
        if name == ".dataset.json":
            message = verdict(folder)
        assert message, name
        if name == "dataset.json":
            continue
        assert name.split("-")[0] in verdict(folder), (name, verdict(folder))
        world.mend(folder)
        assert contents(folder) == world.files
