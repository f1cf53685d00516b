"""The settings of both stages. Every default stands here and nowhere else; every value is checked here.

Keys are those of `mlx_lm.lora` where it has them; `metadata["help"]` is the text of the command-line option.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

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


def _help(text: str, *, aliases: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"help": text, "aliases": aliases}


def _check(holds: bool, name: str, must: str, found: object, do: str = "give another value") -> None:
    if not holds:
        raise UsageError(f"{name}: must be {must}, found {found!r}; {do}")


def _check_whole(settings: Any, names: str, *, least: int = 1) -> None:
    for name in names.split():
        _check(getattr(settings, name) >= least, name, f"at least {least}", getattr(settings, name))


def _check_layers(name: str, layers: tuple[int, ...] | str) -> None:
    distinct = len(set(layers)) == len(layers) or layers == "all"
    _check(distinct, name, "distinct layers", layers, "name each layer once")


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Stage one: what the teacher is asked, and how its answers are kept."""

    foreign_keys: ClassVar[Mapping[str, str]] = {
        "hf_dataset": "download the Parquet files of the data set and give their folder as 'data'",
        "train": "name the part of the data with 'split'",
        "test": "name the part of the data with 'split'",
    }

    teacher: str = field(
        metadata=_help("Teacher: an mlx-lm folder, a hub id or a .gguf file.", aliases=("model",))
    )
    data: str = field(metadata=_help("Text: a file or folder of .jsonl, .jsonl.zst, .parquet or .txt."))
    out: Path = field(metadata=_help("Folder of the new cache."))
    split: Literal["train", "valid", "test"] = field(
        default="train", metadata=_help("Which part of a folder that has several.")
    )
    max_seq_len: int = field(
        default=512, metadata=_help("Most tokens in a sequence.", aliases=("max_seq_length",))
    )
    batch_size: int = field(default=8, metadata=_help("Sequences that the teacher reads at once."))
    top_k: int = field(
        default=16, metadata=_help("Tokens per position whose probabilities are kept one by one.")
    )
    tail: Tail = field(
        default="sketch",
        metadata=_help("What is kept of the other tokens: their shape, their mass, or nothing."),
    )
    sketch_rank: int = field(
        default=256, metadata=_help("Rank of the tail sketch: more is closer and slower.")
    )
    sketch_step: float = field(
        default=60.0, metadata=_help("Rounding step of the sketch: less is closer and larger.")
    )
    calibration_tokens: int = field(default=16384, metadata=_help("Positions that the sketch is fitted on."))
    hidden_layers: tuple[int, ...] | Literal["all"] = field(
        default=(), metadata=_help("Teacher layers whose outputs are kept too: 6,12,-1 or all.")
    )
    mask_prompt: bool = field(default=False, metadata=_help("Leave prompts out of the training."))
    pack: bool = field(default=True, metadata=_help("Put several short documents into a sequence."))
    text_feature: str = field(default="text", metadata=_help("Column that holds plain text."))
    prompt_feature: str = field(default="prompt", metadata=_help("Column that holds prompts."))
    completion_feature: str = field(default="completion", metadata=_help("Column that holds completions."))
    chat_feature: str = field(default="messages", metadata=_help("Column that holds chats."))
    sequences_per_shard: int = field(
        default=64, metadata=_help("Sequences in a shard, the unit of resuming.")
    )
    zstd_level: int = field(default=1, metadata=_help("zstd level of the shards, 1 to 22."))
    head_chunk: int = field(default=256, metadata=_help("Positions whose logits exist at once."))
    seed: int = field(default=0, metadata=_help("Seed of the calibration sample."))
    resume: bool = field(default=False, metadata=_help("Go on with an unfinished cache."))
    trust_remote_code: bool = field(default=False, metadata=_help("Run code that comes with the model."))

    def __post_init__(self) -> None:
        _check_whole(self, "max_seq_len", least=2)
        _check_whole(self, "batch_size top_k sketch_rank sequences_per_shard head_chunk")
        _check_whole(self, "seed", least=0)
        _check(1 <= self.zstd_level <= 22, "zstd_level", "from 1 to 22", self.zstd_level)
        _check(0 < self.sketch_step < math.inf, "sketch_step", "a positive number", self.sketch_step)
        _check_layers("hidden_layers", self.hidden_layers)
        if self.tail == "sketch":
            _check(
                self.calibration_tokens >= self.sketch_rank,
                "calibration_tokens",
                f"at least sketch_rank = {self.sketch_rank}",
                self.calibration_tokens,
                "give more calibration tokens or a smaller rank",
            )


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
        _check(len(self.arguments) > 0, "arguments", "at least the learning rate", list(self.arguments))
        _check_whole(self, "warmup", least=0)
        _check(0 <= self.warmup_init < math.inf, "warmup_init", "zero or a positive number", self.warmup_init)


@dataclass(frozen=True, slots=True)
class Ramp:
    """A value that changes over the optimizer steps and stays at its end.

    Attributes:
        schedule: how it goes from start to end.
        start: value at step 0.
        end: value at step `steps` and after.
        steps: length of the change.
    """

    schedule: Literal["linear", "cosine", "exponential"]
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_whole(self, "steps")
        if self.schedule == "exponential":
            _check(min(self.start, self.end) > 0, "start and end", "positive", (self.start, self.end))


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Stage two: the student, the loss and the optimizer."""

    foreign_keys: ClassVar[Mapping[str, str]] = {
        "data": "the cache holds the text; give its folder as 'cache'",
        "mask_prompt": "the cache holds the masks; give it to 'pmetal-pipeline cache'",
        "hf_dataset": "the cache holds the text; give its folder as 'cache'",
        "train": "leave it out, this command trains",
        "test": "run 'pmetal-pipeline eval' afterwards",
        "test_batches": "run 'pmetal-pipeline eval' afterwards",
        "resume_adapter_file": "leave it out, a run starts from the student as it is",
        "fine_tune_type": "leave it out, all weights are trained",
        "num_layers": "leave it out, all layers are trained",
        "lora_parameters": "leave it out, all weights are trained",
        "max_seq_length": "the cache holds the sequences; give it to 'pmetal-pipeline cache'",
        "grad_checkpoint": "leave it out; a smaller batch_size needs less memory",
        "val_batches": "run 'pmetal-pipeline eval' afterwards",
        "steps_per_eval": "run 'pmetal-pipeline eval' afterwards",
        "save_every": "leave it out, the model is saved at the end",
        "report_to": "read metrics.jsonl in the run's folder",
        "project_name": "read metrics.jsonl in the run's folder",
        "clear_cache_threshold": "leave it out, nothing grows here",
        "config": "leave it out, a configuration file cannot name another",
    }

    student: str = field(metadata=_help("Student: an mlx-lm folder or a hub id.", aliases=("model",)))
    cache: Path = field(metadata=_help("Folder of the cache."))
    out: Path = field(metadata=_help("Folder of the new run.", aliases=("adapter_path",)))
    loss: Loss = field(default="forward_kl", metadata=_help("Divergence between teacher and student."))
    loss_parameter: float | None = field(
        default=None, metadata=_help("beta of jensen_shannon, skew of the skewed losses, in (0, 1).")
    )
    temperature: float | Ramp = field(default=2.0, metadata=_help("Softmax temperature of both, > 0."))
    alpha: float | Ramp = field(
        default=0.5, metadata=_help("Share of the divergence; the rest is cross-entropy with the text.")
    )
    tail: Tail | None = field(default=None, metadata=_help("Use less of the targets than the cache holds."))
    hidden_loss: Literal["mse", "cosine"] | None = field(
        default=None, metadata=_help("Loss between hidden states.")
    )
    hidden_layers: tuple[int, ...] | Literal["all"] = field(
        default="all", metadata=_help("Teacher layers of the cache to align with: 6,12,-1 or all.")
    )
    hidden_weight: float = field(default=0.1, metadata=_help("Weight of the hidden-state loss."))
    optimizer: Literal["adam", "adamw", "muon", "sgd", "adafactor"] = field(
        default="adamw", metadata=_help("Optimizer.")
    )
    optimizer_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    learning_rate: float = field(default=1e-5, metadata=_help("Peak learning rate."))
    lr_schedule: Literal["constant", "cosine"] | LrSchedule = field(
        default="cosine", metadata=_help("After the warm-up: constant, or cosine decay to a tenth.")
    )
    warmup: int | None = field(
        default=None, metadata=_help("Optimizer steps of the warm-up; a twentieth of all if not given.")
    )
    batch_size: int = field(default=4, metadata=_help("Sequences in a batch."))
    iters: int = field(default=1000, metadata=_help("Batches to train on."))
    grad_accumulation_steps: int = field(default=1, metadata=_help("Batches in an optimizer step."))
    grad_clip: float | None = field(default=1.0, metadata=_help("Largest norm of the gradients."))
    head_chunk: int = field(default=256, metadata=_help("Positions whose logits exist at once."))
    steps_per_report: int = field(default=10, metadata=_help("Batches between reports."))
    seed: int = field(default=0, metadata=_help("Seed of the order and of new weights."))
    trust_remote_code: bool = field(default=False, metadata=_help("Run code that comes with the model."))

    def __post_init__(self) -> None:
        self._check_loss()
        self._check_optimizer()
        _check_whole(self, "batch_size iters grad_accumulation_steps head_chunk")
        _check_whole(self, "steps_per_report")
        _check_whole(self, "seed", least=0)

    def _check_loss(self) -> None:
        for value in _values(self.temperature):
            _check(0 < value < math.inf, "temperature", "greater than 0", value)
        for value in _values(self.alpha):
            _check(0 <= value <= 1, "alpha", "in [0, 1]", value)
        if self.loss_parameter is not None:
            _check(0 < self.loss_parameter < 1, "loss_parameter", "in (0, 1)", self.loss_parameter)
        _check(0 <= self.hidden_weight < math.inf, "hidden_weight", "zero or positive", self.hidden_weight)
        _check_layers("hidden_layers", self.hidden_layers)

    def _check_optimizer(self) -> None:
        _check(0 < self.learning_rate < math.inf, "learning_rate", "a positive number", self.learning_rate)
        if self.grad_clip is not None:
            _check(0 < self.grad_clip < math.inf, "grad_clip", "a positive number", self.grad_clip)
        if self.warmup is not None:
            _check_whole(self, "warmup", least=0)


def _values(setting: float | Ramp) -> tuple[float, ...]:
    return (setting.start, setting.end) if isinstance(setting, Ramp) else (setting,)
