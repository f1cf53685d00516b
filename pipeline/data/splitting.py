"""Held-out documents: a split by content, so that a text and its copy never stand on both sides."""

import hashlib
import json
from collections.abc import Iterable, Iterator

from pipeline.data.documents import Document
from schemas.errors import UsageError


def split_by_document(
    documents: Iterable[Document], *, fraction: float, seed: int = 0, held_out: bool = False
) -> Iterator[Document]:
    """Streams one side of a split; call it twice, with the documents read twice, for both.

    A document is held out when a hash of the seed and its content falls below `fraction`, so the choice
    depends neither on its file nor on its neighbours, and the share is `fraction` only on average.

    Args:
        documents: the stream to split.
        fraction: expected share of held-out documents, in [0, 1].
        seed: another seed makes another split.
        held_out: give the held-out documents; else the others.

    Raises:
        UsageError: `fraction` outside [0, 1].
    """
    _check_fraction(fraction)
    return (document for document in documents if (_uniform(document, seed) < fraction) == held_out)


def _uniform(document: Document, seed: int) -> float:
    """A number in [0, 1) that the content and the seed alone decide."""
    content = [seed, document.kind, document.text, document.messages, document.tools]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2.0**48


def split_by_size(
    documents: Iterable[Document], *, fraction: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Splits a few documents of very different lengths so that the held-out part has the wanted size.

    Documents are visited in the order of a hash of the seed and their content, and held out as long as they
    fit into `fraction` of all characters.

    Returns:
        the documents to train on and the held-out ones, both in the order given.

    Raises:
        UsageError: `fraction` outside [0, 1].
    """
    _check_fraction(fraction)
    given = list(documents)
    sizes = [_num_chars(document) for document in given]
    room = fraction * sum(sizes)
    held_out = set()
    for index in sorted(range(len(given)), key=lambda i: (_uniform(given[i], seed), i)):
        if sizes[index] <= room:
            held_out.add(index)
            room -= sizes[index]
    return (
        [document for i, document in enumerate(given) if i not in held_out],
        [document for i, document in enumerate(given) if i in held_out],
    )


def _num_chars(document: Document) -> int:
    return len(document.text) + sum(len(str(message.get("content", ""))) for message in document.messages)


def _check_fraction(fraction: float) -> None:
    if not 0.0 <= fraction <= 1.0:
        raise UsageError(f"fraction: must be in [0, 1], found {fraction}; give a share of the documents")
