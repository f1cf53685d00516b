"""What the host does in stage one while a GPU computes, without a GPU: tokens a second, CPU time by thread.

    python benchmarks/host_side.py --text FILE.jsonl [--batches 40] [--shard 64] [--keep FOLDER]

The real loop of `cache` (`StageOne`, `BackgroundWriter`, Parquet, flushes, commits) runs over results that
were captured once: 16 sequences of 1,024 tokens of real text as SmolLM2-135M sees them, handed out again and
again as if a GPU had just written them to the host, predictions taken off. Not in it: what MLX costs the main
thread to queue the work. `--keep` keeps the captured batch for later runs.

Times are CPU time in microseconds a token: of each thread (`/proc/self/task`, so Linux only), and of the
functions that matter on it. `late` is how much later than asked a thread that sleeps a millisecond gets the
interpreter, which is what the thread that feeds a GPU sees of the others. The digest at the end is of all
commit records: equal digests, equal bytes.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (preloads OpenBLAS)

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks.phases import timed
from pipeline.cache import read_data
from pipeline.calibration import Coding
from pipeline.console import Console
from pipeline.data import PackedDataset
from pipeline.demo import demo_teacher
from pipeline.settings import CacheSettings
from pipeline.stage_one import StageOne
from pipeline.teacher import TeacherRunner
from pmetal_distill.models import load_model
from pmetal_distill.offline.capture import PendingCapture, capture
from pmetal_distill.offline.writer import CacheWriter, Sidecars
from schemas.basis import SketchBasis
from schemas.codebook import Codebook
from schemas.manifest import FINGERPRINT_PARTS, Dataset
from schemas.spec import TargetSpec

QUIET = Console(quiet=True)
BATCH, LENGTH, ROWS = 16, 1024, 256


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A batch as a GPU hands it over, and what it is coded with."""

    bits: np.ndarray[Any, Any]
    data: PackedDataset
    spec: TargetSpec
    sidecars: Sidecars


def settings(text: str, out: Path, *, shard: int = 64) -> CacheSettings:
    """Stage one of the teacher of the demo, by its defaults but for the shape of a batch."""
    return CacheSettings(
        teacher=str(demo_teacher()),
        data=text,
        out=out,
        max_seq_len=LENGTH,
        batch_size=BATCH,
        calibration_tokens=4096,
        sequences_per_shard=shard,
    )


def captured(text: str, folder: Path) -> Captured:
    """The batch in `folder`, made first if it is not there: some minutes on two cores."""
    from pipeline.cache import target_spec

    (folder / "text.jsonl").write_text("\n".join(Path(text).read_text("utf-8").splitlines()[:400]))
    found = settings(str(folder / "text.jsonl"), folder / "unused")
    teacher = load_model(found.teacher)
    data, spec = read_data(found, teacher), target_spec(found, teacher.vocab_size)
    if not (folder / "bits.npy").exists():
        run = StageOne(found, teacher, data, spec, None, QUIET)
        known = run.learn().calibration  # type: ignore[union-attr]
        (folder / "basis").write_bytes(known.basis.to_bytes())
        (folder / "codebook").write_bytes(known.codebook.to_bytes())
        (states,) = TeacherRunner(teacher, data, BATCH).run(range(BATCH))
        ids, rows = states.batch.token_ids[states.batch.loss_mask], []
        for start in range(0, len(states.final), ROWS):
            final = states.final[start : start + ROWS]
            part = capture(teacher.logits(final), spec, hidden=final, sketch=known.map)
            left = part.coordinates - known.basis.predict(ids[start : start + ROWS], part.head_ids)
            columns = (part.head_logprobs, part.tail_curve, np.zeros((len(left), 2), np.float32), left)
            rows.append(np.concatenate([part.head_ids, *(c.view(np.int32) for c in columns)], axis=1))
        np.save(folder / "bits.npy", np.concatenate(rows))
    basis = SketchBasis.from_bytes((folder / "basis").read_bytes(), where="basis")
    codebook = Codebook.from_bytes((folder / "codebook").read_bytes(), where="codebook")
    return Captured(np.load(folder / "bits.npy"), data, spec, Sidecars(basis, codebook))


def repeated(data: PackedDataset, times: int) -> PackedDataset:
    """The first batch of a data set, over and over."""
    windows, again = int(data.sequence_windows[BATCH]), np.arange(times)[:, None]
    tokens = int(data.window_tokens[windows])

    def starts(values: Any, step: int) -> Any:
        return np.append((values[:-1] + step * again).ravel(), step * times)

    names = ("window_documents", "window_masked", "window_ends")
    return replace(
        data,
        token_ids=np.tile(data.token_ids[:tokens], times),
        sequence_windows=starts(data.sequence_windows[: BATCH + 1], windows),
        window_tokens=starts(data.window_tokens[: windows + 1], tokens),
        **{name: np.tile(getattr(data, name)[:windows], times) for name in names},
    )


@contextmanager
def standing_in(bits: np.ndarray[Any, Any]) -> Iterator[Any]:
    """A teacher that costs nothing, on a device that has the results at once."""
    delivered = SimpleNamespace(wait=lambda: None, take=bits.copy)
    hidden = SimpleNamespace(final=mx.zeros((BATCH, LENGTH, 8)), layers={})
    teacher = SimpleNamespace(
        splits=True, vocab_size=49152, hidden=lambda *_, **__: hidden, logits=lambda states: states, head=None
    )
    with ExitStack() as stack:
        for module in ("pipeline.stage_one", "pmetal_distill.offline.capture"):
            stack.enter_context(patch(f"{module}.on_gpu", lambda: True))
        stack.enter_context(patch.object(PendingCapture, "_queue", lambda _: delivered))
        yield teacher


@dataclass(slots=True)
class Watch:
    """CPU seconds of the threads of this process by name, and how late a sleeper wakes."""

    seconds: dict[int, float] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    late: list[float] = field(default_factory=list)

    def look(self, stop: threading.Event) -> None:
        """Until told to stop."""
        before = {native: seconds for native, _, seconds in _tasks()}
        while not stop.is_set():
            start = time.perf_counter()
            time.sleep(0.001)
            self.late.append(time.perf_counter() - start - 0.001)
            for native, name, seconds in _tasks() if len(self.late) % 10 == 0 else ():
                if name != "native" or native not in self.names:
                    self.names[native] = name
                self.seconds[native] = seconds - before.get(native, 0.0)


@contextmanager
def watching() -> Iterator[Watch]:
    """While the block runs."""
    watch, stop = Watch(), threading.Event()
    thread = threading.Thread(target=watch.look, args=(stop,), name="watch")
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()


def _tasks() -> Iterator[tuple[int, str, float]]:
    """Thread number, name, and seconds on a core."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    for task in Path("/proc/self/task").iterdir():
        try:
            nanoseconds = (task / "schedstat").read_text().split()[0]
        except OSError:
            continue
        yield int(task.name), names.get(int(task.name), "native"), int(nanoseconds) / 1e9


def measure(given: Captured, batches: int, folder: Path, *, shard: int) -> None:
    """One run, and what it took."""
    data = repeated(given.data, batches)
    wanted = settings("unused", folder / "cache", shard=shard)
    dataset = Dataset(
        fingerprint=dict.fromkeys(FINGERPRINT_PARTS, "none"),
        target=given.spec,
        num_sequences=data.num_sequences,
        num_tokens=data.num_tokens,
        sequences_per_shard=shard,
        max_sequence_length=LENGTH,
    )
    with ExitStack() as stack:
        teacher = stack.enter_context(standing_in(given.bits))
        writer = stack.enter_context(CacheWriter.create_or_resume(wanted.out, dataset, {}))
        run = StageOne(wanted, teacher, data, given.spec, None, QUIET)
        run._learned = Coding(given.sidecars)
        phases = stack.enter_context(timed(time.thread_time))
        watch = stack.enter_context(watching())
        run.write_missing(writer)
    found = run.summary()
    tokens = found["new_tokens"]
    print(f"tokens {tokens:,}  tokens/s {found['tokens_per_second']:,.0f}", flush=True)
    report(watch, {name: 1e6 * seconds / tokens for name, seconds in phases.items()}, tokens)
    digest = hashlib.sha256()
    for record in sorted((wanted.out / "commits").iterdir()):
        digest.update(json.dumps(json.loads(record.read_text()), sort_keys=True).encode())
    print("digest", digest.hexdigest()[:16])


def report(watch: Watch, phases: dict[str, float], tokens: int) -> None:
    """The tables."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for native, seconds in watch.seconds.items():
        kinds[watch.names[native].rstrip("_0123456789")].append(1e6 * seconds / tokens)
    for kind, each in kinds.items():
        if max(each) >= 0.005:
            print(f"  {kind:12s} {len(each):2d} threads  {sum(each):7.3f} us/token  most {max(each):7.3f}")
    for name, took in sorted(phases.items()):
        print(f"    {name:44s} {took:7.3f} us/token")
    late = 1e6 * np.sort(watch.late)
    print("  late", *(f"{q:.0%} {np.quantile(late, q):,.0f} us" for q in (0.5, 0.9, 0.99)))


def main() -> None:
    """Makes the batch, runs twice, reports the second."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", required=True, help="JSONL; the first 400 lines count")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--shard", type=int, default=64)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = options.keep or Path(folder) / "captured"
        kept.mkdir(parents=True, exist_ok=True)
        given = captured(options.text, kept)
        for name, batches in (("warm", 4), ("run", options.batches)):
            measure(given, batches, Path(folder) / name, shard=options.shard)


if __name__ == "__main__":
    main()
