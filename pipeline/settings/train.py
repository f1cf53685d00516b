"""Settings of stage two."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipeline.settings.checks import (
    MOST,
    MOST_SEED,
    check,
    check_layers,
    check_whole,
    check_whole_or_none,
    described,
    in_files_only,
)
from pmetal_distill.schedule import AlphaSchedule, TemperatureSchedule
from schemas.errors import UsageError
from schemas.spec import Tail

Loss = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "soft_cross_entropy",
    "total_variation",
    "skewed_forward_kl",
    "skewed_reverse_kl",
]

SERVICES = ("wandb", "swanlab")


@dataclass(frozen=True, slots=True)
class LrSchedule:
    """`lr_schedule` of mlx-lm: a schedule of `mlx.optimizers`, after a linear warm-up.

    Attributes:
        name: e.g. `cosine_decay`.
        arguments: its arguments; the first is the learning rate to start from.
        warmup: optimizer steps of the warm-up.
        warmup_init: learning rate at its beginning.
    """

    name: str
    arguments: tuple[float, ...]
    warmup: int = 0
    warmup_init: float = 0.0

    def __post_init__(self) -> None:
        check(len(self.arguments) > 0, "arguments", "at least the learning rate", list(self.arguments))
        finite = all(-MOST <= value <= MOST for value in self.arguments)
        check(finite, "arguments", f"numbers up to {MOST:,}", list(self.arguments))
        check_whole(self, "warmup", least=0)
        check(0 <= self.warmup_init < math.inf, "warmup_init", "zero or a positive number", self.warmup_init)


@dataclass(frozen=True, slots=True)
class LoraParameters:
    """`lora_parameters` of mlx-lm.

    Attributes:
        rank: of the adapters.
        scale: factor on what they add.
        dropout: share of their input that is dropped in training.
        keys: names of the layers inside a block that get adapters; all linear ones if None.
    """

    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_whole(self, "rank")
        check(0 < self.scale < math.inf, "scale", "a positive number", self.scale)
        check(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Stage two: the student, the loss and the optimizer."""

    foreign_keys: ClassVar[Mapping[str, str]] = {
        "hf_dataset": "download the Parquet files of the data set and give their folder as 'data'",
        "config": "leave it out, a configuration file cannot name another",
    }
    left_out_keys: ClassVar[Mapping[str, str]] = {
        "train": "this command trains",
        "test": "'pmetal-pipeline eval' tests",
        "test_batches": "'pmetal-pipeline eval' tests",
        "clear_cache_threshold": "nothing grows here",
    }

    student: str = field(
        metadata=described("Student: an mlx-lm folder or a hub id.", aliases=("model",), place=True)
    )
    out: Path = field(metadata=described("Folder of the new run.", aliases=("adapter_path",)))
    cache: str | None = field(
        default=None, metadata=described("The cache: a folder, or a URL in object storage.", place=True)
    )
    teacher: str | None = field(
        default=None,
        metadata=described(
            "Instead of a cache: a live teacher that reads 'data' beside the student.", place=True
        ),
    )
    data: str | None = field(
        default=None, metadata=described("Text for a live teacher, as 'cache' takes it.", place=True)
    )
    max_seq_len: int = field(
        default=512,
        metadata=described("Most tokens in a sequence, with a live teacher.", aliases=("max_seq_length",)),
    )
    mask_prompt: bool = field(
        default=False, metadata=described("Train on the assistant's messages only, with a live teacher.")
    )
    fine_tune_type: Literal["full", "lora", "dora"] = field(
        default="full", metadata=described("Train all weights, or low-rank adapters.")
    )
    num_layers: int = field(
        default=-1, metadata=described("Train only so many of the last layers; -1 for all.")
    )
    lora_parameters: LoraParameters = field(
        default_factory=LoraParameters,
        metadata=in_files_only("Of the adapters, with fine_tune_type lora or dora."),
    )
    resume_adapter_file: Path | None = field(
        default=None, metadata=described("Adapters to start from: an adapters.safetensors.")
    )
    fuse: bool = field(default=False, metadata=described("Also write the model with its adapters merged in."))
    loss: Loss = field(default="forward_kl", metadata=described("Divergence between teacher and student."))
    loss_parameter: float | None = field(
        default=None, metadata=described("beta of jensen_shannon, skew of the skewed losses, in (0, 1).")
    )
    temperature: float | TemperatureSchedule = field(
        default=2.0, metadata=described("Softmax temperature of both, > 0; in a file also a schedule.")
    )
    alpha: float | AlphaSchedule = field(
        default=0.5, metadata=described("Share of the divergence; the rest is cross-entropy with the text.")
    )
    tail: Tail | None = field(
        default=None, metadata=described("Use less of the targets than the cache holds.")
    )
    hidden_loss: Literal["mse", "cosine"] | None = field(
        default=None, metadata=described("Loss between hidden states.")
    )
    hidden_layers: tuple[int, ...] | Literal["all"] = field(
        default="all", metadata=described("Teacher layers of the cache to align with: 6,12,-1 or all.")
    )
    hidden_weight: float = field(default=0.1, metadata=described("Weight of the hidden-state loss."))
    optimizer: Literal["adam", "adamw", "muon", "sgd", "adafactor"] = field(
        default="adamw", metadata=described("Optimizer.")
    )
    optimizer_config: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        metadata=in_files_only(
            "Arguments of mlx.optimizers, by optimizer, as in `adamw: {weight_decay: 0.01}`."
        ),
    )
    learning_rate: float = field(default=1e-5, metadata=described("Peak learning rate."))
    lr_schedule: Literal["constant", "cosine"] | LrSchedule = field(
        default="cosine", metadata=described("After the warm-up: constant, or cosine decay to a tenth.")
    )
    warmup: int | None = field(
        default=None, metadata=described("Optimizer steps of the warm-up; a twentieth of all if not given.")
    )
    batch_size: int = field(default=4, metadata=described("Sequences in a batch."))
    iters: int = field(default=1000, metadata=described("Batches to train on."))
    grad_accumulation_steps: int = field(default=1, metadata=described("Batches in an optimizer step."))
    grad_clip: float | None = field(default=1.0, metadata=described("Largest norm of the gradients."))
    head_chunk: int | None = field(
        default=None,
        metadata=described(
            "Positions whose logits exist at once; by vocabulary and device if not given: 64 MiB of them on "
            "the CPU, 512 on a GPU."
        ),
    )
    precision: Literal["mixed", "bfloat16", "float32"] | None = field(
        default=None,
        metadata=described(
            "Types of the weights in training; if not given, mixed (float32 masters, multiplied in bfloat16 "
            "on a GPU) for a student stored in half precision, else float32. It is saved in its own type."
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=described("Type that a live teacher computes in.")
    )
    grad_checkpoint: bool = field(
        default=False, metadata=described("Compute activations twice to keep fewer of them.")
    )
    memory_limit_gb: float | None = field(
        default=None,
        metadata=described("Refuse to start above this estimate; the machine's memory if not given."),
    )
    prefetch: int = field(default=2, metadata=described("Batches read ahead by a thread; 0 for none."))
    steps_per_report: int = field(default=10, metadata=described("Batches between reports."))
    steps_per_eval: int = field(default=200, metadata=described("Batches between evaluations; 0 for none."))
    val_batches: int = field(
        default=25, metadata=described("Batches of held-out sequences in an evaluation; -1 for all.")
    )
    val_share: float = field(
        default=0.0,
        metadata=described("Share of the sequences held out of training for evaluation, below 1."),
    )
    save_every: int = field(default=100, metadata=described("Batches between checkpoints; 0 for none."))
    keep_checkpoints: int = field(
        default=2, metadata=described("Latest checkpoints that are kept, beside the best.")
    )
    resume: bool = field(default=False, metadata=described("Go on with an interrupted run."))
    report_to: str | None = field(
        default=None, metadata=described("Also report to wandb or swanlab, or to both: wandb,swanlab.")
    )
    project_name: str | None = field(default=None, metadata=described("Name of the project there."))
    seed: int = field(default=0, metadata=described("Seed of the order and of new weights."))
    trust_remote_code: bool = field(default=False, metadata=described("Run code that comes with the model."))

    def __post_init__(self) -> None:
        self._check_loss()
        self._check_optimizer()
        check_whole(self, "batch_size iters grad_accumulation_steps")
        check_whole_or_none(self, "head_chunk")
        check_whole(self, "steps_per_report keep_checkpoints")
        check_whole(self, "prefetch steps_per_eval save_every", least=0)
        check_whole(self, "seed", least=0, most=MOST_SEED)
        check_whole(self, "num_layers val_batches", least=-1)
        check_whole(self, "max_seq_len", least=2)
        check(0 <= self.val_share < 1, "val_share", "in [0, 1)", self.val_share)
        if self.memory_limit_gb is not None:
            check(self.memory_limit_gb > 0, "memory_limit_gb", "greater than 0", self.memory_limit_gb)
        for name in self.services:
            check(name in SERVICES, "report_to", " or ".join(SERVICES), name, "correct the name")
        self._check_source()

    @property
    def services(self) -> tuple[str, ...]:
        """The names in `report_to`."""
        return tuple(part.strip().lower() for part in (self.report_to or "").split(",") if part.strip())

    def _check_source(self) -> None:
        if (self.cache is None) == (self.teacher is None):
            found = "neither" if self.cache is None else "both"
            raise UsageError(
                f"cache, teacher: exactly one must be given, found {found}; give the cache's folder"
            )
        if (self.teacher is None) != (self.data is None):
            raise UsageError(
                "teacher, data: must be given together, found one of them; a cache holds its text already"
            )

    def _check_loss(self) -> None:
        if not isinstance(self.temperature, TemperatureSchedule):
            check(0 < self.temperature < math.inf, "temperature", "greater than 0", self.temperature)
        if not isinstance(self.alpha, AlphaSchedule):
            check(0 <= self.alpha <= 1, "alpha", "in [0, 1]", self.alpha)
        if self.loss_parameter is not None:
            check(0 < self.loss_parameter < 1, "loss_parameter", "in (0, 1)", self.loss_parameter)
        check(0 <= self.hidden_weight < math.inf, "hidden_weight", "zero or positive", self.hidden_weight)
        check_layers("hidden_layers", self.hidden_layers)

    def _check_optimizer(self) -> None:
        check(0 < self.learning_rate < math.inf, "learning_rate", "a positive number", self.learning_rate)
        if self.grad_clip is not None:
            check(0 < self.grad_clip < math.inf, "grad_clip", "a positive number", self.grad_clip)
        if self.warmup is not None:
            check_whole(self, "warmup", least=0)
        for name, options in self.optimizer_config.items():
            if "betas" in options:
                must = "two numbers in [0, 1)"
                check(
                    _are_betas(options["betas"]), f"optimizer_config: betas of {name}", must, options["betas"]
                )


def _are_betas(values: Any) -> bool:
    pair = isinstance(values, list | tuple) and len(values) == 2
    return pair and all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1 for v in values)
