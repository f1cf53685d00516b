"""The settings of the command as those of the library."""

from typing import TYPE_CHECKING

from pipeline.settings import TrainSettings

if TYPE_CHECKING:
    from pmetal_distill.config import DistillConfig
    from pmetal_distill.precision import StudentPrecision


def distill_config(
    settings: TrainSettings, layers: tuple[int, ...], precision: "StudentPrecision | None" = None
) -> "DistillConfig":
    """The library's settings out of the command's; `precision` as the run began with."""
    from pmetal_distill.config import DistillConfig
    from pmetal_distill.losses.hidden import HiddenStateLoss

    return DistillConfig(
        temperature=settings.temperature,
        alpha=settings.alpha,
        loss=settings.loss,
        loss_parameter=settings.loss_parameter,
        hidden_loss=HiddenStateLoss(settings.hidden_loss) if settings.hidden_loss else None,
        hidden_layers=layers,
        hidden_weight=settings.hidden_weight,
        accumulation_steps=settings.grad_accumulation_steps,
        max_grad_norm=settings.grad_clip,
        chunk_tokens=settings.head_chunk,
        precision=precision,
    )
