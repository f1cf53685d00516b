"""One small data set, its cache as an uninterrupted run writes it, and how to compare and complete others."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "pmetal_distill" / "offline"))

from caches import TOKENIZER, hidden_spec, make_dataset, make_sequence, sidecars, write_cache

from pmetal_distill.offline.background import BackgroundWriter
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.repair import repair_cache
from pmetal_distill.offline.verify import verify_cache
from pmetal_distill.offline.writer import CacheWriter, Sidecars
from schemas.errors import CacheError
from schemas.manifest import Dataset


class World:
    """A data set of 4 sequences in 2 shards with one hidden layer; all of it a pure function of nothing.

    Attributes:
        dataset: its description.
        pristine: a complete cache, not to be changed.
    """

    def __init__(self, pristine: Path, *, num_sequences: int = 4, seed: int = 0, **changes: str) -> None:
        self.seed = seed
        self.dataset: Dataset = make_dataset(
            num_sequences=num_sequences,
            per_shard=2,
            rows_per_group=30,
            hidden=hidden_spec(layers=(1,), rank=4),
            **changes,
        )
        self.pristine = pristine
        if not pristine.exists():
            self.write(pristine)

    def write(self, folder: Path, *, backwards: bool = False, threads: bool = False) -> None:
        """What `cache --resume` does: every shard that is missing; with `threads`, as the command does it."""
        with CacheWriter.create_or_resume(folder, self.dataset, TOKENIZER) as writer:
            extra = sidecars(self.dataset, seed=self.seed)
            missing = writer.missing_shards()
            if threads:
                self._write_on_threads(writer, missing, Sidecars(**extra))
                return
            for index in reversed(missing) if backwards else missing:
                numbers = self.dataset.shard_range(index)
                writer.write_shard(index, (make_sequence(self.dataset, n) for n in numbers), **extra)

    def _write_on_threads(self, writer: CacheWriter, missing: list[int], extra: Sidecars) -> None:
        with BackgroundWriter(writer, encoders=2) as background:
            for index in missing:
                background.begin(index, extra)
                for number in self.dataset.shard_range(index):
                    background.add(make_sequence(self.dataset, number))

    def copy(self, folder: Path) -> Path:
        """A copy of the pristine cache."""
        return Path(shutil.copytree(self.pristine, folder))

    @cached_property
    def truth(self) -> dict[int, bytes]:
        """What a reader of the pristine cache returns, by sequence."""
        return dict(decoded(self.pristine))

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Every file of the pristine cache."""
        return contents(self.pristine)

    def check_committed(self, folder: Path) -> int:
        """Everything that can be read is right; how many sequences there are."""
        if not (folder / "dataset.json").exists():
            return 0
        found = dict(decoded(folder, allow_partial=True))
        assert found.items() <= self.truth.items()
        return len(found)

    def check_whole(self, folder: Path) -> None:
        """Every sequence once and right, nothing but the files of an uninterrupted run."""
        assert dict(decoded(folder)) == self.truth
        assert contents(folder) == self.files
        assert verify_cache(folder).findings == []

    def mend(self, folder: Path) -> None:
        """`repair`, then `cache --resume`."""
        repair_cache(folder)
        self.write(folder)


def decoded(folder: Path, *, allow_partial: bool = False) -> Iterator[tuple[int, bytes]]:
    """Number and all arrays of each sequence; the tokenizer and the bases are read along."""
    first = LogitCache(folder, allow_partial=True)
    layers = first.dataset.hidden.layers if first.dataset.hidden else ()
    cache = LogitCache(folder, allow_partial=allow_partial, hidden_layers=layers)
    assert cache.numbers.tolist() == sorted(set(cache.numbers.tolist()))
    if not allow_partial:
        cache.tokenizer_path.stat()
    for number in cache.numbers.tolist():
        s = cache.sequence(number)
        arrays = (s.token_ids, s.documents, s.loss_mask, *s.targets.parts(), *s.hidden.values())
        basis = cache.bases[s.basis_index].to_bytes() if s.basis_index >= 0 else b""
        yield number, b"".join(np.ascontiguousarray(a).tobytes() for a in arrays) + basis
    cache.close()
    first.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Files by relative path, without those in quarantine; links and pipes are not read."""
    found = {}
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "quarantine"]
        for name in names:
            file = Path(path) / name
            key = str(file.relative_to(folder))
            found[key] = file.read_bytes() if file.is_file() and not file.is_symlink() else b"not a file"
    return found


def unlike(world: World, folder: Path, changes: dict[str, str]) -> World:
    """A cache of another data set, whose fingerprint says so."""
    return World(folder, num_sequences=world.dataset.num_sequences, seed=7, **changes)


def noticed(world: World, folder: Path) -> str:
    """The error of a reader of the whole cache; "" if it returned everything right.

    Raises:
        AssertionError: something wrong was returned without an error.
    """
    try:
        found = dict(decoded(folder))
    except CacheError as error:
        return str(error) or "error"
    assert found == world.truth
    return ""


__all__ = ["World", "contents", "decoded", "noticed", "replace", "unlike", "write_cache"]
