"""Training text: read it, turn it into tokens, pack the tokens into sequences.

    load_documents(path) -> Document -> tokenize_all(...) -> TokenizedDocument -> pack(...) -> PackedDataset

Every step streams. Only the packed tokens stay, about 4 bytes each: in memory while they are few, else in
files without a name.
"""

from pipeline.data.documents import Document, FieldNames
from pipeline.data.packing import PackedDataset, PackedSequence, PackSettings, pack
from pipeline.data.readers import available_splits, data_files, load_documents, skipped_files
from pipeline.data.splitting import split_by_document, split_by_size
from pipeline.data.tokenizing import TokenizedDocument, Tokenizer, tokenize
from pipeline.data.tokenizing_batches import tokenize_all, tokenize_batches

__all__ = [
    "Document",
    "FieldNames",
    "PackSettings",
    "PackedDataset",
    "PackedSequence",
    "TokenizedDocument",
    "Tokenizer",
    "available_splits",
    "data_files",
    "load_documents",
    "pack",
    "skipped_files",
    "split_by_document",
    "split_by_size",
    "tokenize",
    "tokenize_all",
    "tokenize_batches",
]
