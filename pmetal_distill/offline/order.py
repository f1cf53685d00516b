"""The order in which sequences are read: a pure function of (seed, epoch, text). State: a position.

Row groups are permuted, then the sequences inside each window of row groups. Keys come from splitmix64, so
that the order never depends on the version of a random generator. Caches of one text are read in one order,
whatever they keep of the teacher, and so is the text itself beside a live teacher. Cost: one sort of the row
groups an epoch, one of a window's sequences a window; 8 bytes a sequence.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import CacheError, IncompatibleError
from schemas.manifest import MAX_SEQUENCES
from schemas.strict import Fields

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Position:
    """How far reading has come, in a few integers and a hash.

    Attributes:
        epoch: passes over the data that are complete.
        position: sequences of this epoch already handed out, over all ranks.
        seed, window, batch_size: what the order and the batches were made with.
        root: names the content: dataset, commit records, subset, shuffling.
    """

    epoch: int
    position: int
    seed: int
    window: int
    batch_size: int
    root: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def from_json(raw: object) -> "Position":
        """The position in a JSON object.

        Raises:
            IncompatibleError: a missing or unknown key, or a value out of bounds.
        """
        fields = Fields(raw, where="reader state", error=IncompatibleError)
        result = Position(
            epoch=fields.integer("epoch", 0, 1 << 40),
            position=fields.integer("position", 0, MAX_SEQUENCES),
            seed=fields.integer("seed", 0, (1 << 63) - 1),
            window=fields.integer("window", 1, 1 << 31),
            batch_size=fields.integer("batch_size", 1, 1 << 31),
            root=fields.text("root", pattern="[0-9a-f]{64}"),
        )
        fields.finish()
        return result

    def check_same_order(self, other: "Position") -> None:
        """Refuse a position of another order.

        Raises:
            IncompatibleError: names the first part that differs.
        """
        for name in ("root", "seed", "window", "batch_size"):
            mine, found = getattr(self, name), getattr(other, name)
            if mine != found:
                advice = "resume with the cache and options the state was saved with"
                raise IncompatibleError(f"reader state: {name} must be {mine}, found {found}; {advice}")


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """All the sequences to read, by row group.

    Attributes:
        groups: sequence numbers of each row group that has any to read.
        root: names the content.
        text: names the text, which decides the shuffling together with the seed.
        seed: of the shuffling.
        window: row groups that are shuffled together.
        shuffle: false reads in the order of the data.
    """

    groups: tuple[Int64, ...]
    root: str
    text: str
    seed: int
    window: int
    shuffle: bool = True

    @property
    def num_sequences(self) -> int:
        """Sequences an epoch."""
        return sum(map(len, self.groups))

    def windows(self, epoch: int, *, start: int = 0) -> Iterator[Int64]:
        """Sequence numbers of one epoch by window, from the `start`-th on; windows before it cost nothing."""
        permuted = self._permute(np.arange(len(self.groups)), f"{epoch}")
        seen = 0
        for first in range(0, len(permuted), self.window):
            members = [self.groups[g] for g in permuted[first : first + self.window]]
            size = sum(map(len, members))
            if seen + size > start:
                window = self._permute(np.concatenate(members), f"{epoch}:{first}")
                yield window[max(0, start - seen) :]
            seen += size

    def _permute(self, items: Int64, stream: str) -> Int64:
        if not self.shuffle:
            return items
        key = hashlib.sha256(f"{self.text}:{self.seed}:{stream}".encode()).digest()[:8]
        keys = splitmix64(int.from_bytes(key, "little"), len(items))
        return items[np.argsort(keys, kind="stable")]


def splitmix64(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """The first `count` outputs of splitmix64.

    References:
        Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", section 5.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def make_order(
    groups: list[Int64],
    *,
    root: str,
    text: str,
    seed: int,
    window: int,
    shuffle: bool,
    subset: npt.ArrayLike | None,
) -> Order:
    """The order over the sequences in `groups`, or those of them in `subset`.

    Raises:
        IncompatibleError: a subset with sequences that are not there, or nothing to read.
        CacheError: seed or window out of bounds.
    """
    if not (0 <= seed < 1 << 63 and window >= 1):
        raise CacheError(f"batches: seed must be >= 0 and window >= 1, found {seed} and {window}")
    digest = hashlib.sha256(f"{root}:{shuffle}".encode())
    if subset is not None:
        wanted = np.unique(np.asarray(subset, np.int64))
        have = np.concatenate(groups) if groups else np.zeros(0, np.int64)
        if missing := np.setdiff1d(wanted, have).tolist():
            raise IncompatibleError(f"batches: subset must name sequences of the cache, found {missing[:5]}")
        digest.update(wanted.astype("<i8").tobytes())
        chosen = np.zeros(int(have.max(initial=0)) + 1, np.bool_)
        chosen[wanted] = True
        groups = [g[chosen[g]] for g in groups]
    kept = tuple(g for g in groups if len(g))
    if not kept:
        raise IncompatibleError("batches: there must be sequences to read, found none")
    return Order(kept, digest.hexdigest(), text, seed, window, shuffle)
