import dataclasses
import gc
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from caches import (
    MAX_LENGTH,
    SPEC,
    TOKENIZER,
    lengths_of,
    make_dataset,
    make_sequence,
    numbers_of,
    sidecars,
    write_cache,
    write_shard,
)

from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.writer import CacheWriter
from schemas.arrays import TokenRows
from schemas.codec import Codec, decode, encode
from schemas.errors import CorruptionError, IncompatibleError, UsageError
from schemas.grid import truncate_head


def expected_targets(dataset, number):
    """What the codec alone makes of a sequence."""
    s = make_sequence(dataset, number)
    extra = sidecars(dataset)
    codec = Codec(dataset.target, extra["basis"], extra["codebook"])
    rows = TokenRows(s.token_ids, np.full(len(s.token_ids), number, np.int32), s.documents, s.loss_mask)
    return s, decode(encode(s.targets, rows, codec)[0], codec)[1]


def test_no_footer_waits_for_the_garbage_collector(folder):
    gc.collect()
    gc.disable()
    try:
        cache = LogitCache(folder)
        list(cache.batches(batch_size=4, seed=0, epochs=1, prefetch=0))
        cache.close()
        del cache
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = {type(found).__name__ for found in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not kinds & {"FileMetaData", "ParquetSchema", "ParquetFile", "ndarray"}


def test_every_sequence_reads_back_as_written(cache):
    assert cache.num_sequences == 23
    assert cache.num_tokens == lengths_of(23).sum() == cache.lengths.sum()
    for number in cache.numbers:
        written, targets = expected_targets(cache.dataset, number)
        got = cache.sequence(number)
        for name in ("token_ids", "documents", "loss_mask"):
            np.testing.assert_array_equal(getattr(got, name), getattr(written, name))
        for a, b in zip(got.targets.parts(), targets.parts(), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(IncompatibleError, match="sequence 23: must be one of the 23"):
        cache.sequence(23)


def test_properties_describe_the_cache(cache, folder):
    assert cache.spec == SPEC
    assert (cache.rank, len(cache.bases), cache.bases[0].vocab_size) == (13, 1, 300)
    sizes = cache.bytes_per_token()
    shards = sum(p.stat().st_size for p in (folder / "shards").glob("targets*"))
    parts = {n: v for n, v in sizes.items() if n not in ("records", "hidden", "sidecars")}
    assert sum(parts.values()) * cache.num_tokens == pytest.approx(shards)
    assert sizes["sidecars"] * cache.num_tokens == sum(p.stat().st_size for p in (folder / "bases").iterdir())
    assert {p.name for p in cache.tokenizer_path.iterdir()} == set(TOKENIZER)
    assert sum(r.num_trained_tokens for r in cache.records) == cache.num_trained_tokens


def test_truncation_at_read_time(folder, cache):
    small = LogitCache(folder, k=3, rank=5)
    assert (small.spec.k, small.rank, small.bases[0].rank) == (3, 5, 5)
    for number in (0, 9, 22):
        full, got = cache.sequence(number).targets, small.sequence(number).targets
        expected = truncate_head(full, SPEC, 3)
        np.testing.assert_array_equal(got.coordinates, full.coordinates[:, :5])
        np.testing.assert_array_equal(got.head_ids, expected.head_ids)
        on = cache.sequence(number).loss_mask
        np.testing.assert_array_equal(got.tail_curve[on], expected.tail_curve[on])
    bucket = LogitCache(folder, rank=0)
    assert bucket.spec == dataclasses.replace(SPEC, tail="bucket")
    assert bucket.bases == ()
    assert bucket.sequence(0).targets.rank == 0
    assert bucket.sequence(0).basis_index == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 7}, "k must be from 1 to the stored 6, found 7"),
        ({"k": 0}, "k must be from 1"),
        ({"rank": 14}, "rank must be from 0 to the stored 13, found 14"),
        ({"hidden_layers": (2,)}, r"must be among the stored \(1, 3\), found \[2\]"),
    ],
)
def test_what_is_not_stored_is_refused(folder, options, message):
    with pytest.raises(IncompatibleError, match=message):
        LogitCache(folder, **options)


def test_options_out_of_bounds_are_refused(cache, folder):
    for options in (
        {"batch_size": 0},
        {"rank": 2, "world_size": 2},
        {"prefetch": -1},
        {"length": MAX_LENGTH - 1},
    ):
        with pytest.raises(IncompatibleError, match="batches: "):
            cache.batches(**({"batch_size": 2, "seed": 0} | options))
    with pytest.raises(UsageError, match="verify_hashes must be lazy, eager or never, found 'no'"):
        LogitCache(folder, verify_hashes="no")
    with pytest.raises(UsageError, match=r"must be a cache folder, found no dataset\.json"):
        LogitCache(folder / "shards")


def test_an_incomplete_cache_is_refused_unless_allowed(tmp_path):
    folder = write_cache(tmp_path / "c", shards=[0, 3])
    with pytest.raises(IncompatibleError, match="all shards must be committed, found 2 of 5"):
        LogitCache(folder)
    cache = LogitCache(folder, allow_partial=True)
    assert cache.numbers.tolist() == [*range(5), *range(15, 20)]
    assert sorted(chain(*numbers_of(cache.batches(batch_size=3, seed=0, epochs=1)))) == cache.numbers.tolist()
    assert cache.sequence(17).number == 17
    nothing = LogitCache(write_cache(tmp_path / "n", shards=[]), allow_partial=True)
    with pytest.raises(IncompatibleError, match="there must be sequences to read"):
        nothing.batches(batch_size=1, seed=0)


def test_shards_may_have_different_bases(tmp_path):
    with CacheWriter.create_or_resume(tmp_path / "c", make_dataset(), TOKENIZER) as writer:
        for shard in range(5):
            write_shard(writer, shard, seed=shard % 2)
    cache = LogitCache(tmp_path / "c")
    assert len(cache.bases) == 2
    batch = next(cache.batches(batch_size=23, seed=0, shuffle=False))
    shard = batch.numbers // 5
    assert (batch.basis_index == shard % 2).all()
    for basis, name in zip(cache.bases, cache.basis_names, strict=True):
        assert basis.to_bytes() == (tmp_path / "c/bases" / name).read_bytes()


def test_hidden_states_come_with_their_tokens_and_cost_nothing_unused(folder, cache, monkeypatch):
    with_states = LogitCache(folder, hidden_layers=(3,))
    for number in (0, 11, 22):
        got = with_states.sequence(number)
        written = make_sequence(cache.dataset, number)
        exact = np.where(written.loss_mask[:, None], written.hidden[3], 0)
        scale = np.abs(np.pad(exact, ((0, 0), (0, 4))).reshape(len(exact), 3, 8)).max(2) / 127
        bound = np.repeat(scale, 8, axis=1)[:, :20] * 0.51 + 1e-6
        assert (np.abs(got.hidden[3] - exact) <= bound).all()
    batch = next(with_states.batches(batch_size=4, seed=0))
    assert batch.hidden[3].shape == (*batch.token_ids.shape, 20)
    monkeypatch.setattr(
        "pmetal_distill.offline.shard_reader.ShardReader.hidden", lambda *a: pytest.fail("read")
    )
    assert next(cache.batches(batch_size=4, seed=0, prefetch=0)).hidden == {}


def test_a_copy_that_lost_an_empty_folder_still_reads(tmp_path):
    golden = Path(__file__).parents[2] / "golden" / "v1-bucket"
    copy = Path(shutil.copytree(golden, tmp_path / "c"))
    shutil.rmtree(copy / "bases", ignore_errors=True)
    assert LogitCache(copy).num_sequences > 0
    (copy / "bases").symlink_to(tmp_path)
    with pytest.raises(CorruptionError, match="bases"):
        LogitCache(copy)
