"""Compiled steps on CUDA without waiting for a compiler: another process builds their kernels meanwhile.

A compiled step is some forty kernels of MLX, built one after the other at the first step: minutes on a
machine that has none of them, against a gain of a third of each step (H100, SmolLM2-135M,
docs/precision.md). So a run begins with plain steps, a child process takes a few compiled ones with the
same settings, student and cache, and the run goes over to compiled steps when the child is done. What it
built stays in `kernel_folder`: the next run with these settings compiles at once. Both kinds of step are
the same arithmetic and differ by rounding (after 40 steps in bfloat16 on an H100: losses of 1.1913 and
1.1914).

The child costs as much of the GPU's memory as the run, for a few steps; where that is not there, steps stay
plain. It ends with its parent.

    python -m pipeline.training.compiling SETTINGS MARK        what the child does
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from pipeline.about import installed_version
from pipeline.config import load_config, save_config
from pipeline.settings import TrainSettings
from pipeline.training.identity import deciding_settings
from pmetal_distill.device import on_cuda

if TYPE_CHECKING:
    from pmetal_distill.distiller import Distiller

WORTH_STEPS = 100
STEPS = 3  # batches with and without documents to keep apart, and of two lengths
SETTINGS = "settings.yaml"


@dataclass(slots=True, eq=False)
class CompilingAhead:
    """A child that builds kernels, while the run takes plain steps.

    Attributes:
        distiller: of the run; is told to compile when the child is done.
        process: the child.
        mark: the file that says it is done.
        scratch: its settings.
    """

    distiller: "Distiller"
    process: "subprocess.Popen[bytes]"
    mark: Path
    scratch: "tempfile.TemporaryDirectory[str]"

    def look(self) -> bool:
        """Compiles from now on if the child is done; whether that happened now."""
        if self.process.poll() is None or self.distiller.compiles:
            return False
        if self.mark.exists():
            self.distiller.compile_steps()
        return self.distiller.compiles

    def stop(self) -> None:
        """Ends the child; what it has built so far stays."""
        self.process.kill()
        self.process.communicate()
        self.scratch.cleanup()


def compile_ahead(
    settings: TrainSettings, distiller: "Distiller", steps: int, *, content: Any, room: Callable[[], bool]
) -> CompilingAhead | None:
    """Compiles now if the kernels are there, else has them built; None where nothing is to be waited for.

    Args:
        settings: of the run.
        distiller: of the run.
        steps: that are left.
        content: hashes of what the run is made from.
        room: says whether the GPU's memory has room for a second student.
    """
    from pmetal_distill.kernel_folder import kernel_folder

    folder = kernel_folder()
    if folder is None or not on_cuda() or distiller.compiles or steps < WORTH_STEPS:
        return None
    mark = folder / f"steps-{_form(settings, distiller, content)}"
    if mark.exists():
        distiller.compile_steps()
        return None
    if not room() or settings.cache is None or not distiller.world.leads:
        return None
    scratch = tempfile.TemporaryDirectory(prefix="pmetal-")
    file = Path(scratch.name) / SETTINGS
    precision = distiller.precision.name
    save_config(replace(settings, resume=False, out=Path(scratch.name) / "run", precision=precision), file)
    command = [sys.executable, "-m", "pipeline.training.compiling", str(file), str(mark)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return CompilingAhead(distiller, subprocess.Popen(command, stdin=subprocess.PIPE, **quiet), mark, scratch)


def _form(settings: TrainSettings, distiller: "Distiller", content: Any) -> str:
    """What decides the kernels of a step, and more: numbers of the settings are constants in them."""
    decides = [
        installed_version("pmetal-distill"),
        deciding_settings(settings),
        distiller.precision.describe(),
        distiller.student.config,
        content,
    ]
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def build_kernels(settings: TrainSettings) -> None:
    """Takes a few compiled steps and forgets them."""
    from pipeline.console import Console
    from pipeline.training.config import distill_config
    from pipeline.training.optimizing import build_optimizer
    from pipeline.training.source import open_source
    from pipeline.training.student import prepare_student
    from pmetal_distill.distiller import Distiller

    console = Console(quiet=True)
    student = prepare_student(settings, console)
    source = open_source(settings, student, console)
    config = replace(distill_config(settings, source.hidden_layers, settings.precision), compiled=True)
    distiller = Distiller(source.teacher, student, config, optimizer=build_optimizer(settings))
    with source.batches(batch_size=settings.batch_size, seed=settings.seed, prefetch=0) as batches:
        for _ in range(STEPS * settings.grad_accumulation_steps):
            distiller.step(next(batches))


def _end_with_parent() -> None:
    """The parent holds the other end of stdin, whatever becomes of it."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _child(file: str, mark: str) -> None:
    from pipeline.cli import prepare_process
    from pipeline.training.run import limit_queued_memory

    _end_with_parent()
    prepare_process(())
    with suppress(OSError):
        os.nice(10)
    limit_queued_memory()
    build_kernels(TrainSettings(**load_config(Path(file), TrainSettings)))
    Path(mark).touch()


if __name__ == "__main__":
    _child(*sys.argv[1:3])
