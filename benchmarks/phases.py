"""Where the time of stage one goes: seconds by phase, summed over calls, on the main thread and beside it.

Times are of wall clocks around functions, so phases of different threads overlap, and a thread that waits for
the interpreter counts the wait.
"""

import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

PHASES = {
    "main: queue forward passes": "pipeline.teacher:TeacherRunner._forward",
    "main: queue head and capture": "pmetal_distill.offline.capture:PendingCapture.__init__",
    "main: wait for the device": "pipeline.stage_one:CapturedBatch.wait",
    "threads: copy and check results": "pmetal_distill.offline.capture:PendingCapture.result",
    "threads: hand over, wait for encoders": "pmetal_distill.offline.background:BackgroundWriter.add",
    "main: judge stretches": "pmetal_distill.steps:Underway.step",
    "threads: encode": "pmetal_distill.offline.shard:ShardDraft.encode",
    "threads: write": "pmetal_distill.offline.shard:ShardDraft.write",
    "threads: flush and read back": "pmetal_distill.offline.shard:ShardDraft.finish",
    "threads: commit, finishing if not yet done": "pmetal_distill.offline.writer:CacheWriter.commit",
    "threads: hash the weights": "pmetal_distill.models:folder_fingerprint",
    "start: read text": "pipeline.cache:read_data",
    "calibration: all": "pipeline.calibration:Calibrator.learn",
    "calibration: sample": "pipeline.calibration:Calibrator._sampled",
    "calibration: moments": "pmetal_distill.offline.calibrate:sum_moments",
    "calibration: fit": "pmetal_distill.offline.calibrate:fit_basis_linear",
    "calibration: capture": "pmetal_distill.offline.sample:Sample.captured",
    "calibration: codebook": "schemas.codebook:Codebook.fit",
    "calibration: predictor": "pmetal_distill.offline.calibrate:with_predictor",
    "calibration: margin": "pmetal_distill.offline.calibrate:with_best_margin",
    "calibration and judge: write and read targets": "pmetal_distill.offline.calibrate:as_stored",
}


@contextmanager
def timed(clock: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, float]]:
    """Seconds by phase of what runs inside the block; complete when it ends.

    Args:
        clock: what tells the seconds; `time.thread_time` for the CPU time of each thread.
    """
    seconds: dict[str, float] = defaultdict(float)
    lock = threading.Lock()
    with ExitStack() as stack:
        for phase, target in PHASES.items():
            stack.enter_context(_wrapped(target, _clock(phase, seconds, lock, clock)))
        yield seconds


def _clock(
    phase: str, seconds: dict[str, float], lock: Any, clock: Callable[[], float]
) -> Callable[[Any], Any]:
    def add(started: float) -> None:
        with lock:
            seconds[phase] += clock() - started

    def around(function: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            started = clock()
            try:
                return function(*arguments, **named)
            finally:
                add(started)

        return run

    return around


@contextmanager
def _wrapped(target: str, around: Callable[[Any], Any]) -> Iterator[None]:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    before = vars(owner)[name]
    plain = before.__func__ if isinstance(before, staticmethod) else before
    changed = around(plain)
    setattr(owner, name, staticmethod(changed) if isinstance(before, staticmethod) else changed)
    try:
        yield
    finally:
        setattr(owner, name, before)
