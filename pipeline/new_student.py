"""Makes students for `init-student`: out of the teacher's parts, or fresh. Costs reading and writing weights.

Measuring layers costs a pass of 2,048 tokens for each layer that is left out, measuring neurons one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.console import Console
from pipeline.settings.checks import check
from schemas.errors import UsageError

if TYPE_CHECKING:
    from pipeline.batching import TokenBatch
    from pmetal_distill.models import LoadedModel

SAMPLE_SEQUENCES, SAMPLE_LENGTH = 4, 512
_MULTIPLE = 32  # of a width that was given as a share: a group of quantized weights


@dataclass(frozen=True, slots=True)
class NewStudent:
    """What the student is to be.

    Attributes:
        teacher: an mlx-lm folder, a hub id or a .gguf file.
        out: folder of the student.
        num_layers: how many layers it keeps.
        keep_layers: instead, which ones.
        by: how `num_layers` are chosen.
        mlp_width: neurons that each MLP keeps, or their share below 1.
        data: text to measure on.
        split: part of it.
        from_config: a config.json, for a fresh student.
        seed: of the fresh student's weights.
        trust_remote_code: run code that comes with the teacher.
    """

    teacher: str
    out: Path
    num_layers: int | None = None
    keep_layers: tuple[int, ...] | None = None
    by: Literal["evenly", "importance"] = "evenly"
    mlp_width: float | None = None
    data: str | None = None
    split: str = "train"
    from_config: Path | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.keep_layers is not None:
            raise UsageError("--num-layers, --layers: at most one must be given, found both; leave one out")
        self._check_width()
        self._check_data()
        parts = (self.num_layers, self.keep_layers, self.mlp_width)
        if self.from_config is not None and any(part is not None for part in parts):
            raise UsageError(
                "--from-config: a fresh student must take its shape from the file, found layers or a width "
                "too; give either"
            )

    def _check_width(self) -> None:
        width = self.mlp_width
        if width is not None:
            holds = 0 < width < 1 or (width >= 1 and width == int(width))
            check(holds, "mlp_width", "a number of neurons or a share below 1", width)

    def _check_data(self) -> None:
        measures = self.by == "importance" or self.mlp_width is not None
        if self.by == "importance" and self.num_layers is None:
            raise UsageError("--by importance: needs to know how many layers to keep; add --num-layers")
        if measures and self.data is None:
            raise UsageError(
                "--by importance, --mlp-width: must have text to measure on, found none; add --data TEXT"
            )
        if self.data is not None and not measures:
            raise UsageError(
                "--data: must be measured on, found nothing to measure; add --by importance or --mlp-width"
            )


def make_student(wanted: NewStudent, console: Console) -> dict[str, Any]:
    """Writes the student.

    Returns:
        where it lies, and what of the teacher it has.

    Raises:
        UsageError: parts that the teacher does not have, or an output folder in use.
        ModelError: the teacher cannot be loaded or cut, or mlx_lm cannot build the configuration.
        DataError: text that cannot be read.
    """
    from pmetal_distill.modelling.folders import require_unused
    from pmetal_distill.models import load_model

    require_unused(wanted.out)
    teacher = load_model(wanted.teacher, trust_remote_code=wanted.trust_remote_code)
    made = _fresh(wanted, teacher) if wanted.from_config is not None else _cut(wanted, teacher, console)
    num_bytes = sum(path.stat().st_size for path in wanted.out.glob("*.safetensors"))
    return {"student": str(wanted.out), "teacher": wanted.teacher, **made, "weights_bytes": num_bytes}


def _fresh(wanted: NewStudent, teacher: "LoadedModel") -> dict[str, Any]:
    from pmetal_distill.modelling.configs import check_config
    from pmetal_distill.plain_files import json_object, open_regular
    from pmetal_distill.students import fresh_student, shared_rows

    assert wanted.from_config is not None
    try:
        with open_regular(wanted.from_config) as file:
            config = json_object(file.read())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{wanted.from_config}: must be a config.json, found {error}; give another"
        ) from error
    if "model_type" not in config:
        raise UsageError(f"{wanted.from_config}: must be a config.json with model_type; give another")
    check_config(config, where=str(wanted.from_config))
    fresh_student(config, teacher.tokenizer, wanted.out, wanted.seed, teacher=teacher)
    return {"layers": config.get("num_hidden_layers"), "embedding_rows": shared_rows(config, teacher)}


def _cut(wanted: NewStudent, teacher: "LoadedModel", console: Console) -> dict[str, Any]:
    from pmetal_distill.students import init_student, largest, neuron_importance

    sample = _sample(wanted, teacher, console)
    layers, width = _layers(wanted, teacher, sample, console), _width(wanted, teacher)
    neurons = None
    if width is not None:
        console.note(f"measuring the neurons of {teacher.num_layers} layers")
        neurons = largest(neuron_importance(teacher, sample), width)
    init_student(teacher, keep_layers=layers, neurons=neurons, out=wanted.out)
    made = {"layers": len(layers), "kept_layers": [layer % teacher.num_layers for layer in layers]}
    return made if width is None else {**made, "mlp_width": width}


def _layers(
    wanted: NewStudent, teacher: "LoadedModel", sample: list["TokenBatch"], console: Console
) -> list[int]:
    from pmetal_distill.students import fitting_layers, influential_layers

    if wanted.keep_layers is not None:
        return list(wanted.keep_layers)
    if wanted.num_layers is None:
        whole = wanted.mlp_width is not None
        return fitting_layers(teacher, teacher.num_layers if whole else max(1, teacher.num_layers // 2))
    if wanted.by == "evenly":
        return fitting_layers(teacher, wanted.num_layers)
    total = max(0, teacher.num_layers - wanted.num_layers)
    with console.progress("measuring", total=total, unit="layers") as progress:
        return influential_layers(teacher, wanted.num_layers, sample, told=lambda layer: progress.advance(1))


def _width(wanted: NewStudent, teacher: "LoadedModel") -> int | None:
    from pmetal_distill.students import mlp_width

    if wanted.mlp_width is None:
        return None
    width = mlp_width(teacher)
    if wanted.mlp_width >= 1:
        return int(wanted.mlp_width)
    return max(1, round(wanted.mlp_width * width / _MULTIPLE)) * _MULTIPLE


def _sample(wanted: NewStudent, teacher: "LoadedModel", console: Console) -> list["TokenBatch"]:
    """A few sequences, evenly spread over the text."""
    import numpy as np

    from pipeline.batching import token_batches
    from pipeline.text import note_skipped, packed_text

    if wanted.data is None:
        return []
    note_skipped(wanted.data, console)
    data = packed_text(wanted.data, teacher, split=wanted.split, max_seq_len=SAMPLE_LENGTH)
    count = min(SAMPLE_SEQUENCES, data.num_sequences)
    numbers = np.linspace(0, data.num_sequences - 1, count).astype(int).tolist()
    return list(token_batches(data, numbers, batch_size=SAMPLE_SEQUENCES))
