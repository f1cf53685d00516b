"""From a `--data` argument to packed sequences in a model's tokens."""

import logging
from typing import TYPE_CHECKING, Any, cast

from pipeline.data import FieldNames, PackedDataset, PackSettings, load_documents, pack, tokenize_all

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel


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

    A model that cannot keep documents apart inside a sequence (recurrent layers) gets one window a sequence.

    Raises:
        DataError: text that cannot be read.
        UsageError: prompts to be masked in plain text.
    """
    # Documents are cut into windows below, so that one is longer than the model's context is no news.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    documents = load_documents(data, split=cast(Any, split), fields=fields or FieldNames())
    tokens = tokenize_all(documents, model.tokenizer, mask_prompt=mask_prompt)
    settings = PackSettings(max_seq_len=max_seq_len, pack=packing and model.supports_packing)
    return pack(tokens, settings)
