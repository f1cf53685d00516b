"""Where the text and the targets of a run come from: a cache, or text beside a live teacher.

A cache costs reading and decoding; a live teacher a forward pass for every batch. Batches, held-out sequences
and their order depend on the text and the seed alone, so both kinds of run see the same ones.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.console import Console
from pipeline.settings import TrainSettings
from pipeline.training.holdout import Holdout
from schemas.errors import IncompatibleError, UsageError

if TYPE_CHECKING:
    from pipeline.training.text_reader import TextReader
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.batch import Batch
    from pmetal_distill.offline.batches import BatchIterator
    from pmetal_distill.offline.reader import LogitCache


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The data of a run.

    Attributes:
        teacher: what a `Distiller` takes.
        reader: gives the batches.
        split: which sequences are trained on.
        hidden_layers: the teacher's layers to align with, from 0.
        root: a hash that names the content: teacher, text, kind of target, layers, split.
        facts: see `describe`.
    """

    teacher: "LogitCache | LoadedModel"
    reader: "LogitCache | TextReader"
    split: Holdout
    hidden_layers: tuple[int, ...]
    root: str
    facts: Mapping[str, str]

    def batches(
        self,
        *,
        batch_size: int,
        seed: int,
        state: dict[str, Any] | None = None,
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
    ) -> "BatchIterator":
        """Endless batches of the sequences that are trained on; see `LogitCache.batches`.

        Raises:
            IncompatibleError: a state of another order.
        """
        subset = self.split.trained if len(self.split.held_out) else None
        return self.reader.batches(
            batch_size=batch_size,
            seed=seed,
            state=state,
            rank=rank,
            world_size=world_size,
            subset=subset,
            prefetch=prefetch,
        )

    def validation_batches(self, batch_size: int, count: int) -> Iterator["Batch"]:
        """Held-out batches, the same ones in the same order at every call; none if nothing is held out.

        Args:
            batch_size: sequences in a batch.
            count: batches, spread over the data; -1 for all.
        """
        held_out = self.split.spread(len(self.split.held_out) if count == -1 else count * batch_size)
        if not len(held_out):
            return
        with self.reader.batches(
            batch_size=batch_size, seed=0, epochs=1, shuffle=False, window=1, subset=held_out, prefetch=0
        ) as batches:
            yield from batches

    def describe(self) -> dict[str, str]:
        """Teacher, data and kind of target in words, with the hashes of both, for a model card."""
        return dict(self.facts)


def open_source(settings: TrainSettings, student: "LoadedModel", console: Console) -> Source:
    """The source that the settings name, after checking that the student fits it.

    Raises:
        UsageError: a share of held-out sequences that leaves none, or layers that the teacher lacks.
        IncompatibleError: another tokenizer than the student's, or more wanted than a cache holds.
        DataError, ModelError, CacheError: text, teacher or cache cannot be read.
    """
    if settings.cache is not None:
        return _from_cache(settings, student)
    return _beside_teacher(settings, student, console)


def _from_cache(settings: TrainSettings, student: "LoadedModel") -> Source:
    from pipeline.training.student import check_student

    cache = open_cache(settings)
    check_student(student, cache)
    made_from, spec = cache.dataset.fingerprint, cache.spec
    rank = f", rank {cache.rank}" if cache.rank else ""
    facts = {
        "teacher": cache.dataset.meta.get("teacher", ""),
        "teacher_sha256": made_from["teacher"],
        "data": cache.dataset.meta.get("data", ""),
        "data_sha256": made_from["data"],
        "targets": f"cached: {spec.tail}, k={spec.k}{rank}",
    }
    return _source(settings, cache, cache, cache.hidden_layers, facts, content=cache.root)


def _beside_teacher(settings: TrainSettings, student: "LoadedModel", console: Console) -> Source:
    from pipeline.evaluate import check_same_tokenizer
    from pipeline.text import note_skipped, packed_text
    from pipeline.training.text_reader import TextReader
    from pmetal_distill.models import load_model, model_fingerprint

    assert settings.teacher is not None
    assert settings.data is not None
    if settings.tail is not None:
        raise UsageError(
            f"tail: a live teacher knows the whole distribution, found '{settings.tail}'; leave it out, or "
            "train from a cache"
        )
    teacher = load_model(settings.teacher, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    for note in teacher.notes:
        console.note(f"teacher: {note}")
    check_same_tokenizer(teacher, student)
    note_skipped(settings.data, console)
    data = packed_text(
        settings.data,
        teacher,
        split="train",
        max_seq_len=settings.max_seq_len,
        mask_prompt=settings.mask_prompt,
        packing=student.supports_packing,
    )
    console.note(
        f"{data.num_documents:,} documents, {data.num_tokens:,} tokens in {data.num_sequences:,} sequences "
        f"({data.fill_rate:.0%} full)"
    )
    facts = {
        "teacher": settings.teacher,
        "teacher_sha256": model_fingerprint(teacher),
        "data": settings.data,
        "data_sha256": data.fingerprint(),
        "targets": "live teacher",
    }
    return _source(settings, teacher, TextReader(data), live_layers(settings, teacher), facts)


def _source(
    settings: TrainSettings,
    teacher: "LogitCache | LoadedModel",
    reader: "LogitCache | TextReader",
    layers: tuple[int, ...],
    facts: dict[str, str],
    *,
    content: str = "",
) -> Source:
    split = Holdout.of(reader.numbers, share=settings.val_share, seed=settings.seed, text=reader.text)
    hashes = {name: value for name, value in facts.items() if name.endswith("_sha256")}
    named = json.dumps([hashes, facts["targets"], content, layers, split.held_out.tolist()])
    return Source(teacher, reader, split, layers, hashlib.sha256(named.encode()).hexdigest(), facts)


def open_cache(settings: TrainSettings) -> "LogitCache":
    """The cache with as much of its targets, and those hidden layers, as the settings want.

    Raises:
        IncompatibleError: the settings want more than the cache holds.
    """
    from pmetal_distill.offline.reader import LogitCache

    assert settings.cache is not None
    layers = teacher_layers(settings, LogitCache(settings.cache))
    cache = LogitCache(settings.cache, hidden_layers=layers)
    stored, wanted = cache.spec.tail, settings.tail or cache.spec.tail
    order = ("none", "bucket", "sketch")
    if order.index(wanted) > order.index(stored):
        raise IncompatibleError(
            f"tail: must be at most '{stored}', which {settings.cache} holds, found '{wanted}'; "
            "leave it out or cache again"
        )
    if wanted == "none":
        return LogitCache(settings.cache, hidden_layers=layers, with_tail=False)
    return LogitCache(settings.cache, hidden_layers=layers, rank=0) if wanted == "bucket" else cache


def teacher_layers(settings: TrainSettings, cache: "LogitCache") -> tuple[int, ...]:
    """The teacher's layers to align with, from 0; none without a hidden-state loss.

    Raises:
        IncompatibleError: the cache does not hold one of them.
    """
    if settings.hidden_loss is None:
        return ()
    stored = cache.dataset.hidden.layers if cache.dataset.hidden else ()
    count = int(cache.dataset.meta.get("teacher_layers", "0"))
    wanted = stored if settings.hidden_layers == "all" else settings.hidden_layers
    layers = tuple(layer + count if layer < 0 else layer for layer in wanted)
    missing = [layer for layer in layers if layer not in stored]
    if missing or not layers:
        raise IncompatibleError(
            f"hidden_layers: must be among those that {settings.cache} holds, {list(stored)}, found "
            f"{list(wanted)}; cache again with --hidden-layers"
        )
    return layers


def live_layers(settings: TrainSettings, teacher: "LoadedModel") -> tuple[int, ...]:
    """The layers of a live teacher to align with, from 0; none without a hidden-state loss.

    Raises:
        UsageError: a layer that the teacher does not have, or cannot give.
    """
    if settings.hidden_loss is None:
        return ()
    count = teacher.num_layers if teacher.splits else 0
    wanted = tuple(range(count)) if settings.hidden_layers == "all" else settings.hidden_layers
    if not wanted or not all(-count <= layer < count for layer in wanted):
        raise UsageError(
            f"hidden_layers: must be among the {count} layers that {teacher.source} gives, from 0, found "
            f"{list(wanted)}; name others, or leave out hidden_loss"
        )
    return tuple(layer % count for layer in wanted)
