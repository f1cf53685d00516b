"""How far a cache has come, from its commit records and the locks of its writers. Costs a listing."""

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pmetal_distill.offline.commit import TMP
from pmetal_distill.offline.store import Store

RECENT_SHARDS = 16


@dataclass(frozen=True, slots=True)
class CacheProgress:
    """A moment in the life of a cache.

    Attributes:
        shards, tokens: committed so far.
        num_shards, num_tokens: when it is complete.
        writers: processes that hold a lock in it now, on this machine.
        tokens_per_second: over the last `RECENT_SHARDS` commits; None where the records do not tell.
        seconds_left: at that rate; None without one, 0 when complete.
        idle_seconds: since the last commit; None before the first, or where clocks disagree.
    """

    shards: int
    num_shards: int
    tokens: int
    num_tokens: int
    writers: int
    tokens_per_second: float | None
    seconds_left: float | None
    idle_seconds: float | None

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return self.shards == self.num_shards


def cache_progress(folder: Path, *, now: float | None = None) -> CacheProgress:
    """Reads the progress of a cache folder.

    Args:
        folder: of the cache.
        now: seconds since 1970, for `idle_seconds`; the clock's if None.

    Raises:
        UsageError: not a cache.
        CorruptionError: a damaged record.
    """
    store = Store.open(folder)
    commits = []
    for shard in store.committed():
        written = store.record_path(shard).stat().st_mtime
        commits.append((written, store.record(shard).num_tokens))
    commits.sort()
    tokens = sum(count for _, count in commits)
    rate = _rate(commits)
    left = store.dataset.num_tokens - tokens
    idle = (time.time() if now is None else now) - commits[-1][0] if commits else None
    return CacheProgress(
        shards=len(commits),
        num_shards=store.dataset.num_shards,
        tokens=tokens,
        num_tokens=store.dataset.num_tokens,
        writers=live_writers(folder),
        tokens_per_second=rate,
        seconds_left=0.0 if left == 0 else left / rate if rate else None,
        idle_seconds=None if idle is None or idle < 0 else idle,
    )


def live_writers(folder: Path) -> int:
    """Writers whose locks are held, on this machine."""
    return sum(_is_held(path) for path in (folder / TMP).glob("*.lock"))


def _rate(commits: list[tuple[float, int]]) -> float | None:
    """Tokens a second over the recent commits; the first of them only starts the clock."""
    recent = commits[-RECENT_SHARDS:]
    if len(recent) < 2:
        return None
    seconds = recent[-1][0] - recent[0][0]
    return sum(count for _, count in recent[1:]) / seconds if seconds > 0 else None


def _is_held(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
