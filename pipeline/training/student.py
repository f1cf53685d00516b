"""The student of a run: what of it is trained, and whether it fits the cache. Costs loading it."""

from typing import TYPE_CHECKING

from pipeline.console import Console
from pipeline.settings import TrainSettings
from schemas.errors import IncompatibleError

if TYPE_CHECKING:
    from pmetal_distill.adapters import AdapterSpec
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.reader import LogitCache


def prepare_student(settings: TrainSettings, console: Console) -> "LoadedModel":
    """Loads the student and leaves exactly those weights trainable that the settings want trained.

    With `fine_tune_type: full` these are all weights, or those of the last `num_layers` blocks; else new
    adapters, whose weights the seed decides, or those of `resume_adapter_file`.

    Raises:
        ModelError: the student cannot be loaded, or not be trained.
        UsageError: quantized weights that would be trained, or adapters that do not fit.
    """
    from pmetal_distill.adapters import add_adapters, require_dense, require_trainable, train_last_blocks
    from pmetal_distill.modelling.recompute import recompute_blocks
    from pmetal_distill.models import load_model

    student = load_model(settings.student, trust_remote_code=settings.trust_remote_code)
    for note in student.notes:
        console.note(f"student: {note}")
    require_trainable(student)
    if settings.num_layers > student.num_layers:
        console.note(f"num_layers: {settings.num_layers} wanted, {student.num_layers} there: all are trained")
    if (spec := adapter_spec(settings, student.num_layers)) is not None:
        student = add_adapters(student, spec, seed=settings.seed)
    elif settings.num_layers == -1:
        require_dense(student)
    else:
        train_last_blocks(student, min(settings.num_layers, student.num_layers))
    if settings.resume_adapter_file is not None:
        _resume(settings, student, console)
    if settings.grad_checkpoint:
        recompute_blocks(student.model.layers)
    return student


def adapter_spec(settings: TrainSettings, num_blocks: int) -> "AdapterSpec | None":
    """The adapters that the settings want of a student with this many blocks; None for full fine-tuning."""
    from pmetal_distill.adapters import AdapterSpec

    if settings.fine_tune_type == "full":
        return None
    wanted = settings.lora_parameters
    return AdapterSpec(
        settings.fine_tune_type,
        rank=wanted.rank,
        scale=wanted.scale,
        dropout=wanted.dropout,
        keys=wanted.keys,
        num_layers=min(settings.num_layers, num_blocks),
    )


def _resume(settings: TrainSettings, student: "LoadedModel", console: Console) -> None:
    from pmetal_distill.adapters import adapter_weights, load_adapter_weights

    file = settings.resume_adapter_file
    assert file is not None
    new = load_adapter_weights(student, file, spec=adapter_spec(settings, student.num_layers))
    if new:
        total = len(adapter_weights(student.model))
        console.note(f"{file}: holds {total - len(new)} of the {total} trained tensors; the others start new")


def check_student(student: "LoadedModel", cache: "LogitCache") -> None:
    """Refuses a student that numbers tokens differently than the cache.

    Raises:
        IncompatibleError: another tokenizer, or too few rows in the embedding.
    """
    from pmetal_distill.models import compare_tokenizers, load_tokenizer

    cached = load_tokenizer(cache.tokenizer_path)
    if differences := compare_tokenizers(cached, student.tokenizer):
        raise IncompatibleError(
            f"{student.source}: must have the tokenizer that the cache was made with, found differences: "
            f"{'; '.join(differences[:5])}; take a student of the teacher's family"
        )
    needed = len(cached)
    if student.vocab_size < needed:
        raise IncompatibleError(
            f"{student.source}: must have room for the {needed} cached token ids, found a vocabulary of "
            f"{student.vocab_size}; take a student with a larger embedding"
        )
