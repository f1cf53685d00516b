"""The loop of stage one: the path of a GPU, faults and interrupts, what the summary counts."""

import dataclasses
import itertools
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from pipeline.cache import in_background, read_data, run_cache
from pipeline.calibration import Calibrator
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pipeline.stage_one import RECEIVED_BATCHES, ahead, in_order
from pipeline.teacher import TeacherRunner
from pmetal_distill.models import load_model, model_fingerprint
from pmetal_distill.offline import capture
from pmetal_distill.offline.reader import LogitCache
from schemas.errors import CacheError, NonFiniteError
from tests.pipeline.conftest import Cli
from tests.precision import near_the_edge

SKETCH = {"tail": "sketch", "sketch_rank": 8, "sketch_step": 0.5, "calibration_tokens": 300}


def settings(teacher: Path, data: Path, out: Path, **changes: Any) -> CacheSettings:
    values: dict[str, Any] = {"tail": "bucket", "max_seq_len": 64, "batch_size": 4, "sequences_per_shard": 6}
    return CacheSettings(
        teacher=str(teacher), data=str(data), out=out, **(values | {"head_chunk": 50} | changes)
    )


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued captures and measures on the device, by plain operations on the CPU."""
    for module in (
        "pmetal_distill.offline.capture",
        "pmetal_distill.offline.calibrate",
        "pipeline.stage_one",
    ):
        monkeypatch.setattr(f"{module}.on_gpu", lambda: True)


@pytest.mark.parametrize("changes", [{"hidden_layers": (1, -1)}, SKETCH], ids=["bucket", "sketch"])
def test_the_path_of_a_gpu_gives_the_same(
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    for name in ("cpu", "gpu"):
        if name == "gpu":
            request.getfixturevalue("as_on_a_gpu")
        run_cache(settings(tiny_teacher, text_file, tmp_path / name, **changes), Console(quiet=True))
    layers = tuple(layer % 4 for layer in changes.get("hidden_layers", ()))
    one, two = (LogitCache(tmp_path / name, hidden_layers=layers) for name in ("cpu", "gpu"))
    for number in range(one.num_sequences):
        a, b = one.sequence(number), two.sequence(number)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.targets.head_ids, b.targets.head_ids)
        np.testing.assert_allclose(a.targets.head_logprobs, b.targets.head_logprobs, atol=2 / 128)
        np.testing.assert_allclose(a.targets.tail_curve, b.targets.tail_curve, atol=2 / 256)
        if a.targets.rank:
            assert np.abs(a.targets.coordinates - b.targets.coordinates).max() < 0.6
        for layer in layers:
            np.testing.assert_array_equal(a.hidden[layer], b.hidden[layer])
    for name, figure in one.records[0].measured.items():
        assert two.records[0].measured[name] == pytest.approx(figure, rel=0.02, abs=1e-6)


def test_few_kinds_of_gathers(
    tiny_teacher: Path, text_file: Path, tmp_path: Path, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA each pair of types of numbers and indices is compiled for seconds; `x[0]` is a gather too."""
    kinds, get = set(), mx.array.__getitem__

    def seen(self: mx.array, index: Any) -> mx.array:
        parts = index if isinstance(index, tuple) else (index,)
        if isinstance(index, int):
            kinds.add((self.dtype, mx.uint32))
        kinds.update((self.dtype, part.dtype) for part in parts if isinstance(part, mx.array | np.ndarray))
        return get(self, index)

    monkeypatch.setattr(mx.array, "__getitem__", seen)
    run_cache(settings(tiny_teacher, text_file, tmp_path / "c", **SKETCH), Console(quiet=True))
    tables = (mx.int16, mx.int32)  # of the predictor, where no kernel looks them up
    assert kinds - {tables} == {(mx.float32, mx.int32)}


@pytest.mark.parametrize("gpu", [False, True])
def test_a_row_that_is_not_finite_is_named(
    tiny_teacher: Path, text_file: Path, tmp_path: Path, gpu: bool, request: pytest.FixtureRequest
) -> None:
    if gpu:
        request.getfixturevalue("as_on_a_gpu")
    teacher = load_model(tiny_teacher)
    teacher.model.update(tree_map(lambda w: w * float("nan"), teacher.model.parameters()))
    with pytest.raises(NonFiniteError, match="row 0: logits must be finite"):
        run_cache(settings(tiny_teacher, text_file, tmp_path / "c"), Console(quiet=True), teacher=teacher)

    def poisoned(self: Any, batch: Any) -> Any:
        states = forward(self, batch)
        if 8 not in batch.sequences:
            return states
        row = int(states.starts[list(batch.sequences).index(8)]) + 3
        final = mx.where(mx.arange(len(states.final))[:, None] == row, float("inf"), states.final)
        return dataclasses.replace(states, final=final)

    forward = TeacherRunner._forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherRunner, "_forward", poisoned)
        patch.setattr("pipeline.calibration.CODEBOOK_TOKENS", 8)
        patch.setattr("pipeline.data.PackedDataset.sample_sequences", lambda *_, **__: np.array([0]))
        with pytest.raises(NonFiniteError, match="sequence 8 position 3: logits must be finite"):
            run_cache(settings(tiny_teacher, text_file, tmp_path / "d"), Console(quiet=True))
    assert len(list((tmp_path / "d/commits").iterdir())) == 1


@pytest.mark.parametrize("where", ["calibration", "main pass", "main pass of a GPU"])
def test_a_float16_teacher_that_overflows_names_the_layer(
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    tokenizer = load_model(tiny_teacher).tokenizer
    token = tokenizer.encode("print")[-1]
    teacher = dataclasses.replace(near_the_edge(token, layer=2), tokenizer=tokenizer)
    wanted = settings(tiny_teacher, text_file, tmp_path / "c")
    data = read_data(wanted, teacher)
    spared = next(n for n in range(data.num_sequences) if token not in data.sequence(n).token_ids)
    if where != "calibration":
        monkeypatch.setattr("pipeline.calibration.CODEBOOK_TOKENS", 8)
        monkeypatch.setattr(
            "pipeline.data.PackedDataset.sample_sequences", lambda *_, **__: np.array([spared])
        )
    if where.endswith("GPU"):
        request.getfixturevalue("as_on_a_gpu")
    row = "calibration row|capture row" if where == "calibration" else r"sequence \d+ position \d+"
    with pytest.raises(
        NonFiniteError,
        match=rf"(?s)^({row}).*; layer 2: float16 overflows \(max 65504\); use --dtype bfloat16$",
    ):
        run_cache(wanted, Console(quiet=True), teacher=teacher)


@pytest.mark.parametrize("gpu", [False, True])
def test_an_interrupt_leaves_a_cache_that_resumes_to_the_same_bytes(
    tiny_teacher: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    request: pytest.FixtureRequest,
) -> None:
    if gpu:
        request.getfixturevalue("as_on_a_gpu")
    quiet = Console(quiet=True)
    wanted = settings(tiny_teacher, text_file, tmp_path / "c", batch_size=2)
    run_cache(dataclasses.replace(wanted, out=tmp_path / "whole"), quiet)
    take, turns = capture.PendingCapture.result, itertools.count()

    def interrupted(self: Any) -> Any:
        if next(turns) == 10:
            raise KeyboardInterrupt
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(capture.PendingCapture, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_cache(wanted, quiet)
    done = len(list((wanted.out / "commits").iterdir()))
    summary = run_cache(dataclasses.replace(wanted, resume=True), quiet)
    assert LogitCache(wanted.out).root == LogitCache(tmp_path / "whole").root
    assert done >= 1
    assert 0 < summary["new_tokens"] < summary["tokens"]


def test_a_full_disk_keeps_what_is_committed(
    tiny_teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pmetal_distill.offline import background, shard

    quiet, flush, turns = Console(quiet=True), shard.flush_file, itertools.count()
    wanted = settings(tiny_teacher, text_file, tmp_path / "c")

    def full(handle: Any) -> None:
        if next(turns) == 2:
            raise OSError(28, "No space left on device")
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "flush_file", full)
        patch.setattr(background, "MOST_CHECKERS", 1)
        with pytest.raises(CacheError, match="shard 2: must be written in full"):
            run_cache(wanted, quiet)
    assert sorted(path.name for path in (wanted.out / "commits").iterdir()) == ["00000.json", "00001.json"]
    run_cache(dataclasses.replace(wanted, resume=True), quiet)
    run_cache(dataclasses.replace(wanted, out=tmp_path / "whole"), quiet)
    assert LogitCache(wanted.out).root == LogitCache(tmp_path / "whole").root


def test_the_summary_counts_forward_passes_once(
    tiny_teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All states are kept by the calibration here: their time belongs to the pass over the data."""
    forward = TeacherRunner._forward

    def slow(self: Any, batch: Any) -> Any:
        states = forward(self, batch)
        mx.eval(states.final)
        time.sleep(0.05)
        return states

    monkeypatch.setattr(TeacherRunner, "_forward", slow)
    found = run_cache(settings(tiny_teacher, text_file, tmp_path / "c", **SKETCH), Console(quiet=True))
    batches = -(-found["sequences"] // 4)
    assert found["seconds"] > found["calibration_seconds"] > 0
    assert found["new_tokens"] / found["tokens_per_second"] > 0.05 * batches
    assert found["seconds"] == pytest.approx(
        found["calibration_seconds"] + found["new_tokens"] / found["tokens_per_second"]
    )


def test_a_finished_cache_is_not_calibrated_again(
    bucket_cache: Path, tiny_teacher: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibrator, "learn", lambda _: pytest.fail("calibrated"))
    same = settings(tiny_teacher, text_file, bucket_cache, resume=True, sequences_per_shard=8)
    assert run_cache(same, Console(quiet=True))["new_tokens"] == 0


def test_ahead_asks_for_more_and_changes_nothing() -> None:
    asked: list[int] = []

    def items() -> Any:
        for number in range(5):
            asked.append(number)
            yield number

    for count in (0, 2, 9):
        asked.clear()
        found = ahead(items(), count)
        assert next(found) == 0
        assert len(asked) == min(5, count + 1)
        assert list(found) == [1, 2, 3, 4]


def test_work_in_background_gives_its_value_or_its_error(tiny_teacher: Path) -> None:
    teacher = load_model(tiny_teacher)
    assert in_background(lambda: model_fingerprint(teacher))() == model_fingerprint(teacher)

    def failing() -> str:
        raise OSError(5, "unreadable")

    waiting = in_background(failing)
    with pytest.raises(OSError, match="unreadable"):
        waiting()


@pytest.mark.parametrize("beside", [False, True])
def test_work_is_done_in_order_up_to_an_error(beside: bool) -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.002 * (number % 3))
        if number == 7:
            raise NonFiniteError("number 7")
        done.append(number)

    def do_all(numbers: range) -> None:
        with in_order(beside=beside) as do:
            for number in numbers:
                do(partial(work, number))

    do_all(range(7))
    assert done == list(range(7))
    with pytest.raises(NonFiniteError, match="number 7"):
        do_all(range(5, 20))
    assert done == [*range(7), 5, 6]


def test_work_beside_the_caller_stops_with_it() -> None:
    usual, started, going = sys.getswitchinterval(), threading.Event(), threading.Event()
    done: list[int] = []

    def blocked() -> None:
        started.set()
        going.wait(10)

    def interrupted() -> None:
        with in_order(beside=True) as do:
            do(blocked)
            do(lambda: done.append(1))
            started.wait(10)
            threading.Timer(0.05, going.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not done
    assert sys.getswitchinterval() == usual


def test_few_pieces_of_work_wait_beside_the_caller() -> None:
    going = threading.Event()
    with in_order(beside=True) as do:
        do(partial(going.wait, 10))
        threading.Timer(0.1, going.set).start()
        start = time.perf_counter()
        for _ in range(RECEIVED_BATCHES + 1):
            do(lambda: None)
        assert time.perf_counter() - start > 0.05


def test_the_usual_rank_is_cut_to_what_a_narrow_teacher_allows(
    cli: Cli, tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    words = ("cache", "--teacher", tiny_teacher, "--data", text_file, "--out", out)
    got = cli(*words)
    assert got.code == 0, got.err
    assert "sketch rank: 32 instead of 256" in got.err
    assert LogitCache(out).rank == 32
    assert cli(*words, "--resume").code == 0
    assert cli(*words, "--resume", "--sketch-rank", 32).code == 0
