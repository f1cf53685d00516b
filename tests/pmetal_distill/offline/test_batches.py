"""Batches of a cache: their order, its state, ranks, and the thread that reads ahead."""

import gc
import threading
import time
from itertools import chain, pairwise

import numpy as np
import pytest
from caches import damage_shard, make_dataset, numbers_of, write_cache

from pmetal_distill.offline.batch import next_token_labels
from pmetal_distill.offline.order import splitmix64
from pmetal_distill.offline.reader import LogitCache
from schemas.errors import CorruptionError, IncompatibleError


def test_batches_are_padded_sequences(cache):
    with cache.batches(batch_size=4, seed=1, epochs=1, pad_multiple=8) as batches:
        for batch in batches:
            longest = max(int(cache.lengths[n]) for n in batch.numbers)
            assert batch.token_ids.shape[1] == -(-longest // 8) * 8
            for row, number in enumerate(batch.numbers):
                s, n = cache.sequence(int(number)), int(cache.lengths[number])
                np.testing.assert_array_equal(batch.token_ids[row, :n], s.token_ids)
                np.testing.assert_array_equal(batch.documents[row, :n], s.documents)
                np.testing.assert_array_equal(batch.loss_mask[row, :n], s.loss_mask)
                for a, b in zip(batch.targets.parts(), s.targets.parts(), strict=True):
                    np.testing.assert_array_equal(a[row, :n], b)
                    assert not a[row, n:].any()
                assert (batch.documents[row, n:] == -1).all()
                assert not batch.loss_mask[row, n:].any()
                assert batch.basis_index[row] == 0


def test_labels_are_the_next_token_of_the_same_document():
    token_ids = np.array([[5, 6, 7, 8, 9, 0, 0]], np.int32)
    documents = np.array([[0, 0, 1, 1, 2, -1, -1]], np.int32)
    assert next_token_labels(token_ids, documents).tolist() == [[6, -100, 8, -100, -100, -100, -100]]


@pytest.mark.parametrize("window", [1, 2, 100])
def test_an_epoch_reads_everything_once_and_mixes_only_inside_windows(cache, window):
    batches = cache.batches(batch_size=1, seed=3, epochs=1, window=window)
    order = [n for (n,) in numbers_of(batches)]
    assert sorted(order) == list(range(23))
    groups = [cache._index.group_of(n) for n in order]
    if window == 1:
        assert all(a == b or a not in groups[i + 1 :] for i, (a, b) in enumerate(pairwise(groups)))
    assert order != sorted(order)


def test_the_order_is_a_function_of_seed_and_epoch(cache, folder):
    def run(seed, count=18):
        return numbers_of(cache.batches(batch_size=4, seed=seed), count)

    first = run(0)
    assert first == run(0) == numbers_of(LogitCache(folder).batches(batch_size=4, seed=0, prefetch=0), 18)
    assert first != run(1)
    flat = [n for batch in first for n in batch]
    epochs = [flat[i : i + 23] for i in (0, 23, 46)]
    assert all(sorted(e) == list(range(23)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_without_shuffling_the_order_is_that_of_the_data(cache):
    batches = cache.batches(batch_size=23, seed=5, epochs=1, shuffle=False)
    assert numbers_of(batches) == [list(range(23))]


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 11, 17])
def test_resuming_equals_never_having_stopped(cache, folder, stop):
    whole = numbers_of(cache.batches(batch_size=4, seed=2, window=2), 20)
    batches = cache.batches(batch_size=4, seed=2, window=2)
    assert numbers_of(batches, stop) == whole[:stop]
    state = batches.get_state()
    resumed = LogitCache(folder).batches(batch_size=4, seed=2, window=2, state=state)
    assert resumed.get_state() == state
    assert numbers_of(resumed, 20 - stop) == whole[stop:]
    batches.set_state(state)
    assert numbers_of(batches, 20 - stop) == whole[stop:]


def test_state_advances_when_a_batch_is_handed_out_not_when_it_is_prefetched(cache):
    batches = cache.batches(batch_size=4, seed=0, prefetch=4)
    next(batches)
    time.sleep(0.3)
    assert batches.get_state()["position"] == 4


def test_a_batch_can_be_seen_before_it_is_handed_out(cache):
    wanted = numbers_of(cache.batches(batch_size=4, seed=0, epochs=2))
    with cache.batches(batch_size=4, seed=0, epochs=2) as batches:
        assert batches.peek() is None  # nothing runs before the first one is asked for
        found, seen = [], 0
        for batch in batches:
            found.append(batch.numbers.tolist())
            state, upcoming = batches.get_state(), batches.peek()
            assert batches.get_state() == state
            if upcoming is not None:
                seen += 1
                assert batches.peek() is upcoming
                assert upcoming.numbers.tolist() == wanted[len(found)]
            else:
                time.sleep(0.05)
        assert batches.peek() is None
    assert found == wanted
    assert seen > 0
    with cache.batches(batch_size=4, seed=0, prefetch=0) as batches:
        next(batches)
        assert batches.peek() is None


def test_what_was_only_seen_is_forgotten_with_a_new_state(cache):
    with cache.batches(batch_size=4, seed=0) as batches:
        first = next(batches)
        start = cache.batches(batch_size=4, seed=0).get_state()
        while batches.peek() is None:
            time.sleep(0.01)
        batches.set_state(start)
        assert next(batches).numbers.tolist() == first.numbers.tolist()


def test_the_state_is_a_few_integers_and_a_hash(cache):
    state = cache.batches(batch_size=4, seed=0).get_state()
    root = state.pop("root")
    assert len(root) == 64
    assert state == {"epoch": 0, "position": 0, "seed": 0, "window": 16, "batch_size": 4}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_same_global_batches_whatever_their_number(cache, world_size):
    whole = numbers_of(cache.batches(batch_size=5, seed=9), 12)
    parts = [
        numbers_of(cache.batches(batch_size=5, seed=9, rank=r, world_size=world_size), 12)
        for r in range(world_size)
    ]
    assert [[*chain(*p)] for p in zip(*parts, strict=True)] == whole
    sizes = {len(p) for part in parts for p in part}
    assert max(sizes) - min(sizes) <= 1


def test_ranks_pad_alike_and_the_world_may_change_at_a_resume(cache):
    two = [cache.batches(batch_size=6, seed=4, rank=r, world_size=2, pad_multiple=1) for r in range(2)]
    shapes = [[next(it).token_ids.shape for _ in range(3)] for it in two]
    assert shapes[0] == shapes[1]
    rest = numbers_of(cache.batches(batch_size=6, seed=4, state=two[1].get_state()), 4)
    assert rest == numbers_of(cache.batches(batch_size=6, seed=4), 7)[3:]


def test_an_empty_share_has_the_right_shapes(cache):
    *_, last = cache.batches(batch_size=22, seed=0, epochs=1, rank=0, world_size=2)
    assert last.targets.shapes() == ((0, 32, 6), (0, 32, 6), (0, 32, 7), (0, 32, 13))


def test_a_subset_is_all_that_is_read(cache):
    subset = [1, 2, 3, 17, 22]
    seen = [n for b in numbers_of(cache.batches(batch_size=2, seed=0, epochs=1, subset=subset)) for n in b]
    assert sorted(seen) == subset
    with pytest.raises(IncompatibleError, match=r"subset must name sequences of the cache, found \[23\]"):
        cache.batches(batch_size=2, seed=0, subset=[1, 23])
    with pytest.raises(IncompatibleError, match="there must be sequences to read"):
        cache.batches(batch_size=2, seed=0, subset=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed must be 0, found 1"),
        ({"window": 3}, "window must be 16, found 3"),
        ({"batch_size": 5}, "batch_size must be 4, found 5"),
        ({"root": "0" * 64}, "root must be"),
        ({"position": -1}, "'position': must be an integer"),
        ({"extra": 1}, "unknown \\['extra'\\]"),
    ],
)
def test_a_state_of_another_order_is_refused(cache, change, message):
    state = cache.batches(batch_size=4, seed=0).get_state() | change
    with pytest.raises(IncompatibleError, match=message):
        cache.batches(batch_size=4, seed=0, state=state)


def test_a_state_names_its_cache_and_subset(cache, tmp_path):
    other = LogitCache(write_cache(tmp_path / "o", make_dataset(teacher="t")))
    state = cache.batches(batch_size=4, seed=0).get_state()
    with pytest.raises(IncompatibleError, match="root must be"):
        other.batches(batch_size=4, seed=0, state=state)
    with pytest.raises(IncompatibleError, match="root must be"):
        cache.batches(batch_size=4, seed=0, state=state, subset=range(22))


def threads():
    return [t for t in threading.enumerate() if t.name == "batches"]


def test_the_prefetch_thread_ends_with_its_iterator(cache):
    kept = cache.batches(batch_size=2, seed=0)
    next(kept)
    assert len(threads()) == 1
    kept.close()
    assert threads() == []
    after = next(kept).numbers.tolist()
    assert after == numbers_of(cache.batches(batch_size=2, seed=0), 2)[1]
    del kept
    gc.collect()
    assert threads() == []


def test_what_the_thread_raises_reaches_the_consumer_in_its_place(tmp_path):
    folder = write_cache(tmp_path / "c")
    cache = LogitCache(folder)
    damage_shard(folder, 3)
    batches = cache.batches(batch_size=5, seed=0, shuffle=False, prefetch=3)
    assert numbers_of(batches, 3) == [[*range(i, i + 5)] for i in (0, 5, 10)]
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"shards/targets-00003-.*: must have SHA-256"):
            next(batches)
    assert batches.get_state()["position"] == 15
    assert threads() == []


def test_decoded_row_groups_are_bounded_by_the_window(cache, monkeypatch):
    loaded, alive = [], []
    original = LogitCache._load

    class Held(dict):
        pass

    def load(self, index, reader):
        import weakref

        held = Held(original(self, index, reader))
        loaded.append(index)
        alive.append(weakref.ref(held))
        return held

    monkeypatch.setattr(LogitCache, "_load", load)
    most = 0
    for _ in cache.batches(batch_size=2, seed=0, window=2, epochs=1, prefetch=0):
        most = max(most, sum(r() is not None for r in alive))
    assert most <= 2
    assert sorted(loaded) == list(range(len(cache._index.groups)))


def test_splitmix_matches_its_published_outputs():
    assert splitmix64(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
