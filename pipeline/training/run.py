"""Stage two: trains a student from a cache or beside a live teacher, and can be stopped at any time.

Costs forward and backward of the student. `folder` says what lies in the folder of a run; beside that there
are the model or its adapters, see `output`.
"""

import math
import os
from typing import TYPE_CHECKING, Any

from pipeline.about import missing_blas
from pipeline.console import Console
from pipeline.settings import TrainSettings
from pipeline.training.checkpoints import Checkpoint, Checkpoints
from pipeline.training.compiling import compile_ahead
from pipeline.training.config import distill_config
from pipeline.training.folder import RunFolder
from pipeline.training.identity import (
    check_same_content,
    check_same_settings,
    content_of,
    deciding_settings,
    depends_on_length,
)
from pipeline.training.log import RunLog
from pipeline.training.memory import check_memory, fits_twice
from pipeline.training.reporting import Metrics, NoMetrics, begin_services
from pmetal_distill.device import on_cuda
from schemas.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from pipeline.training.loop import Loop
    from pmetal_distill.parallel import World
    from pmetal_distill.precision import StudentPrecision


def run_train(settings: TrainSettings, console: Console) -> dict[str, Any]:
    """Trains, logs, saves.

    With `resume`, goes on from the newest intact checkpoint as if the run had never been stopped; without one
    it begins anew; a finished run is left as it is, or made longer if more `iters` are wanted.

    Returns:
        the last means of the loss components and of the evaluation, speed, and where the model lies.

    Raises:
        UsageError: the output folder is in use, or a package is missing.
        CheckpointError: `resume` with other settings, another student or other data than the run's; or a disk
            that is full or fails.
        IncompatibleError: the student cannot hold the cached ids, or has another tokenizer.
        NonFiniteError: the loss or the weights stopped being numbers.
        KeyboardInterrupt: stopped by a signal, behind a checkpoint.
    """
    if settings.services:
        from pmetal_distill.modelling.callbacks import require_services

        require_services(settings.services)
    from pmetal_distill.parallel import World

    limit_queued_memory()
    world = World.launched()
    if not world.leads:
        console = Console(quiet=True)
    with open_together(settings, world) as folder:
        if (result := folder.result) is not None and settings.iters <= folder.settings().iters:
            check_same_settings(deciding_settings(folder.settings()), settings)
            console.note(f"{folder.path}: the run is finished; nothing was changed")
            return result
        result = _run(settings, folder, world, console)
        if world.leads:
            folder.finish(result)
        return result


def limit_queued_memory() -> None:
    """On CUDA, has MLX hand work to the device in parts of 100 MB of inputs, if the environment says nothing.

    Arrays live until the part that used them is done, and MLX's own 1000 MB keep gigabytes of a step alive.
    MLX reads the variable before it queues its first work.
    """
    if on_cuda():
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "100")


def open_together(settings: TrainSettings, world: "World") -> RunFolder:
    """The folder of the run, which the first process takes and the others share.

    Raises:
        UsageError: in use, not seen by all, or fewer sequences in a batch than processes.
        PeerLostError: another process is gone.
    """
    if settings.batch_size < world.size:
        raise UsageError(
            f"batch_size: must be at least {world.size}, one sequence for each process, found "
            f"{settings.batch_size}; give more, or start fewer processes"
        )
    taken = world.together(
        lambda: RunFolder.open(settings) if world.leads else None,
        otherwise=UsageError(f"{settings.out}: the first process must take it, found that it could not"),
    )
    resumed = world.any(taken is not None and taken.resumed)
    return taken or RunFolder.of_peer(settings, resumed=resumed)


def _run(settings: TrainSettings, folder: RunFolder, world: "World", console: Console) -> dict[str, Any]:
    import mlx.core as mx

    if hint := missing_blas():
        console.note(hint)
    checkpoints = Checkpoints(folder.checkpoints, settings.keep_checkpoints)
    # No name is kept for the checkpoint: its arrays must go when training has replaced them.
    loop = prepare_loop(
        settings, checkpoints, _checkpoint(settings, folder, checkpoints, console), console, world=world
    )
    _require_same_start(loop.iteration, world)
    compiling = compile_ahead(
        settings,
        loop.distiller,
        settings.iters - loop.iteration,
        content=loop.content["content"],
        room=lambda: fits_twice(settings, loop.source, loop.distiller),
    )
    with _metrics(settings, folder, loop.iteration, world) as metrics:
        loop.run(metrics, console, compiling)
    if not world.leads:
        return {}
    figures = {**loop.log.last, **loop.evaluation, "precision": loop.distiller.precision.describe()}
    figures["peak_memory_gb"] = mx.get_peak_memory() / 1e9
    if loop.best is not None:
        figures["best_iteration"] = loop.best[0]
    return {**figures, **_written(settings, loop, figures)}


def _written(settings: TrainSettings, loop: "Loop", figures: dict[str, Any]) -> dict[str, str]:
    """Writes what was trained; a full disk, which MLX reports as a RuntimeError, is an error of ours."""
    from pipeline.training.output import write_outputs

    try:
        return write_outputs(settings, loop.distiller.student, loop.source, figures)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "[write]" not in str(error):
            raise
        raise CheckpointError(
            f"{settings.out}: what was trained must be written in full, found {error}; free space or fix the "
            "disk, then run the same command with --resume"
        ) from error


def _require_same_start(iteration: int, world: "World") -> None:
    """Sees that all processes have found the same checkpoint."""
    import mlx.core as mx

    if not world.all(int(world.sum(mx.array(iteration))) == iteration * world.size):
        raise CheckpointError(
            f"checkpoints: all processes must go on from the same one, found iteration {iteration} here and "
            "another elsewhere; let them share the disk of the run's folder"
        )


def _metrics(settings: TrainSettings, folder: RunFolder, after: int, world: "World") -> Metrics:
    if not world.leads:
        return NoMetrics()
    folder.save_settings(settings)
    return Metrics(folder.metrics, after=after, callback=begin_services(settings))


def _checkpoint(
    settings: TrainSettings, folder: RunFolder, checkpoints: Checkpoints, console: Console
) -> Checkpoint | None:
    """The checkpoint to go on from, of a run with these settings; None to begin anew."""
    if not settings.resume:
        return None
    checkpoint = checkpoints.latest(console) if folder.resumed else None
    if checkpoint is None and folder.result is not None:
        raise CheckpointError(
            "--iters: a finished run is made longer from its last checkpoint, found none in "
            f"{folder.checkpoints}; begin a new run with another --out and this model or these adapters "
            "(--resume-adapter-file)"
        )
    if checkpoint is None:
        console.note(f"{folder.path}: no checkpoint to go on from; the run begins anew")
        return None
    began = checkpoint.state.record["settings"]
    finished = folder.result is not None or checkpoint.iteration >= began.get("iters", math.inf)
    check_same_settings(began, settings, finished=finished)
    if finished and depends_on_length(settings) and settings.iters > began["iters"]:
        console.note(
            f"--iters: {settings.iters:,} in place of {began['iters']:,}; learning rates go on as those of a "
            "run of this length"
        )
    return checkpoint


def _precision(settings: TrainSettings, checkpoint: Checkpoint | None) -> "StudentPrecision | None":
    """The precision asked for; that of the checkpoint if none is.

    Raises:
        CheckpointError: another one than the run began with.
    """
    began = None if checkpoint is None else checkpoint.precision
    if began is not None and settings.precision not in (None, began):
        raise CheckpointError(
            f"--precision: must be '{began}', as when this run began, found '{settings.precision}'; give the "
            "value of the run, or begin a new one with another --out"
        )
    return began or settings.precision


def prepare_loop(
    settings: TrainSettings,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
    console: Console,
    *,
    world: "World | None" = None,
) -> "Loop":
    """Student, data and distiller, at the beginning or where the checkpoint was written.

    Raises:
        CheckpointError: the checkpoint was made from another student or other data.
        UsageError: the run would not fit into memory.
        IncompatibleError: student and data do not fit.
    """
    import mlx.core as mx

    from pipeline.training.loop import Loop
    from pipeline.training.optimizing import build_optimizer
    from pipeline.training.source import open_source
    from pipeline.training.student import prepare_student
    from pipeline.training.validation import Validator
    from pmetal_distill.distiller import Distiller
    from pmetal_distill.precision import precision_text

    mx.random.seed(settings.seed)
    student = prepare_student(settings, console)
    source = open_source(settings, student, console)
    content = content_of(settings, student, source)
    if checkpoint is not None:
        check_same_content(checkpoint.state.record["content"], content)
    distiller = Distiller(
        source.teacher,
        student,
        distill_config(settings, source.hidden_layers, _precision(settings, checkpoint)),
        optimizer=build_optimizer(settings),
        world=world,
    )
    console.note(f"precision: {precision_text(distiller.precision)}")
    check_memory(settings, source, distiller, console)
    made_from = {"settings": deciding_settings(settings), "content": content}
    validator = Validator(settings, source, distiller)
    loop = Loop(settings, source, distiller, validator, checkpoints, made_from, RunLog(distiller))
    if checkpoint is not None:
        loop.restore(checkpoint)
        console.note(f"going on behind batch {checkpoint.iteration:,} of {settings.iters:,}")
    return loop
