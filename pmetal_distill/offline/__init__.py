"""Caches: capture, sketch, writer, reader. What a user of a cache needs is imported on first use.

cache = LogitCache("CACHE")
teacher = CachedTeacher(cache)
with cache.batches(batch_size=4, seed=0, epochs=1) as batches:
    for batch in batches:                  # a Batch: token_ids, labels, loss_mask, ... as NumPy arrays
        target = teacher.target(batch)     # for the losses on logits
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmetal_distill.offline.batch import Batch, StoredSequence
    from pmetal_distill.offline.batches import BatchIterator
    from pmetal_distill.offline.progress import CacheProgress, cache_progress
    from pmetal_distill.offline.reader import LogitCache
    from pmetal_distill.offline.rebuild import reconstruct_logprobs
    from pmetal_distill.offline.repair import RepairReport, repair_cache
    from pmetal_distill.offline.verify import Finding, VerifyReport, verify_cache
    from pmetal_distill.offline.writer import CacheWriter, CapturedSequence, Sidecars
    from pmetal_distill.teaching import CachedTeacher

_PLACES = {
    "Batch": "batch",
    "BatchIterator": "batches",
    "CacheProgress": "progress",
    "CacheWriter": "writer",
    "CachedTeacher": "pmetal_distill.teaching",
    "CapturedSequence": "writer",
    "Finding": "verify",
    "LogitCache": "reader",
    "RepairReport": "repair",
    "Sidecars": "writer",
    "StoredSequence": "batch",
    "VerifyReport": "verify",
    "cache_progress": "progress",
    "reconstruct_logprobs": "rebuild",
    "repair_cache": "repair",
    "verify_cache": "verify",
}

__all__ = [
    "Batch",
    "BatchIterator",
    "CacheProgress",
    "CacheWriter",
    "CachedTeacher",
    "CapturedSequence",
    "Finding",
    "LogitCache",
    "RepairReport",
    "Sidecars",
    "StoredSequence",
    "VerifyReport",
    "cache_progress",
    "reconstruct_logprobs",
    "repair_cache",
    "verify_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pmetal_distill.offline' has no attribute '{name}'")
    place = _PLACES[name]
    module = place if "." in place else f"pmetal_distill.offline.{place}"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
