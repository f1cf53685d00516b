"""Held-out documents: partitions by content, of the wanted size, the same on every run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import Document, split_by_document, split_by_size
from schemas.errors import UsageError


def documents(*texts: str) -> list[Document]:
    return [Document(kind="text", source="a", line=i + 1, text=text) for i, text in enumerate(texts)]


def test_split_by_document_keeps_copies_together() -> None:
    given_documents = documents(*(f"text {i % 400}" for i in range(800)))
    train, held_out = (
        [d.text for d in split_by_document(given_documents, fraction=0.25, seed=3, held_out=side)]
        for side in (False, True)
    )
    assert len(train) + len(held_out) == 800
    assert not set(train) & set(held_out)
    assert 0.15 < len(held_out) / 800 < 0.35
    assert [
        d.text for d in split_by_document(given_documents, fraction=0.25, seed=4, held_out=True)
    ] != held_out


def test_a_document_stays_on_its_side_when_others_come() -> None:
    few, many = documents("a", "b", "c", "d", "e"), documents("z", "c", "b", "a", "y", "e", "d")
    first = {d.text for d in split_by_document(few, fraction=0.5, held_out=True)}
    second = {d.text for d in split_by_document(many, fraction=0.5, held_out=True)}
    assert first == second - {"z", "y"}


def test_chats_differ_by_their_messages() -> None:
    chats = [
        Document(kind="messages", source="a", messages=({"role": "user", "content": f"{i}"},))
        for i in range(200)
    ]
    assert 60 < len(list(split_by_document(chats, fraction=0.5, held_out=True))) < 140


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=30),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_split_by_size_is_a_partition_within_its_share(sizes: list[int], fraction: float, seed: int) -> None:
    texts = [f"{i:03d}" + "x" * size for i, size in enumerate(sizes)]
    train, held_out = split_by_size(documents(*texts), fraction=fraction, seed=seed)
    assert sorted(d.text for d in train + held_out) == texts
    assert [d.text for d in train] == sorted(d.text for d in train)
    total = sum(map(len, texts))
    assert sum(len(d.text) for d in held_out) <= fraction * total
    # Whatever was left in training did not fit any more.
    left = fraction * total - sum(len(d.text) for d in held_out)
    assert all(len(d.text) > left for d in train)
    assert split_by_size(documents(*texts), fraction=fraction, seed=seed) == (train, held_out)


def test_the_seed_changes_the_split() -> None:
    given_documents = documents(*(f"text number {i}" for i in range(50)))
    held_out = {
        tuple(d.text for d in split_by_size(given_documents, fraction=0.2, seed=s)[1]) for s in range(4)
    }
    assert len(held_out) == 4


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_outside_its_range(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"fraction: must be in \[0, 1\]"):
        split_by_size([], fraction=fraction)
    with pytest.raises(UsageError, match=r"fraction: must be in \[0, 1\]"):
        split_by_document([], fraction=fraction)
