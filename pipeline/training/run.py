"""Stage two: trains a student from a cache. Costs forward and backward of the student; no teacher is needed.

A run folder holds `config.yaml` (the settings as resolved), `metrics.jsonl` (one object a report) and
`model/`, a folder that mlx_lm loads.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.about import missing_blas
from pipeline.config import save_config
from pipeline.console import Console
from pipeline.settings import TrainSettings
from pipeline.training.config import distill_config
from pipeline.training.log import RunLog
from pipeline.training.source import open_cache
from pipeline.training.student import check_student
from schemas.errors import UsageError

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
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


def _refuse_used_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: the folder of a run must be new or empty, found it in use; choose another --out"
        )


def _train(
    settings: TrainSettings, cache: "LogitCache", student: "LoadedModel", console: Console
) -> dict[str, Any]:
    from pipeline.training.optimizing import build_optimizer
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
