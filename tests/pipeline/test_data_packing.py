"""Packing: nothing lost, nothing twice, nothing across documents, the right masks."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import PackedDataset, PackSettings, TokenizedDocument, pack
from schemas.errors import DataError, UsageError


def make_documents(lengths: list[int], prompts: list[int] | None = None) -> list[TokenizedDocument]:
    """Documents whose token ids are all different, so that every token can be traced."""
    ids = itertools.count(100)
    return [
        TokenizedDocument(
            token_ids=np.fromiter(ids, dtype=np.int32, count=length),
            prompt_length=min(prompt, length),
            source=f"file-{number % 3}.jsonl",
            line=number + 1,
        )
        for number, (length, prompt) in enumerate(zip(lengths, prompts or [0] * len(lengths), strict=True))
    ]


def spelled_out(dataset: PackedDataset) -> list[tuple[list[int], list[int], list[int]]]:
    sequences = [dataset.sequence(i) for i in range(dataset.num_sequences)]
    return [(s.token_ids.tolist(), s.documents.tolist(), s.loss_mask.tolist()) for s in sequences]


lengths_and_prompts = st.lists(st.tuples(st.integers(1, 70), st.integers(0, 80)), min_size=1, max_size=40)
pack_settings = st.builds(
    PackSettings, max_seq_len=st.integers(2, 40), pack=st.booleans(), open_bins=st.integers(1, 8)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes=lengths_and_prompts, options=pack_settings)
def test_every_token_once_in_order_with_the_right_mask(
    shapes: list[tuple[int, int]], options: PackSettings
) -> None:
    documents = make_documents([length for length, _ in shapes] + [3], [prompt for _, prompt in shapes] + [0])
    dataset = pack(iter(documents), options)
    sequences = spelled_out(dataset)
    tokens = [token for sequence, _, _ in sequences for token in sequence]
    assert sorted(tokens) == [token for d in documents for token in d.token_ids.tolist()]
    position = {
        token: (number, place)
        for number, document in enumerate(documents)
        for place, token in enumerate(document.token_ids.tolist())
    }
    for sequence, numbers, mask in sequences:
        assert 0 < len(sequence) <= options.max_seq_len
        for t, token in enumerate(sequence):
            number, place = position[token]
            document = documents[number]
            last = place == len(document.token_ids) - 1
            assert numbers[t] == number
            assert mask[t] == (not last and place + 1 >= document.prompt_length)
            # A run of one document is a window: it starts at a multiple of the length and stays whole.
            if t and numbers[t - 1] == number:
                assert position[sequence[t - 1]] == (number, place - 1)
            else:
                assert place % options.max_seq_len == 0
                assert number not in numbers[:t]
    assert dataset.num_tokens == len(tokens)
    assert dataset.num_targets == sum(sum(mask) for _, _, mask in sequences)
    assert dataset.fill_rate == pytest.approx(len(tokens) / (len(sequences) * options.max_seq_len))
    assert dataset.sequence_lengths().tolist() == [len(sequence) for sequence, _, _ in sequences]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shapes=lengths_and_prompts, options=pack_settings)
def test_same_input_same_result(shapes: list[tuple[int, int]], options: PackSettings) -> None:
    documents = make_documents([length + 1 for length, _ in shapes], [0 for _ in shapes])
    first, second = pack(documents, options), pack(iter(documents), options)
    assert spelled_out(first) == spelled_out(second)
    assert first.fingerprint() == second.fingerprint()


def test_a_cut_window_keeps_its_last_soft_target() -> None:
    dataset = pack(make_documents([9]), PackSettings(max_seq_len=4))
    assert [mask for _, _, mask in spelled_out(dataset)] == [[1, 1, 1, 1], [1, 1, 1, 1], [0]]


def test_the_last_prompt_position_predicts_the_answer_and_is_trained() -> None:
    dataset = pack(make_documents([6], [3]), PackSettings(max_seq_len=8))
    assert spelled_out(dataset)[0][2] == [0, 0, 1, 1, 1, 0]


def test_a_prompt_longer_than_a_window_masks_into_the_next() -> None:
    dataset = pack(make_documents([9], [6]), PackSettings(max_seq_len=4))
    assert [mask for _, _, mask in spelled_out(dataset)] == [[0, 0, 0, 0], [0, 1, 1, 1], [0]]


def test_best_fit_chooses_the_tightest_open_sequence() -> None:
    dataset = pack(make_documents([6, 5, 4, 5]), PackSettings(max_seq_len=10))
    assert [sorted(set(numbers)) for _, numbers, _ in spelled_out(dataset)] == [[0, 2], [1, 3]]


def test_without_packing_every_window_has_its_own_sequence() -> None:
    dataset = pack(make_documents([2, 9, 3]), PackSettings(max_seq_len=4, pack=False))
    assert dataset.sequence_lengths().tolist() == [2, 4, 4, 1, 3]
    assert [numbers[0] for _, numbers, _ in spelled_out(dataset)] == [0, 1, 1, 1, 2]


def test_packing_fills_and_bounds_the_open_sequences() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=3000).tolist()
    dataset = pack(make_documents(lengths), PackSettings(max_seq_len=256))
    assert dataset.fill_rate > 0.97
    assert pack(make_documents(lengths), PackSettings(max_seq_len=256, pack=False)).fill_rate < 0.5


def test_spooled_tokens_are_the_same_and_leave_no_file(tmp_path: Path) -> None:
    documents = make_documents([5, 30, 7])
    in_memory = pack(documents, PackSettings(max_seq_len=8))
    spooled = pack(documents, PackSettings(max_seq_len=8), spool_folder=tmp_path, memory_bytes=0)
    assert isinstance(spooled.token_ids, np.memmap)
    assert spelled_out(spooled) == spelled_out(in_memory)
    assert spooled.fingerprint() == in_memory.fingerprint()
    assert list(tmp_path.iterdir()) == []


def test_document_source_names_file_and_line() -> None:
    dataset = pack(make_documents([5, 5, 5, 5]), PackSettings(max_seq_len=8))
    assert [dataset.document_source(i) for i in range(4)] == [f"file-{i % 3}.jsonl:{i + 1}" for i in range(4)]
    assert dataset.num_documents == 4
    with pytest.raises(IndexError):
        dataset.document_source(4)
    with pytest.raises(IndexError):
        dataset.sequence(-1)


@pytest.mark.parametrize(
    "change",
    [
        lambda documents: [replace(documents[0], token_ids=documents[0].token_ids + 1), *documents[1:]],
        lambda documents: [replace(documents[0], prompt_length=3), *documents[1:]],
        lambda documents: documents[::-1],
        lambda documents: documents[:-1],
    ],
)
def test_fingerprint_sees_tokens_masks_and_order(change: Any) -> None:
    documents = make_documents([5, 4, 3])
    options = PackSettings(max_seq_len=16)
    assert pack(documents, options).fingerprint() != pack(change(documents), options).fingerprint()


def test_fingerprint_sees_settings_and_boundaries_but_not_file_names() -> None:
    documents = make_documents([4, 4])
    options = PackSettings(max_seq_len=16)
    first = pack(documents, options).fingerprint()
    joined = replace(documents[0], token_ids=np.concatenate([d.token_ids for d in documents]))
    assert pack([joined], options).fingerprint() != first
    assert pack(documents, replace(options, max_seq_len=17)).fingerprint() != first
    renamed = [replace(document, source="elsewhere", line=9) for document in documents]
    assert pack(renamed, options).fingerprint() == first


def test_fingerprint_is_pinned() -> None:
    dataset = pack(make_documents([5, 9, 2], [0, 3, 0]), PackSettings(max_seq_len=8))
    assert dataset.fingerprint() == "7509a23123f6a8e552f4049ee3e283a72a6fd7e25344438a4e176941c872d896"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes=lengths_and_prompts, wanted=st.integers(1, 900), seed=st.integers(0, 3))
def test_sample_has_enough_targets(shapes: list[tuple[int, int]], wanted: int, seed: int) -> None:
    documents = make_documents([length for length, _ in shapes] + [3], [prompt for _, prompt in shapes] + [0])
    dataset = pack(documents, PackSettings(max_seq_len=20))
    chosen = dataset.sample_sequences(wanted, seed=seed)
    assert np.all(np.diff(chosen) > 0)
    targets = sum(int(dataset.sequence(int(i)).loss_mask.sum()) for i in chosen)
    assert targets >= min(wanted, dataset.num_targets)


def test_sample_is_spread_and_seeded() -> None:
    dataset = pack(make_documents([64] * 1000), PackSettings(max_seq_len=64))
    chosen = dataset.sample_sequences(63 * 100, seed=1)
    assert np.array_equal(chosen // 10, np.arange(100))
    assert np.array_equal(chosen, dataset.sample_sequences(63 * 100, seed=1))
    assert not np.array_equal(chosen, dataset.sample_sequences(63 * 100, seed=0))


def test_nothing_to_pack_or_to_train_on() -> None:
    with pytest.raises(DataError, match="found none"):
        pack([], PackSettings())
    with pytest.raises(DataError, match="at least one position to train on, found 2 tokens"):
        pack(make_documents([1, 1]), PackSettings())


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="max_seq_len: must be at least 2, found 1"):
        PackSettings(max_seq_len=1)
    with pytest.raises(UsageError, match="open_bins: must be at least 1, found 0"):
        PackSettings(open_bins=0)
