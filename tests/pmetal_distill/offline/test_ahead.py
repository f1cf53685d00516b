"""Row groups loaded ahead: the same batches with any number of threads, bounded memory, errors, an end."""

import gc
import threading
import time
import weakref
from dataclasses import replace
from itertools import islice

import pytest
from caches import damage_shard, make_dataset, write_cache

from pmetal_distill.offline.ahead import GroupsAhead, default_threads
from pmetal_distill.offline.batches import BatchIterator
from pmetal_distill.offline.reader import LogitCache
from schemas.errors import CorruptionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cache") / "c", make_dataset())


@pytest.fixture
def cache(folder):
    return LogitCache(folder)


def reading(cache, threads, **options):
    """An iterator with so many loading threads."""
    batches = cache.batches(**({"batch_size": 4, "seed": 2} | options))
    feed = replace(batches._feed, threads=threads)
    return BatchIterator(feed, batches._position, prefetch=options.get("prefetch", 2))


def content(batches, count):
    with batches:
        return [
            (b.numbers.tolist(), b.token_ids.tobytes(), *(a.tobytes() for a in b.targets.parts()), str(s))
            for b, s in ((b, batches.get_state()) for b in islice(batches, count))
        ]


def loaders():
    return [t for t in threading.enumerate() if t.name.startswith(("row groups", "batches"))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 2},
        {"window": 1, "batch_size": 9},
        {"window": 3, "epochs": 2},
        {"window": 2, "rank": 1, "world_size": 3},
        {"window": 2, "subset": [0, 3, 9, 10, 11, 20, 22]},
        {"window": 2, "shuffle": False},
    ],
    ids=str,
)
def test_threads_change_nothing(cache, options):
    alone = content(reading(cache, 0, prefetch=0, **options), 20)
    for threads, prefetch in ((1, 1), (3, 2), (4, 5)):
        assert content(reading(cache, threads, prefetch=prefetch, **options), 20) == alone
    batches = reading(cache, 2, **options)
    list(islice(batches, 4))
    state = batches.get_state()
    assert content(reading(cache, 3, state=state, **options), 16) == alone[4:]
    batches.close()


def counting(monkeypatch):
    """Loads of row groups, in order, and weak references to what they gave."""
    loaded, alive, lock = [], [], threading.Lock()
    original = LogitCache._load

    class Held(dict):
        pass

    def load(self, index, reader):
        held = Held(original(self, index, reader))
        with lock:
            loaded.append(index)
            alive.append(weakref.ref(held))
        return held

    monkeypatch.setattr(LogitCache, "_load", load)
    return loaded, lambda: sum(r() is not None for r in alive)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_row_groups_are_loaded_once_an_epoch_and_bounded(cache, monkeypatch, threads):
    loaded, alive = counting(monkeypatch)
    most = 0
    with reading(cache, threads, batch_size=2, window=2, epochs=3, prefetch=int(threads > 0)) as batches:
        for _ in batches:
            most = max(most, alive())
    assert 2 <= most <= 2 + (threads + 1 if threads else 0)
    assert len(loaded) <= 3 * len(cache._index.groups)
    assert set(loaded) == set(range(len(cache._index.groups)))


def test_a_cache_that_fits_into_the_window_is_loaded_once(cache, monkeypatch):
    loaded, _ = counting(monkeypatch)
    content(reading(cache, 2, epochs=5), 100)
    assert sorted(loaded) == list(range(len(cache._index.groups)))


def test_the_next_groups_are_loading_before_they_are_asked_for():
    begun, go = [], threading.Event()

    def load(group):
        begun.append(group)
        assert go.wait(10)
        return -group

    with GroupsAhead(load, iter([5, 3, 8, 1]), threads=3, room=3, keep=False) as groups:
        groups.look_ahead()
        while len(begun) < 3:
            time.sleep(0.001)
        assert sorted(begun) == [3, 5, 8]
        go.set()
        assert groups.take(5) == -5
        groups.look_ahead()
        assert len(begun) == 3
        groups.release(5)
        groups.look_ahead()
        assert [groups.take(g) for g in (3, 8, 1)] == [-3, -8, -1]


def test_a_group_that_comes_again_while_it_is_held_is_not_loaded_again():
    loads = []
    uses = iter([1, 2, 1, 2])
    with GroupsAhead(lambda g: loads.append(g), uses, threads=1, room=4, keep=False) as groups:
        groups.look_ahead()
        for group in (1, 2, 1, 2):
            groups.take(group)
            groups.release(group)
    assert sorted(loads) == [1, 2]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_arrives_in_its_place(tmp_path, threads):
    folder = write_cache(tmp_path / "c", make_dataset())
    cache = LogitCache(folder)
    damage_shard(folder, 3)
    batches = reading(cache, threads, batch_size=5, shuffle=False)
    assert [b.numbers.tolist() for b in islice(batches, 3)] == [[*range(i, i + 5)] for i in (0, 5, 10)]
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"shards/targets-00003-.*: must have SHA-256"):
            next(batches)
    assert batches.get_state()["position"] == 15
    assert loaders() == []


def test_closing_stops_all_threads_and_waits_for_no_further_load(cache, monkeypatch):
    loaded, _ = counting(monkeypatch)
    batches = reading(cache, 2, batch_size=2, window=3)
    next(batches)
    assert loaders()
    batches.close()
    assert loaders() == []
    before = len(loaded)
    time.sleep(0.05)
    assert len(loaded) == before
    next(batches)
    assert loaders()
    del batches
    gc.collect()
    assert loaders() == []


def test_nothing_runs_ahead_without_prefetching(cache, monkeypatch):
    loaded, _ = counting(monkeypatch)
    batches = cache.batches(batch_size=1, seed=0, prefetch=0)
    next(batches)
    assert loaders() == []
    assert len(loaded) == 1


def test_threads_by_cores(monkeypatch):
    found = []
    for cores in (None, 1, 2, 4, 6, 16):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        found.append(default_threads())
    assert found == [1, 1, 1, 2, 3, 4]
