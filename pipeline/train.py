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
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline.about import missing_blas
from pipeline.config import save_config
from pipeline.console import Console
from pipeline.settings import Ramp, TrainSettings
from schemas.errors import IncompatibleError, NonFiniteError, UsageError

if TYPE_CHECKING:
    from pmetal_distill.config import DistillConfig
    from pmetal_distill.distiller import Distiller
    from pmetal_distill.losses.chunked_head import LossParts
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
    if hint := missing_blas():
        console.note(hint)
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
    """The cache with as much of its targets, and those hidden layers, as the settings want.

    Raises:
        IncompatibleError: the settings want more than the cache holds.
    """
    from pmetal_distill.offline.reader import LogitCache

    layers = teacher_layers(settings, LogitCache(settings.cache))
    cache = LogitCache(settings.cache, hidden_layers=layers)
    stored, wanted = cache.spec.tail, settings.tail or cache.spec.tail
    order = ("none", "bucket", "sketch")
    if order.index(wanted) > order.index(stored):
        raise IncompatibleError(
            f"tail: must be at most '{stored}', which {settings.cache} holds, found '{wanted}'; "
            "leave it out or cache again"
        )
    if wanted == "none":
        return LogitCache(settings.cache, hidden_layers=layers, with_tail=False)
    return LogitCache(settings.cache, hidden_layers=layers, rank=0) if wanted == "bucket" else cache


def teacher_layers(settings: TrainSettings, cache: "LogitCache") -> tuple[int, ...]:
    """The teacher's layers to align with, from 0; none without a hidden-state loss.

    Raises:
        IncompatibleError: the cache does not hold one of them.
    """
    if settings.hidden_loss is None:
        return ()
    stored = cache.dataset.hidden.layers if cache.dataset.hidden else ()
    count = int(cache.dataset.meta.get("teacher_layers", "0"))
    wanted = stored if settings.hidden_layers == "all" else settings.hidden_layers
    layers = tuple(layer + count if layer < 0 else layer for layer in wanted)
    missing = [layer for layer in layers if layer not in stored]
    if missing or not layers:
        raise IncompatibleError(
            f"hidden_layers: must be among those that {settings.cache} holds, {list(stored)}, found "
            f"{list(wanted)}; cache again with --hidden-layers"
        )
    return layers


def distill_config(settings: TrainSettings, layers: tuple[int, ...]) -> "DistillConfig":
    """The library's settings out of the command's."""
    from pmetal_distill.config import DistillConfig
    from pmetal_distill.losses.hidden import HiddenStateLoss
    from pmetal_distill.schedule import AlphaSchedule, TemperatureSchedule

    return DistillConfig(
        temperature=_scheduled(settings.temperature, TemperatureSchedule),
        alpha=_scheduled(settings.alpha, AlphaSchedule),
        loss=settings.loss,
        loss_parameter=settings.loss_parameter,
        hidden_loss=HiddenStateLoss(settings.hidden_loss) if settings.hidden_loss else None,
        hidden_layers=layers,
        hidden_weight=settings.hidden_weight,
        accumulation_steps=settings.grad_accumulation_steps,
        max_grad_norm=settings.grad_clip,
        chunk_tokens=settings.head_chunk,
    )


def _scheduled(value: float | Ramp, kind: Any) -> Any:
    if not isinstance(value, Ramp):
        return value
    return getattr(kind, value.schedule)(start=value.start, end=value.end, steps=value.steps)


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
    from pmetal_distill.distiller import Distiller

    config = distill_config(settings, cache.hidden_layers)
    distiller = Distiller(cache, student, config, optimizer=build_optimizer(settings))
    log = RunLog(settings, distiller)
    with (
        (settings.out / METRICS).open("w", encoding="utf-8") as file,
        cache.batches(batch_size=settings.batch_size, seed=settings.seed) as batches,
        console.progress("training", total=settings.iters, unit="steps") as progress,
    ):
        for iteration in range(1, settings.iters + 1):
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            parts = distiller.step(batch)
            log.add(iteration, parts, batch, waited=waited)
            progress.advance(1)
            if iteration % settings.steps_per_report == 0 or iteration == settings.iters:
                report = log.report(iteration)
                print(json.dumps(report), file=file, flush=True)
                progress.tell(" ".join(f"{name} {report[name]:.3f}" for name in ("loss", "soft", "hard")))
    return log.last


@dataclass(slots=True, eq=False)
class RunLog:
    """Collects what the steps say and turns it into reports."""

    settings: TrainSettings
    distiller: "Distiller"
    means: Means = field(default_factory=Means)
    tokens: int = 0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    last: dict[str, Any] = field(default_factory=dict)

    def add(self, iteration: int, parts: "LossParts", batch: "Batch", *, waited: float) -> None:
        """Adds a step.

        Raises:
            NonFiniteError: its loss is not a number.
        """
        names = {"loss": parts.total, "soft": parts.soft, "hard": parts.hard}
        if self.distiller.config.hidden_loss is not None:
            names["hidden"] = parts.hidden
        values = {name: cast(float, value.item()) for name, value in names.items()}
        _require_finite(values, iteration, batch)
        self.means.add(values, batch.num_trained_tokens)
        self.tokens += batch.num_trained_tokens
        self.waited += waited

    def report(self, iteration: int) -> dict[str, Any]:
        """Means since the last report, and totals."""
        seconds = time.perf_counter() - self.started
        update = max(self.distiller.updates - 1, 0)
        self.last = {
            "iteration": iteration,
            **self.means.take(),
            "temperature": self.distiller.config.temperature_at(update),
            "alpha": self.distiller.config.alpha_at(update),
            "learning_rate": float(self.distiller.optimizer.learning_rate),
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait_share": self.waited / seconds,
        }
        return self.last


def _require_finite(values: Mapping[str, float], iteration: int, batch: "Batch") -> None:
    if not np.isfinite(values["loss"]):
        raise NonFiniteError(
            f"iteration {iteration}: the loss must be finite, found {values['loss']} on sequences "
            f"{batch.numbers.tolist()}; lower the learning rate or look at these rows with 'inspect'"
        )
