"""Where the targets of a run come from."""

from typing import TYPE_CHECKING

from pipeline.settings import TrainSettings
from schemas.errors import IncompatibleError

if TYPE_CHECKING:
    from pmetal_distill.offline.reader import LogitCache


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
