"""Reading a cache's records: damage, other caches' records, names and links that lead elsewhere."""

import pytest
from caches import FINGERPRINT, make_dataset, write_cache

from pmetal_distill.offline.store import Store
from schemas.errors import CacheError, CorruptionError
from schemas.manifest import CommitRecord, Dataset, checksum_of, seal


def test_every_flipped_bit_of_dataset_and_records_is_caught(tmp_path):
    cache = write_cache(tmp_path / "c", shards=[0])
    dataset = make_dataset()
    for path, stride in ((cache / "dataset.json", 13), (cache / "commits/00000.json", 11)):
        data = path.read_bytes()
        for bit in range(0, 8 * len(data), stride):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(CacheError):
                Store.open(cache).record(0)
        path.write_bytes(data)
    assert Store.open(cache).record(0).num_sequences == len(dataset.shard_range(0))


def test_a_newer_version_is_named(tmp_path):
    raw = make_dataset().to_bytes().replace(b'"format_version": 1', b'"format_version": 2')
    with pytest.raises(Exception, match="format_version must be at most 1, found 2; upgrade pmetal-distill"):
        Dataset.from_bytes(raw, where="x")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.parquet", "targets-00001-{}.parquet", "a/b", "", ".x"])
def test_records_cannot_name_other_files(tmp_path, name):
    import json

    store = Store.open(write_cache(tmp_path / "c", shards=[0]))
    raw = json.loads(store.record_path(0).read_bytes())
    raw["targets"]["name"] = name.format(raw["targets"]["sha256"][:16])
    del raw["checksum"]
    with pytest.raises(CorruptionError, match="commits/0: 'targets'"):
        CommitRecord.from_bytes(seal(raw), store.dataset, where="commits/0")


def test_links_inside_a_cache_are_refused(tmp_path):
    cache = write_cache(tmp_path / "c", shards=[0])
    record = cache / "commits/00000.json"
    record.rename(tmp_path / "elsewhere.json")
    record.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CorruptionError, match=r"commits/00000.json: must be a plain readable file"):
        Store.open(cache).record(0)
    (cache / "bases").rename(tmp_path / "bases")
    (cache / "bases").symlink_to(tmp_path / "bases")
    with pytest.raises(CorruptionError, match="bases: must be a folder inside the cache"):
        Store.open(cache)


def test_a_record_of_another_cache_is_refused(tmp_path):
    a = write_cache(tmp_path / "a", shards=[0])
    b = write_cache(tmp_path / "b", make_dataset(teacher="other"), shards=[0])
    (a / "commits/00000.json").write_bytes((b / "commits/00000.json").read_bytes())
    with pytest.raises(CorruptionError, match="must be shard 0 of this dataset"):
        Store.open(a).record(0)
    assert FINGERPRINT["teacher"] != "other"


def test_checksum_needs_exactly_one_place():
    assert checksum_of(b"{}") == ""
    sealed = make_dataset().to_bytes()
    assert checksum_of(sealed).encode() in sealed
    assert checksum_of(sealed + sealed) == ""
