"""From a `--data` argument to packed sequences in a model's tokens."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.data import (
    FieldNames,
    PackedDataset,
    PackSettings,
    TokenizedDocument,
    load_documents,
    pack,
    skipped_files,
    tokenize_batches,
)
from pipeline.data.prefetch import Prefetch

if TYPE_CHECKING:
    from pipeline.console import Console
    from pmetal_distill.models import LoadedModel

# Of documents that are tokenized and not yet packed, which happens only while a model is loaded.
WAITING_BYTES = 256 << 20
_DOCUMENT_BYTES = 400


class TextAhead:
    """Text that is read and tokenized on threads from `start` on, until it is packed.

    What is wrong with the text is raised by `packed`. `close` must be called at the end, whatever happens.
    Costs `WAITING_BYTES` of tokens at most.

    Args:
        data: file or folder.
        split: of a folder.
        mask_prompt: as of `tokenize`.
        fields: names of the columns.

    Attributes:
        seconds: from the start until all was packed; 0 before.
    """

    def __init__(
        self, data: str, *, split: str, mask_prompt: bool = False, fields: FieldNames | None = None
    ) -> None:
        self._data, self._split = data, split
        self._mask_prompt, self._fields = mask_prompt, fields or FieldNames()
        self._tokens: Prefetch[list[TokenizedDocument]] | None = None
        self._started = 0.0
        self.seconds = 0.0

    def start(self, tokenizer: Any) -> None:
        """Begins to read in this tokenizer's tokens; does nothing the second time."""
        if self._tokens is None:
            # Documents are cut into windows later, so that one is longer than the model's context is no news.
            logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
            self._started = time.perf_counter()
            self._tokens = Prefetch(self._read(tokenizer), most=WAITING_BYTES, size=_bytes)

    def packed(self, settings: PackSettings, *, spool_folder: Path | None = None) -> PackedDataset:
        """The text that was started with, once.

        Raises:
            DataError: text that cannot be read.
            UsageError: prompts to be masked in plain text.
        """
        assert self._tokens is not None
        found = pack(chain.from_iterable(self._tokens), settings, spool_folder=spool_folder)
        self.seconds = time.perf_counter() - self._started
        return found

    def close(self) -> None:
        """Ends the threads."""
        if self._tokens is not None:
            self._tokens.close()

    def _read(self, tokenizer: Any) -> Iterator[list[TokenizedDocument]]:
        documents = load_documents(self._data, split=cast(Any, self._split), fields=self._fields)
        yield from tokenize_batches(documents, tokenizer, mask_prompt=self._mask_prompt)


def _bytes(batch: list[TokenizedDocument]) -> int:
    return sum(document.token_ids.nbytes + _DOCUMENT_BYTES for document in batch)


def note_skipped(data: str, console: "Console") -> None:
    """Says which files of a folder are not read as text."""
    if skipped := skipped_files(data):
        names = ", ".join(str(file.relative_to(data)) for file in skipped)
        console.note(f"{data}: left out {names}, which the extension and the name take for no text")


def packed_text(
    data: str,
    model: "LoadedModel",
    *,
    split: str,
    max_seq_len: int,
    mask_prompt: bool = False,
    packing: bool = True,
    fields: FieldNames | None = None,
) -> PackedDataset:
    """Reads, tokenizes and packs text.

    Raises:
        DataError: text that cannot be read.
        UsageError: prompts to be masked in plain text.
    """
    settings = pack_settings(model, max_seq_len=max_seq_len, packing=packing)
    with closing(TextAhead(data, split=split, mask_prompt=mask_prompt, fields=fields)) as text:
        text.start(model.tokenizer)
        return text.packed(settings)


def pack_settings(model: "LoadedModel", *, max_seq_len: int, packing: bool = True) -> PackSettings:
    """How text is packed for a model.

    One that cannot keep documents apart inside a sequence (recurrent layers) gets one window a sequence.
    """
    return PackSettings(max_seq_len=max_seq_len, pack=packing and model.supports_packing)
