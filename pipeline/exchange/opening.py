"""Opens the source that the settings name."""

from typing import Any

from pipeline.exchange.dense import open_dense
from pipeline.exchange.distillkit import open_distillkit
from pipeline.exchange.dwq import open_dwq
from pipeline.exchange.openai import OpenAISource
from pipeline.exchange.responses import json_files
from pipeline.exchange.sequences import Source
from pipeline.exchange.settings import ImportSettings
from pipeline.exchange.vllm import VllmSource
from pipeline.exchange.vocabulary import Vocabulary
from schemas.errors import UsageError


def open_source(settings: ImportSettings, tokenizer: Any) -> Source:
    """The source of an import.

    Raises:
        DataError: nothing readable there.
        UsageError: an option that the format does not have, or lacks.
    """
    _refuse_foreign(settings)
    path = settings.source
    if settings.format == "vllm":
        return VllmSource(json_files(path))
    if settings.format == "openai":
        return OpenAISource(json_files(path), tokenizer=tokenizer, vocabulary=Vocabulary.of(tokenizer))
    if settings.format == "distillkit":
        return open_distillkit(path, settings.compression_config)
    if settings.format == "dwq":
        return open_dwq(path, settings.tokens)
    return open_dense(path, settings.tokens)


def _refuse_foreign(settings: ImportSettings) -> None:
    owners = {"tokens": ("dwq", "dense"), "compression_config": ("distillkit",)}
    for name, formats in owners.items():
        if getattr(settings, name) is not None and settings.format not in formats:
            raise UsageError(
                f"--{name.replace('_', '-')}: belongs to {' and '.join(formats)}, found it with "
                f"{settings.format}; leave it out"
            )
