"""Writing shards on threads, so that a cache costs its teacher little more than the forward pass.

Row groups are encoded by several threads and written by one; shards are flushed, read back and hashed by
several and committed by one. Rows are written and shards committed in order, so bytes and commits are those
of `CacheWriter.write_shard`. The threads use NumPy and Arrow only. Memory: `encoders` + 2 row groups of about
4,096 tokens, and one for each thread that reads back, whatever the size of a shard; at most eight written
shards wait on disk to be committed. CPU time by thread: `python benchmarks/host_side.py`.
"""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pmetal_distill.offline.commit import failing_writes
from pmetal_distill.offline.shard import EncodedGroup, Numbered, RowGroups, ShardDraft
from pmetal_distill.offline.writer import CacheWriter, CapturedSequence, Sidecars

MOST_ENCODERS = 8
MOST_CHECKERS = 4
UNSEALED_SHARDS = 8


@dataclass(frozen=True, slots=True, eq=False)
class _Shard:
    """A shard on its way."""

    index: int
    draft: ShardDraft
    groups: RowGroups
    sidecars: Sidecars
    measured: Mapping[str, float]


class BackgroundWriter:
    """Takes the sequences of shard after shard, and commits the shards. Use as a context manager.

    Leaving the context waits until all is committed. Leaving it by an error drops the shard at hand, whose
    sequences are not all there; the shards before it are committed. An interrupt drops what waits to be
    written too: whoever asks for an end does not wait for it. What was committed stays. An error on a
    thread stops all behind it and is raised by the next call, or on leaving; the shards before it are
    committed.

    Args:
        writer: of the cache; not to be used by anyone else meanwhile.
        encoders: threads that encode; half of the cores, at most 8, if None.
        checkers: threads that flush, read back and hash, which wait for the disk much of the time; a quarter
            of the cores, 2 to 4, if None.
    """

    def __init__(
        self, writer: CacheWriter, *, encoders: int | None = None, checkers: int | None = None
    ) -> None:
        cores = os.cpu_count() or 2
        encoders = encoders or max(1, min(MOST_ENCODERS, cores // 2))
        checkers = checkers or min(MOST_CHECKERS, max(2, cores // 4))
        self._writer = writer
        self._encoding = ThreadPoolExecutor(encoders, "encode")
        self._writing = ThreadPoolExecutor(1, "write")
        self._checking = ThreadPoolExecutor(checkers, "check")
        self._sealing = ThreadPoolExecutor(1, "seal")
        self._room = threading.BoundedSemaphore(encoders + 2)
        self._unsealed = threading.BoundedSemaphore(UNSEALED_SHARDS)
        self._shard: _Shard | None = None
        self._error: BaseException | None = None
        self._seal_failed = False
        self._open: list[ShardDraft] = []

    def begin(self, index: int, sidecars: Sidecars, *, measured: Mapping[str, float] | None = None) -> None:
        """Ends the shard at hand and begins another, which nobody has committed.

        Args:
            index: of the shard.
            sidecars: that it is coded with.
            measured: figures for its record.

        Raises:
            IncompatibleError: the shard at hand has too few sequences.
            Exception: whatever failed on a thread, once.
        """
        self._end()
        draft = self._writer.draft(index, sidecars)
        self._open.append(draft)
        self._shard = _Shard(index, draft, RowGroups(index, self._writer.dataset), sidecars, measured or {})

    def add(self, sequence: CapturedSequence) -> None:
        """Hands over the next sequence of the shard; waits while the threads have enough to do.

        Raises:
            IncompatibleError: a sequence that does not fit.
            Exception: whatever failed on a thread, once.
        """
        assert self._shard is not None
        if group := self._shard.groups.add(sequence):
            self._submit(self._shard, group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._end()
        except BaseException as failed:
            error = failed
            raise
        finally:
            self._stop(error)
        self._raise()

    def _end(self) -> None:
        self._raise()
        shard, self._shard = self._shard, None
        if shard is None:
            return
        if group := shard.groups.rest():
            self._submit(shard, group)
        self._writing.submit(self._finish, shard).add_done_callback(self._note)

    def _submit(self, shard: _Shard, group: list[Numbered]) -> None:
        self._raise()
        self._room.acquire()
        encoded = self._encoding.submit(shard.draft.encode, group)
        self._writing.submit(self._write, shard, encoded).add_done_callback(self._note)

    def _write(self, shard: _Shard, encoded: "Future[EncodedGroup]") -> None:
        try:
            group = encoded.result()
            if self._error is None:
                with failing_writes(f"shard {shard.index}"):
                    shard.draft.write(group)
        finally:
            self._room.release()

    def _finish(self, shard: _Shard) -> None:
        if self._error is None:
            self._unsealed.acquire()
            checked = self._checking.submit(self._check, shard)
            self._sealing.submit(self._seal, shard, checked).add_done_callback(self._note_sealed)

    def _check(self, shard: _Shard) -> None:
        """Nothing is done for a shard after one that failed."""
        if not self._seal_failed:
            with failing_writes(f"shard {shard.index}"):
                shard.draft.finish()

    def _seal(self, shard: _Shard, checked: "Future[None]") -> None:
        if not self._seal_failed:
            checked.result()
            self._writer.commit(shard.index, shard.draft, shard.sidecars, shard.measured)
            self._open.remove(shard.draft)

    def _note(self, done: "Future[None]") -> None:
        if error := done.exception():
            self._fail(error)

    def _note_sealed(self, done: "Future[None]") -> None:
        self._seal_failed = self._seal_failed or done.exception() is not None
        self._note(done)
        self._unsealed.release()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _stop(self, error: BaseException | None) -> None:
        interrupted = error is not None and not isinstance(error, Exception)
        if interrupted:
            self._fail(error)  # type: ignore[arg-type]
        self._encoding.shutdown(cancel_futures=interrupted)
        self._writing.shutdown()
        self._checking.shutdown()
        self._sealing.shutdown()
        for draft in self._open:
            draft.abandon()
