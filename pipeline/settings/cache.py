"""Settings of stage one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pipeline.settings.checks import (
    MOST_SEED,
    check,
    check_layers,
    check_whole,
    check_whole_or_none,
    described,
)
from schemas.spec import Tail

USUAL_RANK = 256


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Stage one: what the teacher is asked, and how its answers are kept."""

    foreign_keys: ClassVar[Mapping[str, str]] = {
        "hf_dataset": "download the Parquet files of the data set and give their folder as 'data'",
        "train": "name the part of the data with 'split'",
        "test": "name the part of the data with 'split'",
    }

    teacher: str = field(
        metadata=described(
            "Teacher: an mlx-lm folder, a hub id or a .gguf file.", aliases=("model",), place=True
        )
    )
    data: str = field(
        metadata=described(
            "Text: a file or folder of .jsonl, .json, .csv (also .gz, .jsonl.zst), .parquet or .txt.",
            place=True,
        )
    )
    out: Path = field(metadata=described("Folder of the new cache."))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata=described(
            "Type that the teacher computes in; auto: float32 on a CPU, else its own if that is half "
            "precision, else bfloat16."
        ),
    )
    split: Literal["train", "valid", "test"] = field(
        default="train", metadata=described("Which part of a folder that has several.")
    )
    max_seq_len: int = field(
        default=512, metadata=described("Most tokens in a sequence.", aliases=("max_seq_length",))
    )
    batch_size: int = field(default=8, metadata=described("Sequences that the teacher reads at once."))
    top_k: int = field(
        default=16, metadata=described("Tokens per position whose probabilities are kept one by one.")
    )
    tail: Tail = field(
        default="sketch",
        metadata=described("What is kept of the other tokens: their shape, their mass, or nothing."),
    )
    sketch_rank: int | None = field(
        default=None,
        metadata=described(
            "Rank of the tail sketch: more is closer and slower. 256, or what a narrower teacher allows, if "
            "it is not given."
        ),
    )
    sketch_step: float = field(
        default=60.0, metadata=described("Rounding step of the sketch: less is closer and larger.")
    )
    calibration_tokens: int = field(
        default=16384, metadata=described("Positions that the sketch is fitted on.")
    )
    hidden_layers: tuple[int, ...] | Literal["all"] = field(
        default=(), metadata=described("Teacher layers whose outputs are kept too: 6,12,-1 or all.")
    )
    hidden_rank: int = field(
        default=0,
        metadata=described("Keep only so many PCA coordinates of each hidden state; 0 keeps all of it."),
    )
    mask_prompt: bool = field(default=False, metadata=described("Train on the assistant's messages only."))
    pack: bool = field(default=True, metadata=described("Put several short documents into a sequence."))
    text_feature: str = field(default="text", metadata=described("Column that holds plain text."))
    prompt_feature: str = field(default="prompt", metadata=described("Column that holds prompts."))
    completion_feature: str = field(
        default="completion", metadata=described("Column that holds completions.")
    )
    chat_feature: str = field(default="messages", metadata=described("Column that holds chats."))
    sequences_per_shard: int = field(
        default=64, metadata=described("Sequences in a shard, the unit of resuming.")
    )
    zstd_level: int = field(default=1, metadata=described("zstd level of the shards, 1 to 22."))
    head_chunk: int | None = field(
        default=None,
        metadata=described(
            "Positions whose logits exist at once; 256, or on a GPU what takes a gigabyte, if not given."
        ),
    )
    seed: int = field(default=0, metadata=described("Seed of the calibration sample."))
    resume: bool = field(default=False, metadata=described("Go on with an unfinished cache."))
    sharded: bool = field(
        default=False, metadata=described("Under mlx.launch: split the teacher over the processes.")
    )
    trust_remote_code: bool = field(default=False, metadata=described("Run code that comes with the model."))

    def __post_init__(self) -> None:
        check_whole(self, "max_seq_len", least=2)
        check_whole(self, "batch_size top_k sequences_per_shard")
        check_whole_or_none(self, "head_chunk sketch_rank")
        check_whole(self, "hidden_rank", least=0)
        check_whole(self, "seed", least=0, most=MOST_SEED)
        check(1 <= self.zstd_level <= 22, "zstd_level", "from 1 to 22", self.zstd_level)
        check(0 < self.sketch_step < math.inf, "sketch_step", "a positive number", self.sketch_step)
        check_layers("hidden_layers", self.hidden_layers)
        check(
            bool(self.hidden_layers) or not self.hidden_rank,
            "hidden_rank",
            "0 without hidden layers",
            self.hidden_rank,
            "name the layers by hidden_layers, or all",
        )
        if self.tail == "sketch":
            check(
                self.calibration_tokens >= self.rank,
                "calibration_tokens",
                f"at least sketch_rank = {self.rank}",
                self.calibration_tokens,
                "give more calibration tokens or a smaller rank",
            )

    @property
    def rank(self) -> int:
        """The rank that was given, or the usual one."""
        return USUAL_RANK if self.sketch_rank is None else self.sketch_rank
