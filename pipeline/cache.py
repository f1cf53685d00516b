"""Stage one: runs the teacher once and writes what it says about every token. Costs its forward pass.

The text is read while the teacher's weights are. The teacher's body runs on batches of sequences, its head on
chunks of rows, so [tokens, vocabulary] never exists at once. Shard after shard is committed; an interrupted
run goes on with --resume, and several processes may write one cache.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from pipeline.about import missing_blas
from pipeline.console import Console
from pipeline.data import FieldNames, PackedDataset
from pipeline.settings import CacheSettings
from pipeline.stage_one import StageOne
from pipeline.text import TextAhead, note_skipped, pack_settings
from schemas.errors import FingerprintError, UsageError
from schemas.hidden_spec import HiddenSpec
from schemas.manifest import Dataset
from schemas.spec import TargetSpec

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.parallel import World

ROWS_PER_GROUP = 4096
# On disk, of real text (`benchmarks/peers.py`): 62.8 with rank 256, and 138.9 with a bucket of 64 entries.
SKETCH_BYTES, BUCKET_BYTES_AN_ENTRY = 63.0, 2.2


def run_cache(
    settings: CacheSettings, console: Console, *, teacher: "LoadedModel | None" = None
) -> dict[str, Any]:
    """Makes or completes a cache.

    Args:
        settings: of the stage.
        console: where progress goes.
        teacher: the loaded teacher; loaded from the settings if None.

    Returns:
        tokens, bytes and speed of what this process wrote, and of the whole cache; nothing in those of
        several processes that do not lead. `wall_seconds` is all the time of this call, `reading_seconds`
        that from the first document to the last sequence, most of it while the teacher is loaded.

    Raises:
        UsageError: the output folder is in use, or the settings do not fit the teacher.
        PeerLostError: a process with a share of the teacher is gone.
        FingerprintError: `--resume` into a cache of other inputs.
        DataError, ModelError, NonFiniteError, CacheError: as their names say; what was committed stays.
    """
    from pmetal_distill.parallel import World

    started = time.perf_counter()
    world = World.launched()
    if not world.leads:
        console = Console(quiet=True)
    world.together(
        lambda: refuse_used_folder(settings.out, resume=settings.resume),
        otherwise=UsageError(f"{settings.out}: all processes must be able to take it, found one that is not"),
    )
    note_skipped(settings.data, console)
    with closing(text_ahead(settings)) as text:
        found = _run(settings, console, teacher, world, text)
    return found and {**found, **_whole_time(found["new_tokens"], time.perf_counter() - started)}


def _whole_time(tokens: int, seconds: float) -> dict[str, float]:
    return {"wall_seconds": seconds, "wall_tokens_per_second": tokens / max(seconds, 1e-9)}


def _run(
    settings: CacheSettings,
    console: Console,
    teacher: "LoadedModel | None",
    world: "World",
    text: TextAhead,
) -> dict[str, Any]:
    from pmetal_distill.parallel import World

    if settings.sharded:
        from pmetal_distill.sharded import sharded_model

        with sharded_model(
            settings.teacher,
            world,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            on_tokenizer=text.start if world.leads else None,
        ) as share:
            return {} if share is None else _fill(settings, console, share, World(), text)
    return _fill(settings, console, teacher or _load_teacher(settings, console, text), world, text)


def _fill(
    settings: CacheSettings, console: Console, teacher: "LoadedModel", world: "World", text: TextAhead
) -> dict[str, Any]:
    """The share of one process in a cache."""
    from pmetal_distill.models import model_fingerprint
    from pmetal_distill.offline.store import DATASET
    from pmetal_distill.offline.writer import CacheWriter

    require_same_type(settings, teacher)
    # Weights in files are hashed while the text is read and the sample goes through the teacher.
    fingerprint = (in_background if teacher.folder else done)(lambda: model_fingerprint(teacher))
    spec = target_spec(settings, teacher.vocab_size)
    hidden = hidden_spec(settings, teacher)
    data = read_data(settings, teacher, text)
    settings = with_rank(settings, teacher, console)
    console.note(_size(data))
    if hint := sidecar_hint(settings, teacher.vocab_size, data.num_tokens):
        console.note(hint)
    run = StageOne(settings, teacher, data, spec, hidden, console, rank=world.rank, world_size=world.size)
    if not (settings.out / DATASET).exists():
        run.learn()
    dataset = describe(settings, teacher, data, spec, hidden, weights=fingerprint())
    with CacheWriter.create_or_resume(
        settings.out, dataset, tokenizer_files(teacher.tokenizer), zstd_level=settings.zstd_level
    ) as writer:
        run.write_missing(writer)
    if not world.leads:
        return {}
    return {**run.summary(), "reading_seconds": text.seconds, **describe_cache(settings.out)}


def require_same_type(settings: CacheSettings, teacher: "LoadedModel") -> None:
    """Refuses to go on with a cache in another type than it began with: rounding would differ inside it.

    Raises:
        FingerprintError: with both types.
    """
    from pmetal_distill.offline.store import DATASET

    try:
        began = json.loads((settings.out / DATASET).read_text(encoding="utf-8"))["meta"]["teacher_dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # a new cache, one that does not say it, or one whose damage is told of where it is opened
    if began != teacher.dtype:
        raise FingerprintError(
            f"dtype: must be {began}, in which the teacher computed when this cache began, found "
            f"{teacher.dtype}; give --dtype {began}, or choose another --out"
        )


def with_rank(settings: CacheSettings, teacher: "LoadedModel", console: Console) -> CacheSettings:
    """The settings with the rank of the sketch, before anything is computed: as given, or what is allowed.

    Raises:
        UsageError: a rank was given that this teacher does not have.
    """
    if settings.tail != "sketch":
        return settings
    largest = largest_rank(teacher)
    if settings.sketch_rank is None and settings.rank > largest:
        console.note(
            f"sketch rank: {largest} instead of {settings.rank}, which this teacher is too narrow for"
        )
        return replace(settings, sketch_rank=largest)
    check_rank(settings, teacher)
    return replace(settings, sketch_rank=settings.rank)


def check_rank(settings: CacheSettings, teacher: "LoadedModel") -> None:
    """Refuses a rank beyond the teacher's.

    Raises:
        UsageError: with what it may be.
    """
    from pmetal_distill.offline.sketch import check_linear_rank

    if settings.tail == "sketch" and (head := teacher.head) is not None and head.softcap is None:
        size = teacher.hidden_size
        check_linear_rank(settings.rank, hidden_size=size, vocab_size=teacher.vocab_size)


def largest_rank(teacher: "LoadedModel") -> int:
    """Of a sketch of this teacher: logits of a linear head lie in a space as wide as the hidden states."""
    linear = teacher.head is not None and teacher.head.softcap is None
    limit = teacher.vocab_size - 1
    return min(limit, teacher.hidden_size) if linear else limit


def _size(data: PackedDataset) -> str:
    sequences = f"{data.num_sequences:,} sequences ({data.fill_rate:.0%} full)"
    return f"{data.num_documents:,} documents, {data.num_tokens:,} tokens in {sequences}"


def sidecar_hint(settings: CacheSettings, vocab_size: int, num_tokens: int) -> str | None:
    """What to say of a sketch whose basis outweighs what it saves on this text; None where it pays.

    Beside it stands a bucket of four times the head, which needs no basis and is less exact all the same
    (`benchmarks/peers.py`: 0.222 against 0.046 at T = 2).
    """
    if settings.tail != "sketch":
        return None
    sidecar = vocab_size * (2 * settings.rank + 4)
    bucket_k = min(4 * settings.top_k, vocab_size - 1)
    saved = BUCKET_BYTES_AN_ENTRY * bucket_k - SKETCH_BYTES
    if saved <= 0 or sidecar <= saved * num_tokens:
        return None
    return (
        f"the basis of a sketch weighs {sidecar / 1e6:.3g} MB, {sidecar / num_tokens:,.0f} bytes for each of "
        f"these {num_tokens:,} tokens; '--tail bucket --top-k {bucket_k}' has none, takes about "
        f"{BUCKET_BYTES_AN_ENTRY * bucket_k:.0f} bytes a token and is less exact at T > 1; a sketch is the "
        f"smaller one from about {float(f'{sidecar / saved:.2g}'):,.0f} tokens on"
    )


def _load_teacher(settings: CacheSettings, console: Console, text: TextAhead) -> "LoadedModel":
    from pmetal_distill.models import load_model

    if hint := missing_blas():
        console.note(hint)
    teacher = load_model(
        settings.teacher,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        on_tokenizer=text.start,
    )
    for note in teacher.notes:
        console.note(f"teacher: {note}")
    return teacher


def in_background(work: Callable[[], str]) -> Callable[[], str]:
    """Starts work on a thread; what is returned waits for its value, or raises what the work raised."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the value
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result


def done(work: Callable[[], str]) -> Callable[[], str]:
    """As `in_background`, but done before it returns."""
    value = work()
    return lambda: value


def target_spec(settings: CacheSettings, vocab_size: int) -> TargetSpec:
    """The layout that the settings ask for.

    Raises:
        UsageError: more head entries than the vocabulary has.
    """
    most = vocab_size - (settings.tail != "none")
    if settings.top_k > most:
        raise UsageError(
            f"top_k: must be at most {most} with a vocabulary of {vocab_size} and tail '{settings.tail}', "
            f"found {settings.top_k}; give a smaller one"
        )
    return TargetSpec(vocab_size=vocab_size, k=settings.top_k, tail=settings.tail)


def read_data(
    settings: CacheSettings, teacher: "LoadedModel", text: TextAhead | None = None
) -> PackedDataset:
    """The text as packed sequences in the teacher's tokens; `text` may have begun to read it."""
    with closing(text or text_ahead(settings)) as ahead:
        ahead.start(teacher.tokenizer)
        packing = pack_settings(teacher, max_seq_len=settings.max_seq_len, packing=settings.pack)
        return ahead.packed(packing, spool_folder=_existing_folder(settings.out))


def _existing_folder(path: Path) -> Path:
    """The folder, or the first above it that is there: on the disk that is to hold the folder."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def text_ahead(settings: CacheSettings) -> TextAhead:
    """The text that the settings name; nothing of it is read yet."""
    fields = FieldNames(
        text=settings.text_feature,
        prompt=settings.prompt_feature,
        completion=settings.completion_feature,
        messages=settings.chat_feature,
    )
    return TextAhead(settings.data, split=settings.split, mask_prompt=settings.mask_prompt, fields=fields)


def describe(
    settings: CacheSettings,
    teacher: "LoadedModel",
    data: PackedDataset,
    spec: TargetSpec,
    hidden: HiddenSpec | None,
    *,
    weights: str,
) -> Dataset:
    """`dataset.json`: what the cache holds and what it was made from; `weights` fingerprints the teacher."""
    from pmetal_distill.models import chat_template_fingerprint, tokenizer_fingerprint

    sampled = {"calibration_tokens": settings.calibration_tokens, "seed": settings.seed}
    codec: dict[str, Any] = sampled if settings.hidden_rank else {}
    if settings.tail == "sketch":
        codec = {"rank": settings.rank, "step": settings.sketch_step, **sampled}
    packing = {
        "max_seq_len": settings.max_seq_len,
        "pack": data.settings.pack,
        "mask_prompt": settings.mask_prompt,
    }
    return Dataset(
        fingerprint={
            "teacher": weights,
            "tokenizer": tokenizer_fingerprint(teacher.tokenizer),
            "chat_template": chat_template_fingerprint(teacher.tokenizer),
            "data": data.fingerprint(),
            "packing": json.dumps(packing),
            "codec": json.dumps(codec),
        },
        target=spec,
        num_sequences=data.num_sequences,
        num_tokens=data.num_tokens,
        sequences_per_shard=settings.sequences_per_shard,
        max_sequence_length=settings.max_seq_len,
        rows_per_group=ROWS_PER_GROUP,
        hidden=hidden,
        meta={
            "teacher": settings.teacher,
            "teacher_layers": str(teacher.num_layers),
            "teacher_dtype": teacher.dtype,
            "data": settings.data,
        },
    )


def hidden_spec(settings: CacheSettings, teacher: "LoadedModel") -> HiddenSpec | None:
    """The hidden states that are kept too.

    Raises:
        UsageError: a layer that the teacher does not have, or a rank above the width of its states.
    """
    layers = hidden_layers(settings, teacher)
    if not layers:
        return None
    if settings.hidden_rank > teacher.hidden_size:
        raise UsageError(
            f"hidden_rank: must be at most {teacher.hidden_size}, the width of this teacher, found "
            f"{settings.hidden_rank}; give a smaller one"
        )
    return HiddenSpec(layers, teacher.hidden_size, rank=settings.hidden_rank)


def hidden_layers(settings: CacheSettings, teacher: "LoadedModel") -> tuple[int, ...]:
    """Block numbers from 0, ascending.

    Raises:
        UsageError: a layer that the teacher does not have.
    """
    count = teacher.num_layers
    if settings.hidden_layers == "all":
        return tuple(range(count))
    if bad := [layer for layer in settings.hidden_layers if not -count <= layer < count]:
        raise UsageError(
            f"hidden_layers: must be from {-count} to {count - 1}, as the teacher has {count} layers, "
            f"found {bad[0]}; name others"
        )
    return tuple(sorted({layer % count for layer in settings.hidden_layers}))


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The teacher's tokenizer files by name, so that a cache can be read without the teacher."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def describe_cache(folder: Path) -> dict[str, Any]:
    """Size and cost of a complete cache."""
    from pipeline.inspection import error_by_stretch, size_of
    from pmetal_distill.offline.reader import LogitCache

    cache = LogitCache(folder, verify_hashes="never")
    by_column = cache.bytes_per_token()
    return {
        "cache": str(folder),
        "sequences": cache.num_sequences,
        "tokens": cache.num_tokens,
        "trained_tokens": cache.num_trained_tokens,
        "hidden_bytes_per_token": by_column["hidden"],
        **size_of(cache, by_column),
        "stretches": error_by_stretch(cache),
    }


def refuse_used_folder(out: Path, *, resume: bool) -> None:
    """Raises UsageError if `out` is in use, unless `resume` says that it is meant to be."""
    if resume or not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise UsageError(
            f"{out}: the folder of a new cache must be new or empty, found it in use; choose another --out, "
            "or go on with an unfinished cache by --resume"
        )
