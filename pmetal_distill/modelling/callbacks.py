"""mlx-lm's reporting callbacks, for wandb and swanlab. Importing them costs what mlx_lm costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from schemas.errors import UsageError


def require_services(names: Sequence[str]) -> None:
    """Sees that the packages of the named services, wandb and swanlab, are there.

    Raises:
        UsageError: one is missing.
    """
    from mlx_lm.tuner import callbacks

    for name in names:
        if getattr(callbacks, name) is None:
            raise UsageError(
                f"report_to: the package '{name}' must be installed, found none; run 'pip install {name}', "
                "or leave report_to out: metrics.jsonl is always written"
            )


def reporting_callback(
    names: Sequence[str], *, project_name: str | None, folder: Path, config: Mapping[str, Any]
) -> Any:
    """Begins a run at each service.

    Returns:
        an `mlx_lm.tuner.TrainingCallback`: `on_train_loss_report` and `on_val_loss_report` take a dict with
        the key "iteration".

    Raises:
        UsageError: as `require_services`.
    """
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    require_services(names)
    return get_reporting_callbacks(
        report_to=",".join(names), project_name=project_name, log_dir=str(folder), config=dict(config)
    )
