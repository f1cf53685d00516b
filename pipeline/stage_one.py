"""The loop of stage one: teacher states in, committed shards out.

On a GPU this thread does nothing but queue work, two batches ahead; one thread takes the results apart and
others encode and write them (`offline.background`): the teacher hardly ever waits. On the CPU a batch is done
with before the next one begins. Memory beyond the teacher's body: the results of six batches, the row groups
of the writer's threads, and on a GPU the logits of the chunks that are queued; whatever the size of a shard.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.calibration import Calibrator, Coding
from pipeline.console import Console, Progress
from pipeline.data import PackedDataset
from pipeline.settings import CacheSettings
from pipeline.stretches import Stretches
from pipeline.teacher import TeacherRunner, TeacherStates
from pmetal_distill.device import on_gpu
from schemas.errors import NonFiniteError
from schemas.hidden_spec import HiddenSpec
from schemas.spec import TargetSpec

if TYPE_CHECKING:
    from pmetal_distill.host_results import HostCopy
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.background import BackgroundWriter
    from pmetal_distill.offline.calibrate import DriftMonitor
    from pmetal_distill.offline.capture import PendingCapture
    from pmetal_distill.offline.device_predictor import DevicePredictor
    from pmetal_distill.offline.writer import CacheWriter, CapturedSequence

QUEUED_BATCHES = 2
RECEIVED_BATCHES = 2
SWITCH_SECONDS = 0.0005
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class CapturedBatch:
    """A batch on its way through the teacher.

    Attributes:
        shard: that its sequences belong to.
        coding: of the shard.
        states: the body's.
        capture: targets of the trained positions, perhaps still being computed.
        layers: block -> float32 [B, L, d], perhaps still being computed.
    """

    shard: int
    coding: Coding
    states: TeacherStates
    capture: "PendingCapture"
    layers: "dict[int, HostCopy]"

    def wait(self) -> None:
        """Until the device is done; then any thread may call `sequences`."""
        self.capture.wait()
        for states in self.layers.values():
            states.wait()

    def sequences(self) -> "Iterator[CapturedSequence]":
        """The sequences with their targets, once.

        Raises:
            NonFiniteError: NaN or infinity in a row.
        """
        from pmetal_distill.offline.writer import CapturedSequence

        targets = self.capture.result()
        layers = {index: states.take() for index, states in self.layers.items()}
        batch, starts = self.states.batch, self.states.starts
        for row, length in enumerate(batch.lengths):
            documents = batch.documents[row, :length]
            yield CapturedSequence(
                batch.token_ids[row, :length],
                documents - documents.min(),
                batch.loss_mask[row, :length],
                targets[starts[row] : starts[row + 1]],
                {index: states[row, :length] for index, states in layers.items()},
                self.capture.predicted,
            )


@dataclass(slots=True, eq=False)
class StageOne:
    """One process's share of a cache.

    Args:
        settings: of the stage.
        teacher: the loaded teacher.
        data: packed text.
        spec: of the targets.
        hidden: of the hidden states that are kept too, or None.
        console: where progress goes.
        rank, world_size: of this process among those that fill the cache together.
    """

    settings: CacheSettings
    teacher: "LoadedModel"
    data: PackedDataset
    spec: TargetSpec
    hidden: HiddenSpec | None
    console: Console
    rank: int = 0
    world_size: int = 1
    tokens: int = 0
    calibration_seconds: float = 0.0
    pass_seconds: float = 0.0
    _runner: TeacherRunner = field(init=False)
    _calibrator: Calibrator = field(init=False)
    _learned: "Coding | DriftMonitor | None" = field(default=None, init=False)
    _failed: Sequence[int] = field(default=(), init=False)

    def __post_init__(self) -> None:
        layers = self.hidden.layers if self.hidden else ()
        self._runner = TeacherRunner(self.teacher, self.data, self.settings.batch_size, layers)
        self._calibrator = Calibrator(
            self.settings, self.teacher, self._runner, self.spec, self.console, self.hidden
        )

    def learn(self) -> "Coding | DriftMonitor":
        """Calibrates, once; needs no cache yet.

        Raises:
            NonFiniteError: NaN or infinity in the sample.
        """
        if self._learned is None:
            started = time.perf_counter()
            with self._naming_the_layer():
                self._learned = self._calibrator.learn()
            # Forward passes whose states are kept are the main pass's.
            self.pass_seconds += self._calibrator.forward_seconds
            self.calibration_seconds += time.perf_counter() - started - self._calibrator.forward_seconds
        return self._learned

    def write_missing(self, writer: "CacheWriter") -> None:
        """Writes every shard that nobody has committed.

        Raises:
            NonFiniteError: NaN or infinity in a row.
        """
        from pmetal_distill.offline.background import BackgroundWriter

        missing = own_first(writer.missing_shards(), self.rank, self.world_size)
        if not missing:
            return
        learned = self.learn()
        started = time.perf_counter()
        total = sum(self._num_tokens(shard) for shard in missing)
        with (
            self._naming_the_layer(),
            self.console.progress("caching", total=total, unit="tokens") as progress,
            BackgroundWriter(writer) as out,
            in_order(beside=on_gpu()) as do,
        ):
            batches = self._batches(writer, missing, learned, progress)
            shard = -1
            for batch in ahead(batches, QUEUED_BATCHES if on_gpu() else 0):
                batch.wait()
                do(partial(self._hand_over, batch, out, progress, new=batch.shard != shard))
                shard = batch.shard
        self.pass_seconds += time.perf_counter() - started

    def summary(self) -> dict[str, Any]:
        """What this process has written.

        `tokens_per_second` counts all tokens over the time from the first batch to the last commit: forward
        pass, capture, judging stretches, encoding and writing. Calibration, which happens once, stands apart.
        """
        return {
            "new_tokens": self.tokens,
            "seconds": self.pass_seconds + self.calibration_seconds,
            "calibration_seconds": self.calibration_seconds,
            "tokens_per_second": self.tokens / max(self.pass_seconds, 1e-9),
        }

    @contextmanager
    def _naming_the_layer(self) -> Iterator[None]:
        """Adds to an error where it comes from if that is float16; runs the teacher again for it.

        On this thread, which is the one that uses MLX.
        """
        try:
            yield
        except NonFiniteError as error:
            from pmetal_distill.modelling.overflow import overflow

            layer = self._runner.first_overflow(self._failed or self._calibrator.sequences_read)
            if layer is None:
                raise
            raise NonFiniteError(f"{error}; {overflow(layer)}") from error

    def _num_tokens(self, shard: int) -> int:
        return self.data.tokens_in(self._shard_range(shard))

    def _shard_range(self, shard: int) -> range:
        size = self.settings.sequences_per_shard
        return range(shard * size, min((shard + 1) * size, self.data.num_sequences))

    def _batches(
        self,
        writer: "CacheWriter",
        missing: Sequence[int],
        learned: "Coding | DriftMonitor",
        progress: Progress,
    ) -> Iterator[CapturedBatch]:
        """Batches of the missing shards, queued on the device one by one."""
        stretches = Stretches(self._calibrator, learned, missing)
        predictor, basis = None, None
        for shard in missing:
            if writer.is_committed(shard):  # by another process, since
                progress.advance(self._num_tokens(shard))
                continue
            coding = stretches.coding(shard)
            if coding.sidecars.basis is not basis:
                basis = coding.sidecars.basis
                predictor = coding.predictor() if on_gpu() else None
            for states in self._runner.run(self._shard_range(shard)):
                yield queue_batch(
                    shard,
                    coding,
                    states,
                    self.teacher,
                    self.spec,
                    chunk=self.settings.head_chunk,
                    predictor=predictor,
                )
                stretches.go_on(shard)

    def _hand_over(
        self, batch: CapturedBatch, out: "BackgroundWriter", progress: Progress, *, new: bool
    ) -> None:
        if new:
            out.begin(batch.shard, batch.coding.sidecars, measured=batch.coding.measured)
        try:
            for sequence in batch.sequences():
                out.add(sequence)
        except NonFiniteError:
            self._failed = batch.states.batch.sequences
            raise
        tokens = sum(batch.states.batch.lengths)
        self.tokens += tokens
        progress.advance(tokens)


def queue_batch(
    shard: int,
    coding: Coding,
    states: TeacherStates,
    teacher: "LoadedModel",
    spec: TargetSpec,
    *,
    chunk: int | None,
    predictor: "DevicePredictor | None" = None,
) -> CapturedBatch:
    """Asks for the targets of a batch; a GPU begins with them."""
    import mlx.core as mx

    from pmetal_distill.host_results import HostCopy
    from pmetal_distill.offline.capture import PendingCapture, rows_at_once

    batch = states.batch
    capture = PendingCapture(
        states.final,
        teacher.logits if teacher.splits else lambda logits: logits,
        spec,
        sketch=coding.map,
        chunk=rows_at_once(chunk, spec.vocab_size),
        place=states.place,
        predict=partial(predictor.residual, batch.token_ids[batch.loss_mask]) if predictor else None,
    )
    layers = {index: HostCopy(found.astype(mx.float32)) for index, found in states.layers.items()}
    return CapturedBatch(shard, coding, states, capture, layers)


def own_first(shards: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The order in which one of several processes goes through the missing shards.

    First its own block, upwards; then those of the next ones, downwards from their ends, where their owners
    come last. So all work is shared while all are alive, a process that is lost is made up for by the others,
    and nobody needs to talk: whoever reaches the end of its list knows that everything is committed.
    """
    bounds = [len(shards) * part // world_size for part in range(world_size + 1)]
    blocks = [list(shards[start:stop]) for start, stop in pairwise(bounds)]
    others = [blocks[(rank + step) % world_size][::-1] for step in range(1, world_size)]
    return [*blocks[rank], *chain.from_iterable(others)]


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items; `count` more have been asked for when one is given out."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


@contextmanager
def in_order(*, beside: bool) -> Iterator[Callable[[Callable[[], object]], object]]:
    """Does pieces of work in the order in which they are given: at once, or beside the caller on one thread.

    On a thread, up to `RECEIVED_BATCHES` pieces wait. What one raises, a later call or the end of the context
    raises, and those behind it are not done; nor are they if the context ends by an exception. Meanwhile
    threads hand the interpreter on ten times as often as usual, as the caller must not wait long for it.
    """
    if not beside:
        yield lambda work: work()
        return
    waiting: deque[Future[None]] = deque()
    stopped = Event()

    def run(work: Callable[[], object]) -> None:
        if not stopped.is_set():
            try:
                work()
            except BaseException:
                stopped.set()
                raise

    def give(work: Callable[[], object]) -> None:
        while waiting and (len(waiting) > RECEIVED_BATCHES or waiting[0].done()):
            waiting.popleft().result()
        waiting.append(pool.submit(run, work))

    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, SWITCH_SECONDS))
    with ThreadPoolExecutor(1, "receive") as pool:
        try:
            yield give
            while waiting:
                waiting.popleft().result()
        finally:
            stopped.set()
            sys.setswitchinterval(usual)
