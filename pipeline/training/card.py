"""The model card: what was trained on what, how, how well, and how to use it. Nothing in it is estimated."""

import json
import shlex
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from pipeline.about import installed_version
from pipeline.config import to_plain
from pipeline.settings import TrainSettings

_TAGS = ("mlx", "distillation", "knowledge-distillation", "pmetal-distill")
_SETTINGS = (
    *("loss", "loss_parameter", "temperature", "alpha", "tail", "hidden_loss", "hidden_layers"),
    *("hidden_weight", "fine_tune_type", "num_layers", "lora_parameters", "optimizer", "optimizer_config"),
    *(
        "learning_rate",
        "lr_schedule",
        "warmup",
        "batch_size",
        "iters",
        "grad_accumulation_steps",
        "grad_clip",
    ),
    *("val_share", "seed"),
)
_HIDDEN, _LORA = ("hidden_layers", "hidden_weight"), ("lora_parameters",)
_HELD_OUT = "val_"


class Use(Enum):
    """Where the card stands, as the arguments of `mlx_lm.generate` that load what it describes from there."""

    MODEL_HERE = "--model ."
    MODEL_INSIDE = "--model model"
    ADAPTERS_HERE = "--model {student} --adapter-path ."


def model_card(
    settings: TrainSettings, facts: Mapping[str, str], metrics: Mapping[str, Any], use: Use
) -> str:
    """A card as the Hugging Face hub reads them, in Markdown with YAML in front.

    Args:
        settings: of the run.
        facts: teacher, data and targets by name; empty ones are left out.
        metrics: the run's last ones; numbers are listed as they are.
        use: where the card stands.
    """
    front = {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "base_model": _hub_name(settings.student),
        "base_model_relation": "adapter" if use is Use.ADAPTERS_HERE else "finetune",
        "tags": list(_TAGS),
    }
    teacher = f"`{facts['teacher']}`" if facts.get("teacher") else "its teacher"
    made = f"with pmetal-distill {installed_version('pmetal-distill')}"
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {settings.out.resolve().name}",
            "",
            f"`{settings.student}`, distilled from {teacher} {made}.",
            "",
            *_usage(settings, use),
            "## Data",
            "",
            *_table([("student", settings.student), *((n, v) for n, v in facts.items() if v)]),
            "## Training",
            "",
            *_table(_training(settings)),
            "## Results",
            "",
            *_results(metrics),
        ]
    )


def _usage(settings: TrainSettings, use: Use) -> Iterator[str]:
    path = Path(settings.student).expanduser()
    student = shlex.quote(str(path.resolve())) if path.exists() else settings.student
    arguments = use.value.format(student=student)
    yield from ("In this folder:", "", "```")
    yield f'mlx_lm.generate {arguments} --prompt "Once upon a time"'
    yield from ("```", "")


def _training(settings: TrainSettings) -> Iterator[tuple[str, str]]:
    plain = to_plain(settings)
    for name in _SETTINGS:
        unused = (name in _HIDDEN and settings.hidden_loss is None) or (
            name in _LORA and settings.fine_tune_type == "full"
        )
        value = plain[name]
        if not unused and value is not None and value != {}:
            yield name, value if isinstance(value, str) else json.dumps(value)


def _results(metrics: Mapping[str, Any]) -> Iterator[str]:
    numbers = {name: value for name, value in metrics.items() if type(value) in (int, float)}
    if not numbers:
        yield from ("None were measured.", "")
        return
    held_out = any(name.startswith(_HELD_OUT) for name in numbers)
    yield "Measured on training text while training" + (
        f"; those with `{_HELD_OUT}` on text held out of it." if held_out else "."
    )
    yield ""
    yield from _table((name, _number(value)) for name, value in numbers.items())


def _table(rows: Any) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    for name, value in rows:
        yield f"| {name} | {_cell(value)} |"
    yield ""


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _hub_name(student: str) -> str:
    """A hub id as it is; of a local folder its name, for where it lies means nothing elsewhere."""
    path = Path(student).expanduser()
    return path.resolve().name if path.exists() else student
