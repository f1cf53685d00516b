"""What `eval` is given to judge: a run, its adapters, or any model; and what a run has held out."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from pipeline.config import load_config, resolve
from pipeline.settings import TrainSettings
from pipeline.training.finished import CONFIG, MODEL, TRAINED, check_run
from pipeline.training.holdout import Holdout
from schemas.errors import ModelError, UsageError

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.reader import LogitCache
    from pmetal_distill.precision import TeacherType

Sequences = Literal["held-out", "all"]


def load_subject(
    place: str, *, dtype: "TeacherType" = "auto", trust_remote_code: bool = False
) -> "LoadedModel":
    """The model of a run folder, with its adapters if it is one of LoRA, or any model; in a type by name.

    Raises:
        ModelError: a run that has written no model yet, or a model that cannot be loaded.
        CorruptionError: the model of a finished run is not what the run wrote.
    """
    from pmetal_distill.adapters import load_adapted
    from pmetal_distill.models import load_model

    folder = _model_folder(place)
    if folder is None:
        return load_adapted(place, dtype=dtype, trust_remote_code=trust_remote_code)
    return load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)


@contextmanager
def plain_model(place: str, *, trust_remote_code: bool = False) -> Iterator[Path]:
    """A folder that mlx_lm loads: the subject's own, or a temporary one with adapters merged in.

    Raises:
        ModelError: as `load_subject`.
    """
    from pmetal_distill.adapters import load_adapted, merged_weights
    from pmetal_distill.models import locate_model, save_model

    folder = _model_folder(place)
    if folder is not None:
        yield locate_model(folder)
        return
    adapted = load_adapted(place, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        yield save_model(adapted, Path(scratch) / MODEL, weights=merged_weights(adapted.model))


def _model_folder(place: str) -> str | None:
    """Where the model lies, after it is checked to be what its run wrote; None for adapters."""
    from pmetal_distill.adapters import ADAPTERS

    run = Path(place)
    check_run(run.parent if run.name == MODEL else run, TRAINED)
    if (run / MODEL / "config.json").is_file():
        return str(run / MODEL)
    if (run / ADAPTERS).is_file():
        return None
    if (run / CONFIG).is_file() and not (run / "config.json").exists():
        raise ModelError(
            f"{place}: must hold a trained model, found a run that has written none yet; "
            "finish it with 'pmetal-pipeline train --resume'"
        )
    return place


def run_settings(place: str) -> TrainSettings | None:
    """The settings of a run folder; None for a model.

    Raises:
        UsageError: a damaged `config.yaml`.
    """
    path = Path(place) / CONFIG
    return resolve(TrainSettings, load_config(path, TrainSettings), {}) if path.is_file() else None


def cache_sequences(
    place: str, cache: "LogitCache", wanted: Sequences | None, *, cache_place: str
) -> tuple[npt.NDArray[np.int64], Sequences]:
    """The sequences of a cache to evaluate on, and which they are.

    Args:
        place: what is judged.
        cache: open.
        wanted: None takes those that the run has held out of this very cache, else all.
        cache_place: where the cache lies, as given.

    Raises:
        UsageError: held-out sequences are wanted of a model, or of a run that held none out.
    """
    run = run_settings(place)
    holds_out = run is not None and run.val_share > 0
    if wanted == "held-out" and not holds_out:
        raise UsageError(
            f"--sequences held-out: needs a run that was trained with --val-share, found {place}; "
            "leave it out to read the whole cache"
        )
    own = run is not None and run.cache is not None and _same(run.cache, cache_place)
    if run is None or wanted == "all" or not holds_out or (wanted is None and not own):
        return cache.numbers, "all"
    split = Holdout.of(cache.numbers, share=run.val_share, seed=run.seed, text=cache.text)
    return split.held_out, "held-out"


def _same(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()
