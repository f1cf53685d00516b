"""An iterator of batches with a position that can be saved, fed by threads that make NumPy arrays only.

One thread makes batches ahead; behind it, one to four (by cores) load the row groups that will be needed.

Memory: the decoded row groups of one window (about 1.3 kB a token at k=16, r=256), one more for each loading
thread and one besides, what decoding takes in each (some 20 MB at 4,096 tokens a group), `prefetch` batches.
"""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, tee
from types import TracebackType
from typing import Any, NamedTuple, Self, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from pmetal_distill.offline.ahead import GroupsAhead, default_threads
from pmetal_distill.offline.batch import Batch, StoredSequence, collate, padded_length
from pmetal_distill.offline.order import Order, Position, make_order
from schemas.arrays import TargetArrays
from schemas.errors import IncompatibleError

_POLL_SECONDS = 0.1


class ReadOptions(TypedDict, total=False):
    """How to read; see `LogitCache.batches`, which has the defaults."""

    state: dict[str, Any] | None
    rank: int
    world_size: int
    epochs: int | None
    shuffle: bool
    window: int
    subset: npt.ArrayLike | None
    prefetch: int
    pad_multiple: int
    length: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """What can be read: sequences in row groups.

    Attributes:
        root: a hash that names the content.
        text: a hash that names the text, on which alone the order depends.
        members: sequence numbers of each row group, ascending.
        group_of: the row group that holds a sequence.
        longest: tokens in the longest of some sequences.
        load: all sequences of a row group, by number; is called from several threads at once.
        empty: targets of no tokens.
    """

    root: str
    text: str
    members: list[npt.NDArray[np.int64]]
    group_of: Callable[[int], int]
    longest: Callable[[npt.ArrayLike], int]
    load: Callable[[int], dict[int, StoredSequence]]
    empty: TargetArrays


class Place(NamedTuple):
    """A sequence, where it lies, and whether it is the last of its row group for now."""

    number: int
    group: int
    last: bool


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of each global batch this process takes: slice `rank` of `world_size`."""

    rank: int
    world_size: int

    def of(self, size: int) -> range:
        """A contiguous, nearly equal part of `size` sequences; all of them together are the whole."""
        return range(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)


@dataclass(frozen=True, slots=True, eq=False)
class Feed:
    """Everything the thread needs, and nothing that keeps the iterator alive.

    Attributes:
        order: which sequences in which order.
        share: this process's part of each global batch.
        epochs: passes over the data in total; None never ends.
        group_of: the row group that holds a sequence.
        load: all stored sequences of a row group, by number.
        collate: pad and stack; told the whole global batch, so that all ranks pad alike.
        threads: that load row groups ahead; 0 loads each when it is needed.
    """

    order: Order
    share: Share
    epochs: int | None
    group_of: Callable[[int], int]
    load: Callable[[int], dict[int, StoredSequence]]
    collate: Callable[[list[StoredSequence], list[int]], Batch]
    threads: int

    def run(self, start: Position) -> Iterator[tuple[Batch, Position]]:
        """Batches from a position on, each with the position after it."""
        batches, ahead = tee(self._global_batches(start))
        window = self.order.window
        with GroupsAhead(
            self.load,
            self._uses(places for places, _ in ahead),
            threads=self.threads,
            room=window + self.threads + 1,
            keep=len(self.order.groups) <= window,
        ) as groups:
            held: dict[int, dict[int, StoredSequence]] = {}
            for places, after in batches:
                groups.look_ahead()
                mine = self._sequences(places, groups, held)
                groups.look_ahead()
                yield self.collate(mine, [place.number for place in places]), after

    def _sequences(
        self,
        places: list[Place],
        groups: GroupsAhead[dict[int, StoredSequence]],
        held: dict[int, dict[int, StoredSequence]],
    ) -> list[StoredSequence]:
        """This process's part of a global batch; `held` are the row groups in use."""
        mine, found = self.share.of(len(places)), []
        for i, (number, group, last) in enumerate(places):
            if i in mine:
                if group not in held:
                    held[group] = groups.take(group)
                found.append(held[group][number])
            if last and held.pop(group, None) is not None:
                groups.release(group)
        return found

    def _uses(self, batches: Iterator[list[Place]]) -> Iterator[int]:
        """The row groups in the order in which `_sequences` takes them."""
        held: set[int] = set()
        for places in batches:
            mine = self.share.of(len(places))
            for i, place in enumerate(places):
                if i in mine and place.group not in held:
                    held.add(place.group)
                    yield place.group
                if place.last:
                    held.discard(place.group)

    def _global_batches(self, start: Position) -> Iterator[tuple[list[Place], Position]]:
        size = self.order.num_sequences
        stream = self._stream(start)
        position = start
        while places := list(islice(stream, start.batch_size)):
            reached = position.position + len(places)
            position = replace(position, epoch=position.epoch + reached // size, position=reached % size)
            yield places, position

    def _stream(self, start: Position) -> Iterator[Place]:
        epoch, skip = start.epoch, start.position
        while self.epochs is None or epoch < self.epochs:
            for window in self.order.windows(epoch, start=skip):
                numbers = window.tolist()
                groups = [self.group_of(number) for number in numbers]
                last = {group: i for i, group in enumerate(groups)}
                for i, (number, group) in enumerate(zip(numbers, groups, strict=True)):
                    yield Place(number, group, last[group] == i)
            epoch, skip = epoch + 1, 0


class BatchIterator(Iterator[Batch]):
    """Iterates over batches; `get_state()` is the position after the last batch handed out.

    Use as a context manager or call `close()`; an iterator that is dropped stops its thread, too.
    """

    def __init__(self, feed: Feed, start: Position, *, prefetch: int) -> None:
        self._feed = feed
        self._position = start
        self._prefetch = prefetch
        self._source: Iterator[tuple[Batch, Position]] | None = None
        self._worker: _Prefetcher | None = None
        self._stop: Callable[[], object] = lambda: None
        self._peeked: tuple[Batch, Position] | None = None

    @property
    def num_batches_per_epoch(self) -> float:
        """Batches in a pass over the data; fractional when the last one reaches into the next pass."""
        return self._feed.order.num_sequences / self._position.batch_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._source is None:
            self._source = self._start()
        try:
            batch, self._position = self._peeked or next(self._source)
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise
        self._peeked = None
        return batch

    def peek(self) -> Batch | None:
        """The next batch if it has been made already; it is not handed out by this, so the state stays."""
        if self._peeked is None and self._worker is not None:
            self._peeked = self._worker.made()
        return None if self._peeked is None else self._peeked[0]

    def get_state(self) -> dict[str, Any]:
        """The position as a small JSON object."""
        return self._position.to_json()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved position, of any rank and any world size.

        Raises:
            IncompatibleError: saved with another cache, seed, window or batch size.
        """
        position = Position.from_json(state)
        self._position.check_same_order(position)
        self.close()
        self._position = position

    def close(self) -> None:
        """Stop the thread; the next batch would start it again from the current position."""
        self._stop()
        self._source = self._worker = self._peeked = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> Iterator[tuple[Batch, Position]]:
        if self._prefetch == 0:
            return self._feed.run(self._position)
        self._worker = _Prefetcher(self._feed, self._position, size=self._prefetch)
        self._stop = weakref.finalize(self, self._worker.stop)
        return self._worker.items()


def read_batches(
    sequences: Sequences, *, batch_size: int, seed: int, **options: Unpack[ReadOptions]
) -> BatchIterator:
    """Batches of sequences in their order.

    Raises:
        IncompatibleError: options out of bounds, or a state of another order.
    """
    rank, world_size = options.get("rank", 0), options.get("world_size", 1)
    prefetch, window = options.get("prefetch", 2), options.get("window", 16)
    multiple, length = options.get("pad_multiple", 32), options.get("length")
    if not (0 <= rank < world_size and batch_size >= 1 and multiple >= 1 and prefetch >= 0):
        found = f"batch_size={batch_size}, rank={rank}, world_size={world_size}, prefetch={prefetch}"
        raise IncompatibleError(f"batches: sizes must be positive and rank below world_size, found {found}")
    order = make_order(
        sequences.members,
        root=sequences.root,
        text=sequences.text,
        seed=seed,
        window=window,
        shuffle=options.get("shuffle", True),
        subset=options.get("subset"),
    )
    longest, empty = sequences.longest, sequences.empty
    padded_length(longest(np.concatenate(sequences.members)), pad_multiple=multiple, length=length)

    def pad(mine: list[StoredSequence], numbers: list[int]) -> Batch:
        size = padded_length(longest(numbers), pad_multiple=multiple, length=length)
        return collate(mine, size, empty=empty)

    feed = Feed(
        order,
        Share(rank, world_size),
        options.get("epochs"),
        group_of=sequences.group_of,
        load=sequences.load,
        collate=pad,
        threads=default_threads() if prefetch else 0,
    )
    iterator = BatchIterator(feed, Position(0, 0, seed, window, batch_size, order.root), prefetch=prefetch)
    if (state := options.get("state")) is not None:
        iterator.set_state(state)
    return iterator


class _Prefetcher:
    """Runs a feed in a thread; what it raises is raised to the consumer, in its place in the stream."""

    def __init__(self, feed: Feed, start: Position, *, size: int) -> None:
        self._queue: queue.Queue[tuple[Batch, Position] | BaseException | None] = queue.Queue(size)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(feed, start), name="batches", daemon=True)
        self._thread.start()

    def made(self) -> tuple[Batch, Position] | None:
        """The next item if it is a batch that is there."""
        with self._queue.mutex:
            first = self._queue.queue[0] if self._queue.queue else None
        if not isinstance(first, tuple):
            return None
        self._queue.get()
        return first

    def items(self) -> Iterator[tuple[Batch, Position]]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                self.stop()
                raise item
            yield item

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, feed: Feed, start: Position) -> None:
        last: BaseException | None = None
        try:
            for item in feed.run(start):
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
            last = error
        self._put(last)

    def _put(self, item: tuple[Batch, Position] | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
