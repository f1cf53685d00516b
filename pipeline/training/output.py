"""What a run leaves: a model folder, adapters in mlx-lm's files, or both, with a card. Costs the writing."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import to_plain
from pipeline.settings import TrainSettings
from pipeline.training.card import Use, model_card
from pipeline.training.finished import CARD, MODEL
from pipeline.training.student import adapter_spec

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel

_OF_MLX_LM = (
    *("optimizer", "optimizer_config", "data", "seed", "batch_size", "iters", "val_batches", "learning_rate"),
    *("steps_per_report", "steps_per_eval", "resume_adapter_file", "save_every", "grad_checkpoint"),
    *("grad_accumulation_steps", "mask_prompt", "report_to", "project_name", "trust_remote_code"),
)


def write_outputs(
    settings: TrainSettings, student: "LoadedModel", source: Any, metrics: Mapping[str, Any]
) -> dict[str, str]:
    """Writes what was trained into the run's folder, over what an earlier part of the run has written.

    Full fine-tuning gives `model/`, a folder that mlx_lm loads. Adapters give `adapters.safetensors` and
    `adapter_config.json` as `mlx_lm.lora` writes them, and with `fuse` also `model/` with adapters merged in.

    Args:
        settings: of the run; `out` exists.
        student: as trained; it is not changed.
        source: its `describe()` says what the teacher and the data were.
        metrics: the last ones.

    Returns:
        what was written -> where: "model", "adapters", "card".
    """
    from pmetal_distill.adapters import save_adapters

    out, written = settings.out, {}
    facts: dict[str, str] = source.describe()
    if settings.fine_tune_type != "full":
        save_adapters(student.model, out, adapter_config(settings, student.num_layers))
        written["adapters"] = str(out)
    if settings.fine_tune_type == "full" or settings.fuse:
        weights = None if settings.fine_tune_type == "full" else _merged(settings, student, out)
        card = model_card(settings, facts, metrics, Use.MODEL_HERE)
        written["model"] = str(_write_model(student, out / MODEL, card, weights))
    use = Use.MODEL_INSIDE if "model" in written else Use.ADAPTERS_HERE
    (out / CARD).write_text(model_card(settings, facts, metrics, use), encoding="utf-8")
    return {**written, "card": str(out / CARD)}


def _merged(settings: TrainSettings, student: "LoadedModel", folder: Path) -> Mapping[str, Any]:
    """The model with the adapters of `folder` merged in; read again, as training may have rounded it."""
    from pmetal_distill.adapters import load_adapted, merged_weights
    from pmetal_distill.precision import dtype_name, main_type

    dtype: Any = dtype_name(main_type(student.stored))
    adapted = load_adapted(folder, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    return merged_weights(adapted.model)


def adapter_config(settings: TrainSettings, num_blocks: int) -> dict[str, Any]:
    """`adapter_config.json`: the settings that mlx_lm.lora has too, under its names."""
    spec = adapter_spec(settings, num_blocks)
    assert spec is not None
    plain = to_plain(settings)
    return {
        **{name: plain[name] for name in _OF_MLX_LM},
        "adapter_path": plain["out"],
        "max_seq_length": plain["max_seq_len"],
        "model": settings.student,
        "train": True,
        **spec.config(),
    }


def _write_model(student: "LoadedModel", folder: Path, card: str, weights: Mapping[str, Any] | None) -> Path:
    """Writes beside the old folder before it goes."""
    from pmetal_distill.models import save_model

    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    save_model(student, draft, weights=weights)
    (draft / CARD).write_text(card, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    return draft.rename(folder)
