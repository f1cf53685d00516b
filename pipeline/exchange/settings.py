"""Settings of `import`."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.settings.checks import check, check_whole, described
from schemas.spec import Tail

Format = Literal["vllm", "openai", "distillkit", "dwq", "dense"]
FORMATS: tuple[Format, ...] = ("vllm", "openai", "distillkit", "dwq", "dense")


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """What is imported, and how it is kept."""

    format: Format
    source: Path
    out: Path = field(metadata=described("Folder of the new cache."))
    tokenizer: Path = field(metadata=described("The teacher's model folder, or its tokenizer files alone."))
    teacher_name: str = field(metadata=described("What the teacher is called; nothing here can verify it."))
    vocab_size: int | None = field(
        default=None,
        metadata=described("Number of the teacher's logits; from config.json or the tokenizer if not given."),
    )
    top_k: int | None = field(
        default=None,
        metadata=described("Entries kept per position; if not given, all that the source has (dense: 16)."),
    )
    tail: Tail | None = field(
        default=None,
        metadata=described(
            "What is kept of the other tokens; if not given, the most that the source tells: 'sketch' of "
            "logits, 'bucket' (their mass) of log-probabilities, 'none' of lists without a known total."
        ),
    )
    tokens: Path | None = field(
        default=None,
        metadata=described("Token ids that the source lacks: .npy beside dense .npy, .jsonl for dwq."),
    )
    compression_config: Path | None = field(
        default=None, metadata=described("distillkit: YAML of the compression, if not beside the data.")
    )
    sketch_rank: int = field(default=256, metadata=described("dense: rank of the tail sketch."))
    sketch_step: float = field(default=60.0, metadata=described("dense: rounding step of the sketch."))
    calibration_tokens: int = field(
        default=16384, metadata=described("dense: positions that the sketch is fitted on, as memory allows.")
    )
    sequences_per_shard: int = field(
        default=64, metadata=described("Sequences in a shard, the unit of resuming.")
    )
    resume: bool = field(default=False, metadata=described("Go on with an unfinished import."))
    trust_remote_code: bool = field(
        default=False, metadata=described("Run code that comes with the tokenizer.")
    )

    def __post_init__(self) -> None:
        check_whole(self, "sketch_rank calibration_tokens sequences_per_shard")
        for name in ("top_k", "vocab_size"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, "at least 1", value)
        check(0 < self.sketch_step < math.inf, "sketch_step", "a positive number", self.sketch_step)
        check(bool(self.teacher_name.strip()), "teacher_name", "a name", self.teacher_name)
        check(len(self.teacher_name) <= 200, "teacher_name", "at most 200 characters", self.teacher_name[:40])
        if self.format != "dense":
            check(
                self.tail != "sketch",
                "tail",
                "'bucket' or 'none' without the logits of all tokens",
                self.tail,
                "import dense logits for a sketch",
            )
