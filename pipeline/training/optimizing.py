"""The optimizer and its learning-rate schedule, from settings. Steps are optimizer updates, not batches."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from pipeline.settings import LrSchedule, TrainSettings
from schemas.errors import UsageError

Schedule = Callable[[mx.array], mx.array]
_CLASSES = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
_FINAL_SHARE = 0.1
# Without it MLX's first Adam steps are three times the learning rate, which short runs do not survive.
_DEFAULTS: dict[str, dict[str, Any]] = {"adam": {"bias_correction": True}, "adamw": {"bias_correction": True}}


def build_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """The optimizer that `settings` name, with its schedule.

    Raises:
        UsageError: an option in `optimizer_config` or a schedule that MLX does not know.
    """
    options = {
        **_DEFAULTS.get(settings.optimizer, {}),
        **settings.optimizer_config.get(settings.optimizer, {}),
    }
    try:
        optimizer: optim.Optimizer = _CLASSES[settings.optimizer](
            learning_rate=learning_rate(settings), **options
        )
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"optimizer_config: {settings.optimizer} must get options it knows, found "
            f"{sorted(options)} ({error}); "
            "see mlx.optimizers"
        ) from error
    return optimizer


def learning_rate(settings: TrainSettings) -> Schedule | float:
    """Learning rate by optimizer step: a linear warm-up, then the schedule."""
    updates = max(1, settings.iters // settings.grad_accumulation_steps)
    if isinstance(settings.lr_schedule, LrSchedule):
        return _from_mlx_lm(settings.lr_schedule)
    warmup = max(1, updates // 20) if settings.warmup is None else settings.warmup
    peak = settings.learning_rate
    if settings.lr_schedule == "constant":
        return _warmed_up(lambda step: mx.array(peak), peak, warmup) if warmup else peak
    decay = optim.cosine_decay(peak, max(1, updates - warmup), peak * _FINAL_SHARE)
    return _warmed_up(decay, peak, warmup)


def _from_mlx_lm(schedule: LrSchedule) -> Schedule:
    make: Any = getattr(optim, schedule.name, None)
    if schedule.name.startswith("_") or not callable(make):
        raise UsageError(
            f"lr_schedule: name must be a schedule of mlx.optimizers, found "
            f"{schedule.name!r}; try cosine_decay"
        )
    try:
        decay = make(*schedule.arguments)
    except TypeError as error:
        raise UsageError(
            f"lr_schedule: {schedule.name} must get the arguments it takes, found "
            f"{list(schedule.arguments)} ({error}); see mlx.optimizers"
        ) from error
    return _warmed_up(decay, schedule.arguments[0], schedule.warmup, schedule.warmup_init)


def _warmed_up(decay: Schedule, peak: float, warmup: int, start: float = 0.0) -> Schedule:
    if warmup == 0:
        return decay
    # The first update must not have learning rate 0: begin one step into the ramp.
    first = start + (peak - start) / (warmup + 1)
    ramp = optim.linear_schedule(first, peak, warmup)
    joined: Schedule = optim.join_schedules([ramp, decay], [warmup])
    return joined
