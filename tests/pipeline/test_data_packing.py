"""Packing: nothing lost, nothing twice, nothing across documents, the right masks."""

import errno
import io
import itertools
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import PackedDataset, PackSettings, TokenizedDocument, pack
from schemas.errors import DataError, UsageError


def make_documents(
    lengths: list[int], prompts: list[int] | None = None, *, gaps: bool = False
) -> list[TokenizedDocument]:
    """Documents whose token ids are all different, so that every token can be traced."""
    ids = itertools.count(100)
    return [
        TokenizedDocument(
            token_ids=np.fromiter(ids, dtype=np.int32, count=length),
            prompt_length=min(prompt, length),
            source=f"file-{number % 3}.jsonl",
            line=number + 1,
            gaps=gaps_after(prompt, length) if gaps and number % 2 else (),
        )
        for number, (length, prompt) in enumerate(zip(lengths, prompts or [0] * len(lengths), strict=True))
    ]


def gaps_after(prompt: int, length: int) -> tuple[tuple[int, int], ...]:
    """Prompts after answers of a document that begins with one; none where that is none."""
    found = ((prompt + 2, prompt + 3), (prompt + 5, prompt + 23)) if prompt else ()
    return tuple((start, min(stop, length)) for start, stop in found if start < length)


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
    documents = make_documents(
        [length for length, _ in shapes] + [3], [prompt for _, prompt in shapes] + [0], gaps=True
    )
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
            in_gap = any(start <= place + 1 < stop for start, stop in document.gaps)
            assert mask[t] == (not last and place + 1 >= document.prompt_length and not in_gap)
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


def test_a_prompt_after_an_answer_masks_over_the_edge_of_a_window() -> None:
    (document,) = make_documents([12])
    dataset = pack([replace(document, prompt_length=2, gaps=((4, 7), (10, 12)))], PackSettings(max_seq_len=5))
    assert [mask for _, _, mask in spelled_out(dataset)] == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0]]
    assert dataset.num_targets == 5


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


COLUMNS = (
    "token_ids",
    "sequence_windows",
    "window_tokens",
    "window_documents",
    "window_masked",
    "window_ends",
    "gap_windows",
    "gap_starts",
    "gap_stops",
    "document_sources",
    "document_lines",
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shapes=lengths_and_prompts, options=pack_settings, memory_bytes=st.integers(0, 300))
def test_what_is_spooled_is_the_same(
    shapes: list[tuple[int, int]], options: PackSettings, memory_bytes: int
) -> None:
    documents = make_documents(
        [length for length, _ in shapes] + [3], [prompt for _, prompt in shapes] + [0], gaps=True
    )
    in_memory = pack(documents, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.packing._ROWS_AT_ONCE", 5)
        spooled = pack(documents, options, memory_bytes=memory_bytes)
    for name in COLUMNS:
        one, two = getattr(in_memory, name), getattr(spooled, name)
        assert not isinstance(one, np.memmap)
        assert isinstance(two, np.memmap) == (one.nbytes > memory_bytes), name
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    assert spelled_out(spooled) == spelled_out(in_memory)
    assert (spooled.fingerprint(), spooled.num_targets) == (in_memory.fingerprint(), in_memory.num_targets)


def packed_slowly(lengths: list[int], options: PackSettings) -> list[list[tuple[int, int]]]:
    """(document, length) of the windows of every sequence, by looking at every open sequence every time."""
    done: list[list[tuple[int, int]]] = []
    open_ones: list[list[tuple[int, int]]] = []

    def room(sequence: list[tuple[int, int]]) -> int:
        return options.max_seq_len - sum(length for _, length in sequence)

    for number, total in enumerate(lengths):
        for start in range(0, total, options.max_seq_len):
            length = min(options.max_seq_len, total - start)
            best = min((s for s in open_ones if room(s) >= length), key=room, default=None)
            if best is None:
                if len(open_ones) >= options.open_bins:
                    done.append(open_ones.pop(open_ones.index(min(open_ones, key=room))))
                best = []
                open_ones.append(best)
            best.append((number, length))
            if room(best) == 0 or not options.pack:
                open_ones.remove(best)
                done.append(best)
    return done + open_ones


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(2, 50), min_size=1, max_size=60), options=pack_settings)
def test_windows_lie_where_the_slow_rule_puts_them(lengths: list[int], options: PackSettings) -> None:
    dataset = pack(make_documents(lengths), options)
    sizes = np.diff(dataset.window_tokens).tolist()
    windows = list(zip(dataset.window_documents.tolist(), sizes, strict=True))
    bounds = itertools.pairwise(dataset.sequence_windows.tolist())
    assert [windows[start:stop] for start, stop in bounds] == packed_slowly(lengths, options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (PackSettings(64), "0eb739a18b6e844bea2cf8c7155c1120c14984b8a9049da70c0c949b543800d2"),
        (PackSettings(64, open_bins=3), "f83b8e86088c250e3a3dfa92ed3ecbc66ea1c305c81b61cb471fa3fc73061f89"),
        (PackSettings(64, pack=False), "789efee3768caaace38cac0fa72e0a255d01dfcce5c8da7f2b0791886ca09055"),
    ],
)
def test_fingerprints_of_much_text_are_pinned(options: PackSettings, expected: str) -> None:
    rng = np.random.default_rng(5)

    def documents() -> Iterator[TokenizedDocument]:
        for number in range(3000):
            length = int(rng.integers(1, 200))
            token_ids = rng.integers(0, 49152, length, dtype=np.int32)
            prompt = int(rng.integers(0, length + 1)) if number % 3 == 0 else 0
            yield TokenizedDocument(token_ids, prompt, "a", number + 1)

    dataset = pack(documents(), options, memory_bytes=10_000)
    assert (dataset.num_targets, dataset.fingerprint()) == (247539, expected)


def test_memory_does_not_grow_with_the_text() -> None:
    def documents(count: int) -> Iterator[TokenizedDocument]:
        for number in range(count):
            yield TokenizedDocument(np.arange(number % 40 + 2, dtype=np.int32), 0, "a", number)

    def peak(count: int) -> int:
        tracemalloc.start()
        dataset = pack(documents(count), PackSettings(max_seq_len=64), memory_bytes=1 << 16)
        dataset.sample_sequences(5000)
        total = dataset.tokens_in(range(dataset.num_sequences))
        assert total == dataset.num_tokens > 20 * count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(15_000), peak(60_000)  # 1.3 and 5 MB of tokens, 0.5 and 2 MB of the rest
    assert many < 1.1 * few + 50_000
    assert many < 2 << 20


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 4000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(
        DataError, match=r"must take in the tokens .*: No space left on device after [1-9],\d+ bytes"
    ):
        pack(make_documents([300] * 9), PackSettings(), spool_folder=tmp_path, memory_bytes=1000)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"missing: must take in .*: No such file"):
        pack(make_documents([9]), PackSettings(), spool_folder=tmp_path / "missing", memory_bytes=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(shapes=lengths_and_prompts, options=pack_settings)
def test_parts_are_counted_as_the_whole(shapes: list[tuple[int, int]], options: PackSettings) -> None:
    documents = make_documents(
        [length for length, _ in shapes] + [3], [prompt for _, prompt in shapes] + [0], gaps=True
    )
    dataset = pack(documents, options)
    count = dataset.num_sequences
    lengths = dataset.sequence_lengths()
    masks = [dataset.sequence(n).loss_mask for n in range(count)]
    assert [dataset.targets_in(n) for n in range(count)] == [int(mask.sum()) for mask in masks]
    assert dataset.num_targets == sum(int(mask.sum()) for mask in masks)
    firsts = np.cumsum([0, *lengths[:-1]])
    np.testing.assert_array_equal(dataset.first_tokens(slice(None, None, 3)), firsts[::3])
    some = np.arange(count)[::2]
    np.testing.assert_array_equal(dataset.sequence_lengths(some), lengths[some])
    for run in (range(count), range(0), range(count // 2, count), range(count // 3, count // 2)):
        assert dataset.tokens_in(run) == lengths[run.start : run.stop].sum()


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
        lambda documents: [replace(documents[0], gaps=((2, 3),)), *documents[1:]],
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
    documents = make_documents(
        [length for length, _ in shapes] + [3], [prompt for _, prompt in shapes] + [0], gaps=True
    )
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
