"""The texts that need no network: big enough, without repetition between documents, really different."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from pipeline import demo_text
from pipeline.data import Document, split_by_size
from pipeline.demo_text import TEXTS, demo_documents
from schemas.errors import DataError


@pytest.fixture(scope="module")
def texts() -> dict[str, tuple[Document, ...]]:
    return {name: demo_documents(name) for name in TEXTS}


@pytest.fixture(params=list(TEXTS))
def documents(request: pytest.FixtureRequest, texts: dict[str, tuple[Document, ...]]) -> tuple[Document, ...]:
    return texts[request.param]


def num_chars(documents: tuple[Document, ...] | list[Document]) -> int:
    return sum(len(document.text) for document in documents)


def paragraphs(text: str) -> list[str]:
    """The longer ones, white space made equal."""
    joined = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in joined if len(paragraph) >= 80]


def test_sizes(texts: dict[str, tuple[Document, ...]]) -> None:
    assert 300_000 < num_chars(texts["python-docs"]) < 600_000
    assert num_chars(texts["licences"]) > 50_000
    assert num_chars(texts["numpy-docs"]) > 500_000


def test_documents_are_text_with_names_of_their_own(documents: tuple[Document, ...]) -> None:
    assert all(document.kind == "text" and len(document.text) >= 100 for document in documents)
    assert len({document.source for document in documents}) == len(documents)
    assert not any(str(Path.home()) in document.source for document in documents)


def test_paragraphs_are_not_shared_between_documents(documents: tuple[Document, ...]) -> None:
    owners = defaultdict(set)
    for document in documents:
        for words in paragraphs(document.text):
            owners[words].add(document.source)
    shared = sum(len(words) for words, sources in owners.items() if len(sources) > 1)
    assert shared < 0.005 * num_chars(documents)


def test_held_out_share(documents: tuple[Document, ...]) -> None:
    train, held_out = split_by_size(documents, fraction=0.1)
    assert 0.09 < num_chars(held_out) / num_chars(documents) <= 0.1
    assert len(train) + len(held_out) == len(documents)


@pytest.mark.parametrize("name", list(TEXTS))
def test_same_documents_on_every_call(texts: dict[str, tuple[Document, ...]], name: str) -> None:
    assert demo_documents(name) == texts[name]


def test_topics_lose_only_repetitions(texts: dict[str, tuple[Document, ...]]) -> None:
    from pydoc_data.topics import topics

    kept = {p for d in texts["python-docs"] for p in paragraphs(d.text)}
    given = {p for text in topics.values() for p in paragraphs(text)}
    assert kept <= given
    assert sum(map(len, kept)) > 0.97 * sum(map(len, given))
    by_name = {
        document.source.removeprefix("pydoc_data.topics/"): document.text for document in texts["python-docs"]
    }
    assert len(by_name["specialnames"]) < 0.8 * len(topics["specialnames"])
    in_order = paragraphs(topics["specialnames"])
    places = [in_order.index(paragraph) for paragraph in dict.fromkeys(paragraphs(by_name["specialnames"]))]
    assert places == sorted(places)


def test_the_texts_differ_in_their_words(texts: dict[str, tuple[Document, ...]]) -> None:
    frequent = {}
    for name, documents in texts.items():
        words = Counter(re.findall(r"[a-z]+", " ".join(d.text for d in documents).lower()))
        frequent[name] = {word for word, _ in words.most_common(100)}
    assert len(frequent["python-docs"] & frequent["licences"]) < 50
    assert len(frequent["python-docs"] & frequent["numpy-docs"]) < 70
    assert len(frequent["numpy-docs"] & frequent["licences"]) < 50


def test_unknown_text() -> None:
    with pytest.raises(
        DataError, match="text: must be one of python-docs, licences, numpy-docs, found 'novel'"
    ):
        demo_documents("novel")


def test_missing_packages_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "LICENCES_OF", ("no-such-package-anywhere",))
    with pytest.raises(DataError, match="licences: must hold text, found none"):
        demo_documents("licences")
