"""How much memory a run will take, before it starts. Costs nothing: sizes are counted, nothing is made.

    weights + their copies in the type they are multiplied in + optimizer + gradients (twice with
    accumulation) + activations + head + a live teacher

Activations of a token in a block: `a` times the widths of inputs and outputs of its linear layers, and `b`
times heads x sequence length for the attention. `benchmarks/memory.py` measured both, on Llama blocks, and
shows that the estimate is within a factor of two of MLX's peak.
"""

import os
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

from pipeline.console import Console
from pipeline.settings import TrainSettings
from pmetal_distill.device import on_cpu
from schemas.errors import UsageError

if TYPE_CHECKING:
    from pipeline.training.source import Source
    from pmetal_distill.distiller import Distiller
    from pmetal_distill.models import LoadedModel

GB = 1e9
PADDING = 32
SAFE_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Factors:
    """Of a kind of run.

    Attributes:
        widths: `a`.
        attention: `b`.
        blocks: whose activations exist at once where they are recomputed.
        chunks: of logits at once.
    """

    widths: float
    attention: float
    blocks: float = 2.2
    chunks: float = 10.0


# With adapters each linear layer has three outputs more. On the CPU the host's head keeps the whole graph,
# not only what the backward pass needs.
_LAZY = {"full": Factors(1.2, 2.0), "lora": Factors(1.6, 1.8), "dora": Factors(2.1, 1.8)}
_HOST = {"full": Factors(1.5, 3.8), "lora": Factors(3.6, 3.3), "dora": Factors(4.6, 3.3)}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the parts of a run."""

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    teacher: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = ((field.name, getattr(self, field.name)) for field in fields(self))
        named = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts if size)
        return f"{self.total / GB:.2f} GB ({named})"


def check_memory(
    settings: TrainSettings, source: "Source", distiller: "Distiller", console: Console
) -> Memory:
    """Says what a run will take, and refuses one that will not fit.

    Raises:
        UsageError: more than `memory_limit_gb`, or than nine tenths of the machine's memory.
    """
    memory = estimate(settings, source, distiller)
    console.note(f"memory: about {memory}")
    limit, whose = machine_memory() * SAFE_SHARE, "nine tenths of this machine's memory"
    if settings.memory_limit_gb is not None:
        limit, whose = settings.memory_limit_gb * GB, "memory_limit_gb"
    if memory.total > limit:
        raise UsageError(
            f"memory: must be at most {limit / GB:.2f} GB, {whose}, found an estimate of {memory}; "
            f"{_advice(settings, memory)}, or raise memory_limit_gb if you know better"
        )
    return memory


def fits_twice(settings: TrainSettings, source: "Source", distiller: "Distiller") -> bool:
    """Whether another process could take steps of the same run beside this one."""
    return 2 * estimate(settings, source, distiller).total <= machine_memory() * SAFE_SHARE


def estimate(settings: TrainSettings, source: "Source", distiller: "Distiller") -> Memory:
    """The parts, by the formula of this module."""
    from pipeline.training.optimizing import build_optimizer

    student, trained = distiller.student, distiller.trained
    optimizer = build_optimizer(settings)
    optimizer.init(trained.trainable_parameters())
    gradients = _num_bytes(trained.trainable_parameters())
    length = sequence_length(settings, source)
    tokens = settings.batch_size * length
    return Memory(
        weights=_num_bytes(trained.parameters()),
        copies=_copies(distiller),
        gradients=gradients * (1 if settings.grad_accumulation_steps == 1 else 2),
        optimizer=_num_bytes(optimizer.state),
        activations=_activations(settings, student, tokens, length, distiller.precision.compute.size),
        head=_head(settings, student, tokens),
        teacher=_teacher(settings, source, tokens, length),
    )


def machine_memory() -> float:
    """Bytes that MLX's device has."""
    import mlx.core as mx

    facts: dict[str, Any] = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if name in facts:
            return float(facts[name])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def sequence_length(settings: TrainSettings, source: "Source") -> int:
    """Tokens in the longest sequence, padded as in batches."""
    lengths = getattr(source.teacher, "lengths", None)
    longest = settings.max_seq_len if lengths is None else int(lengths.max())
    return -(-longest // PADDING) * PADDING


def _activations(settings: TrainSettings, student: "LoadedModel", tokens: int, length: int, size: int) -> int:
    """Of the student's blocks, `size` bytes a value."""
    everything = on_cpu() and not settings.grad_checkpoint
    factors = (_HOST if everything else _LAZY)[settings.fine_tune_type]
    layers = list(student.model.layers)
    learns = [_num_bytes(block.trainable_parameters()) > 0 for block in layers]
    first = 0 if everything or True not in learns else learns.index(True)
    blocks = [_block_values(student, block, factors, length) * size for block in layers[first:]]
    if not settings.grad_checkpoint:
        return int(tokens * sum(blocks))
    inputs = student.hidden_size * size * len(blocks)
    return int(tokens * (inputs + factors.blocks * max(blocks)))


def _block_values(student: "LoadedModel", block: Any, factors: Factors, length: int) -> float:
    """Values a token that a block keeps."""
    config = student.config.get("text_config", student.config)
    heads = config.get("num_attention_heads") or max(1, student.hidden_size // 64)
    experts = config.get("num_experts_per_tok") or 2
    widths = 0
    for _, module in block.named_modules():
        weight = module.get("weight")
        if weight is None or weight.ndim < 2:
            continue
        inputs = module["scales"].shape[-1] * module.group_size if "scales" in module else weight.shape[-1]
        widths += (weight.shape[-2] + inputs) * (experts if weight.ndim > 2 else 1)
    return factors.widths * widths + factors.attention * heads * length


def _head(settings: TrainSettings, model: "LoadedModel", tokens: int) -> int:
    from pmetal_distill.losses.job import default_chunk_tokens

    chunks = 2.0 if on_cpu() else Factors(0, 0).chunks
    at_once = settings.head_chunk or default_chunk_tokens(model.vocab_size)
    # A head that is no matrix gives the logits of all tokens, and wants a gradient for each.
    whole = 0 if model.head is not None else 2 * tokens
    return int((min(at_once, tokens) * chunks + whole) * model.vocab_size * 4)


def _teacher(settings: TrainSettings, source: "Source", tokens: int, length: int) -> int:
    """A live model's weights and one of its blocks; of a cache, the bases of its sketches."""
    teacher: Any = source.teacher
    if not hasattr(teacher, "model"):
        values = sum(basis.vocab_size * basis.rank for basis in teacher.bases)
        width = teacher.dataset.hidden.hidden_size if source.hidden_layers else 0
        states = len(source.hidden_layers) * width
        return int(4 * (values + states * tokens))
    block = _block_values(teacher, teacher.model.layers[0], _LAZY["full"], length) * _widest(teacher)
    return (
        _num_bytes(teacher.model.parameters()) + int(tokens * block) + _head(settings, teacher, tokens) // 2
    )


def _copies(distiller: "Distiller") -> int:
    """Trained weights in the type they are multiplied in, where it is not their own."""
    from mlx.utils import tree_flatten

    precision = distiller.precision
    arrays: Any = tree_flatten(distiller.student.model.parameters())
    return sum(a.size * precision.compute.size for name, a in arrays if name in precision.copies)


def _widest(model: "LoadedModel") -> int:
    """Bytes of a value that a model computes with: as wide as its widest weights."""
    from pmetal_distill.precision import float_types

    return max((dtype.size for dtype in float_types(model.model).values()), default=4)


def _num_bytes(tree: Any) -> int:
    from mlx.utils import tree_flatten

    arrays: Any = tree_flatten(tree)
    return sum(array.nbytes for _, array in arrays)


def _advice(settings: TrainSettings, memory: Memory) -> str:
    """The settings to lower, where they would help most first."""
    states = memory.gradients + memory.optimizer
    helps = [
        (memory.activations if settings.batch_size > 1 else 0, f"lower batch_size ({settings.batch_size})"),
        (0 if settings.grad_checkpoint else 0.8 * memory.activations, "set grad_checkpoint"),
        (states if settings.fine_tune_type == "full" else 0, "set fine_tune_type lora"),
        (
            memory.head,
            f"lower head_chunk ({settings.head_chunk})" if settings.head_chunk else "set head_chunk 128",
        ),
    ]
    ranked = sorted((h for h in helps if h[0] > 0), key=lambda h: -h[0])
    return ", ".join(text for _, text in ranked) or "take a smaller student"
