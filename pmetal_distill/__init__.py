"""pmetal_distill: the library under the pipeline.

    config = DistillConfig(temperature=2.0, alpha=0.5)
    distiller = Distiller(teacher, student, config)      # teacher: a live model, or a LogitCache
    for batch in dataloader:
        loss = distiller.step(batch)

Importing it costs one dlopen (see `_blas`) and claims the name `schemas` (see `_own_packages`).
The public names below are imported with MLX on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pmetal_distill import _blas, _own_packages

if TYPE_CHECKING:
    from pmetal_distill.config import DistillConfig
    from pmetal_distill.distiller import Distiller
    from pmetal_distill.losses import Divergence, HiddenStateLoss, LossParts
    from pmetal_distill.losses.named import JensenShannonLoss, KLDivergenceLoss, SoftCrossEntropyLoss
    from pmetal_distill.models import LoadedModel, load_model, save_model
    from pmetal_distill.offline.reader import LogitCache
    from pmetal_distill.schedule import AlphaSchedule, TemperatureSchedule
    from pmetal_distill.students import init_student
    from pmetal_distill.target import TeacherTarget

_own_packages.claim("schemas")
BLAS = _blas.preload()

_PLACES = {
    "AlphaSchedule": "pmetal_distill.schedule",
    "DistillConfig": "pmetal_distill.config",
    "Distiller": "pmetal_distill.distiller",
    "Divergence": "pmetal_distill.losses",
    "HiddenStateLoss": "pmetal_distill.losses",
    "JensenShannonLoss": "pmetal_distill.losses.named",
    "KLDivergenceLoss": "pmetal_distill.losses.named",
    "LoadedModel": "pmetal_distill.models",
    "LogitCache": "pmetal_distill.offline.reader",
    "LossParts": "pmetal_distill.losses",
    "SoftCrossEntropyLoss": "pmetal_distill.losses.named",
    "TeacherTarget": "pmetal_distill.target",
    "TemperatureSchedule": "pmetal_distill.schedule",
    "init_student": "pmetal_distill.students",
    "load_model": "pmetal_distill.models",
    "save_model": "pmetal_distill.models",
}

__all__ = [
    "AlphaSchedule",
    "DistillConfig",
    "Distiller",
    "Divergence",
    "HiddenStateLoss",
    "JensenShannonLoss",
    "KLDivergenceLoss",
    "LoadedModel",
    "LogitCache",
    "LossParts",
    "SoftCrossEntropyLoss",
    "TeacherTarget",
    "TemperatureSchedule",
    "init_student",
    "load_model",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pmetal_distill' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
