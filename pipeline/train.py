"""Stage two: trains a student from a cache. Costs forward and backward of the student; no teacher is needed.

A run folder holds `config.yaml` (the settings as resolved), `metrics.jsonl` (one object a report) and
`model/`, a folder that mlx_lm loads.
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import save_config
from pipeline.console import Console
from pipeline.settings import TrainSettings
from schemas.errors import IncompatibleError, NonFiniteError, UsageError

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.batch import Batch
    from pmetal_distill.offline.reader import LogitCache

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
MODEL = "model"


def run_train(settings: TrainSettings, console: Console) -> dict[str, Any]:
    """Trains, logs, saves.

    Returns:
        steps, seconds, tokens a second, the last means of the loss components, and where the model lies.

    Raises:
        UsageError: the output folder is in use.
        IncompatibleError: the student cannot hold the cached ids, or has another tokenizer.
        NonFiniteError: the loss stopped being a number.
    """
    from pmetal_distill.models import load_model, save_model

    _refuse_used_folder(settings.out)
    cache = open_cache(settings)
    student = load_model(settings.student, trust_remote_code=settings.trust_remote_code)
    for note in student.notes:
        console.note(f"student: {note}")
    check_student(student, cache)
    settings.out.mkdir(parents=True, exist_ok=True)
    save_config(settings, settings.out / CONFIG)
    metrics = _train(settings, cache, student, console)
    save_model(student, settings.out / MODEL)
    return {**metrics, "model": str(settings.out / MODEL)}


def open_cache(settings: TrainSettings) -> "LogitCache":
    """The cache with as much of its targets as the settings want.

    Raises:
        IncompatibleError: the settings want more than the cache holds.
    """
    from pmetal_distill.offline.reader import LogitCache

    cache = LogitCache(settings.cache)
    stored, wanted = cache.spec.tail, settings.tail or cache.spec.tail
    order = ("none", "bucket", "sketch")
    if order.index(wanted) > order.index(stored):
        raise IncompatibleError(
            f"tail: must be at most '{stored}', which {settings.cache} holds, found '{wanted}'; "
            "leave it out or cache again"
        )
    return LogitCache(settings.cache, rank=0) if wanted != "sketch" == stored else cache


def check_student(student: "LoadedModel", cache: "LogitCache") -> None:
    """Refuses a student that numbers tokens differently than the cache.

    Raises:
        IncompatibleError: another tokenizer, or too few rows in the embedding.
    """
    from pmetal_distill.models import compare_tokenizers, load_tokenizer

    cached = load_tokenizer(cache.tokenizer_path)
    if differences := compare_tokenizers(cached, student.tokenizer):
        raise IncompatibleError(
            f"{student.source}: must have the tokenizer that the cache was made with, found differences: "
            f"{'; '.join(differences[:5])}; take a student of the teacher's family"
        )
    needed = len(cached)
    if student.vocab_size < needed:
        raise IncompatibleError(
            f"{student.source}: must have room for the {needed} cached token ids, found a vocabulary of "
            f"{student.vocab_size}; take a student with a larger embedding"
        )


@dataclass(slots=True)
class Means:
    """Running means of the loss components since the last report, weighted by tokens."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: float = 0.0

    def add(self, values: Mapping[str, float], tokens: float) -> None:
        for name, value in values.items():
            self.sums[name] += value * tokens
        self.tokens += tokens

    def take(self) -> dict[str, float]:
        """The means; starts anew."""
        means = {name: total / max(self.tokens, 1e-9) for name, total in self.sums.items()}
        self.sums.clear()
        self.tokens = 0.0
        return means


def _refuse_used_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: the folder of a run must be new or empty, found it in use; choose another --out"
        )


def _train(
    settings: TrainSettings, cache: "LogitCache", student: "LoadedModel", console: Console
) -> dict[str, Any]:
    from pipeline.optimizing import build_optimizer
    from pipeline.stepping import Stepper

    stepper = Stepper(settings, cache, student, build_optimizer(settings))
    means, report = Means(), {}
    started = time.perf_counter()
    trained = 0
    waited = 0.0
    with (
        (settings.out / METRICS).open("w", encoding="utf-8") as log,
        cache.batches(batch_size=settings.batch_size, seed=settings.seed) as batches,
        console.progress("training", total=settings.iters, unit="steps") as progress,
    ):
        for iteration in range(1, settings.iters + 1):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            values = stepper.step(batch)
            _require_finite(values, iteration, batch)
            means.add(values, batch.num_trained_tokens)
            trained += batch.num_trained_tokens
            progress.advance(1)
            if iteration % settings.steps_per_report == 0 or iteration == settings.iters:
                seconds = time.perf_counter() - started
                report = {
                    "iteration": iteration,
                    **means.take(),
                    "learning_rate": stepper.learning_rate,
                    "tokens": trained,
                    "seconds": seconds,
                    "tokens_per_second": trained / seconds,
                    "data_wait_share": waited / seconds,
                }
                print(json.dumps(report), file=log, flush=True)
                progress.tell(
                    f"loss {report['loss']:.3f} soft {report['soft']:.3f} hard {report['hard']:.3f}"
                )
    return report


def _require_finite(values: Mapping[str, float], iteration: int, batch: "Batch") -> None:
    if not np.isfinite(values["loss"]):
        raise NonFiniteError(
            f"iteration {iteration}: the loss must be finite, found {values['loss']} on sequences "
            f"{batch.numbers.tolist()}; lower the learning rate or look at these rows with 'inspect'"
        )
