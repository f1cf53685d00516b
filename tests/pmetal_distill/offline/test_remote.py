"""Caches in object storage: a real S3 server process on loopback, and one that fails on purpose."""

import itertools
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import hidden_spec, make_dataset, write_cache
from proxies import faulty_proxy

from pmetal_distill.offline import remote, transfer
from pmetal_distill.offline.mirror import VARIABLE, Mirror
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.remote import RemoteFolder, is_url
from pmetal_distill.offline.store import Store
from pmetal_distill.offline.transfer import Pull, files_of, push
from pmetal_distill.offline.verify import verify_cache
from schemas.errors import CacheError, CorruptionError, UsageError
from schemas.manifest import FileRef

NAMES = itertools.count()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMETAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "c", make_dataset(hidden=hidden_spec()))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Host and port of a moto server."""
    pytest.importorskip("moto", reason="the S3 server of the tests, moto[server], is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    process.wait()


@pytest.fixture
def s3(server: str) -> str:
    """The URL of a folder that does not exist yet."""
    options = f"endpoint_override={server}&scheme=http&allow_bucket_creation=true&region=us-east-1"
    return f"s3://key:secret@bucket{next(NAMES)}/some/folder?{options}"


@pytest.fixture
def url(folder: Path, tmp_path: Path) -> str:
    """A cache behind file://, as fast as a disk."""
    shutil.copytree(folder, tmp_path / "store")
    return f"file://{tmp_path}/store"


def same_content(one: LogitCache, two: LogitCache) -> bool:
    for number in one.numbers.tolist():
        a, b = one.sequence(number), two.sequence(number)
        assert a.token_ids.tolist() == b.token_ids.tolist()
        for x, y in zip(a.targets.parts(), b.targets.parts(), strict=True):
            np.testing.assert_array_equal(x, y)
    return one.root == two.root


def damage(path: Path) -> None:
    """Flips a bit; a second time flips it back."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@contextmanager
def flipped(path: Path) -> Iterator[None]:
    damage(path)
    yield
    damage(path)


def verify_or_error(folder: Path) -> bool:
    try:
        return verify_cache(folder).ok
    except CacheError:
        return False


class TestS3:
    def test_push_read_in_place_and_pull(self, folder: Path, s3: str, tmp_path: Path) -> None:
        sent = push(folder, s3)
        assert sent.present == 0
        assert sent.num_bytes == sum(ref.num_bytes for ref in files_of(Store.open(folder)).values())
        local = LogitCache(folder, hidden_layers=(1,))
        cache = LogitCache(s3, hidden_layers=(1,))
        assert same_content(local, cache)
        with (
            local.batches(batch_size=4, seed=3, epochs=1) as a,
            cache.batches(batch_size=4, seed=3, epochs=1) as b,
        ):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x.token_ids, y.token_ids)
        assert (cache.tokenizer_path / "tokenizer.json").read_bytes() == b"{}"
        got = Pull(s3, tmp_path / "pulled").run()
        assert got.num_bytes == sent.num_bytes
        assert verify_cache(tmp_path / "pulled").ok
        assert same_content(local, LogitCache(tmp_path / "pulled", hidden_layers=(1,)))

    def test_pushing_again_moves_only_what_is_new(self, tmp_path: Path, s3: str) -> None:
        dataset = make_dataset()
        part = write_cache(tmp_path / "c", dataset, shards=[0, 2])
        push(part, s3)
        assert LogitCache(s3, allow_partial=True).num_sequences < dataset.num_sequences
        write_cache(part, dataset)
        again = push(part, s3)
        assert again.present > 0
        assert 0 < again.num_bytes < sum(ref.num_bytes for ref in files_of(Store.open(part)).values())
        assert same_content(LogitCache(part), LogitCache(s3))

    def test_nothing_there(self, s3: str) -> None:
        with pytest.raises((UsageError, CacheError)) as caught:
            LogitCache(s3)
        assert "secret" not in str(caught.value)
        assert "bucket" in str(caught.value)


class TestMirror:
    def test_shards_come_when_they_are_read_and_only_once(self, url: str, tmp_path: Path) -> None:
        cache = LogitCache(url)
        mirror = cache.store.mirror
        assert mirror is not None
        assert not list((mirror.root / "shards").iterdir())
        cache.sequence(0)
        assert len(list((mirror.root / "shards").iterdir())) == 1
        shutil.rmtree(tmp_path / "store" / "shards")
        LogitCache(url).sequence(0)  # from the mirror
        with pytest.raises(CorruptionError, match="no such file"):
            LogitCache(url).sequence(22)

    def test_room_is_bounded_and_what_was_read_last_stays(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = [record.targets.num_bytes for record in LogitCache(url).records]
        limit = max(sizes) * 2 + 1
        monkeypatch.setenv(VARIABLE, str(limit / 1e9))
        cache = LogitCache(url)
        assert cache.store.mirror is not None
        shards = cache.store.mirror.root / "shards"
        for number in (0, 5, 10, 15, 20, 0, 22):
            cache._reader.close()  # files kept open would stay readable without being there
            cache.sequence(number)
            assert sum(path.stat().st_size for path in shards.iterdir()) <= limit
        left = {path.name for path in shards.iterdir()}
        assert cache.records[4].targets.name in left
        assert cache.records[0].targets.name in left

    def test_a_damaged_local_copy_is_fetched_again(self, url: str) -> None:
        first = LogitCache(url)
        first.sequence(0)
        assert first.store.mirror is not None
        for folder in ("shards", "bases"):
            for path in (first.store.mirror.root / folder).iterdir():
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
        assert LogitCache(url).sequence(0).token_ids.tolist() == first.sequence(0).token_ids.tolist()

    def test_a_damaged_remote_file_is_an_error_that_names_it(self, url: str, tmp_path: Path) -> None:
        record = LogitCache(url).records[0]
        path = tmp_path / "store" / "shards" / record.targets.name
        data = bytearray(path.read_bytes())
        data[9] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match=record.targets.name):
            LogitCache(url).sequence(0)

    def test_an_endless_file_fills_no_disk(self, url: str, tmp_path: Path) -> None:
        record = LogitCache(url).records[0]
        with (tmp_path / "store" / "shards" / record.targets.name).open("ab") as file:
            file.truncate(1 << 34)
        with pytest.raises(CorruptionError, match="more than"):
            LogitCache(url).sequence(0)
        drafts = list((tmp_path / "home").rglob("*-" + record.targets.name))
        assert not drafts

    def test_another_data_set_at_the_same_place_replaces_the_old_one(self, url: str, tmp_path: Path) -> None:
        LogitCache(url).sequence(0)
        shutil.rmtree(tmp_path / "store")
        other = write_cache(tmp_path / "store", make_dataset(num_sequences=9, data="sha256:dddd"))
        assert same_content(LogitCache(other), LogitCache(url))

    def test_a_shard_committed_later_is_seen(self, tmp_path: Path) -> None:
        dataset = make_dataset()
        part = write_cache(tmp_path / "c", dataset, shards=[0, 1])
        before = LogitCache(f"file://{part}", allow_partial=True)
        write_cache(part, dataset)
        assert LogitCache(f"file://{part}").num_sequences == dataset.num_sequences > before.num_sequences

    @pytest.mark.parametrize("text", ["many", "-1", "nan"])
    def test_a_limit_that_is_no_number(self, url: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(UsageError, match=VARIABLE):
            LogitCache(url)


class Flaky:
    """A file system; every kind of call fails `failures` times in a row before each one that works."""

    def __init__(self, inner: Any, failures: int) -> None:
        self._inner, self._failures = inner, failures
        self._left: dict[str, int] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left = self._left.get(name, self._failures)
            self._left[name] = left - 1 if left else self._failures
            if left:
                raise OSError("connection reset")
            return getattr(self._inner, name)(*args, **kwargs)

        return call


def make_flaky(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    original = remote._open

    def flaky(url: str, name: str) -> tuple[Any, str]:
        files, root = original(url, name)
        return Flaky(files, failures), root

    monkeypatch.setattr(remote, "_open", flaky)


class TestRetries:
    def test_a_few_failures_are_waited_out(
        self, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_flaky(monkeypatch, remote.ATTEMPTS - 1)
        assert same_content(LogitCache(folder), LogitCache(url))

    def test_more_are_an_error_that_says_so(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        make_flaky(monkeypatch, remote.ATTEMPTS)
        with pytest.raises(CacheError, match=f"connection reset in {remote.ATTEMPTS} attempts"):
            LogitCache(url)

    def test_a_push_survives_them_too(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_flaky(monkeypatch, 1)
        monkeypatch.setattr(transfer, "AT_ONCE", 1)  # calls take turns at failing
        push(folder, f"file://{tmp_path}/there")
        assert verify_cache(tmp_path / "there").ok


class TestTransfer:
    def test_an_interrupted_pull_goes_on(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = itertools.count()
        fetch = Mirror.fetch

        def failing(self: Mirror, folder: str, ref: FileRef) -> None:
            if next(calls) == 4:
                raise CacheError("cut off")
            fetch(self, folder, ref)

        job = Pull(url, tmp_path / "p")
        monkeypatch.setattr(Mirror, "fetch", failing)
        with pytest.raises(CacheError, match="cut off"):
            job.run()
        monkeypatch.setattr(Mirror, "fetch", fetch)
        with pytest.raises(UsageError, match=r"dataset\.json"):
            LogitCache(tmp_path / "p")
        assert 4 <= Pull(url, tmp_path / "p").run().present < len(job._files)
        assert verify_cache(tmp_path / "p").ok
        assert Pull(url, tmp_path / "p").run().num_bytes == 0

    def test_a_used_folder_is_left_alone(self, url: str, tmp_path: Path) -> None:
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "thesis.txt").write_text("mine")
        with pytest.raises(UsageError, match="other files"):
            Pull(url, tmp_path / "p")
        other = write_cache(tmp_path / "o", make_dataset(num_sequences=9, data="sha256:dddd"))
        with pytest.raises(UsageError, match="found another"):
            Pull(url, other)
        assert [path.name for path in (tmp_path / "p").iterdir()] == ["thesis.txt"]
        assert verify_cache(other).ok

    def test_a_push_onto_another_data_set_is_refused(self, url: str, tmp_path: Path) -> None:
        other = write_cache(tmp_path / "o", make_dataset(num_sequences=9, data="sha256:dddd"))
        with pytest.raises(UsageError, match="found another"):
            push(other, url)

    def test_of_two_pushes_of_unlike_caches_at_once_only_one_ends(self, folder: Path, tmp_path: Path) -> None:
        there = tmp_path / "there"
        other = write_cache(tmp_path / "o", make_dataset(num_sequences=9, data="sha256:dddd"))
        began = []

        def second_begins(_: int) -> None:
            if not began:
                began.append(True)
                push(other, f"file://{there}")

        with pytest.raises(UsageError, match="found another"):
            push(folder, f"file://{there}", progress=second_begins)
        assert same_content(LogitCache(other), LogitCache(f"file://{there}"))

    def test_a_damaged_file_is_not_sent_and_goes_when_it_is_mended(
        self, folder: Path, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        url = f"file://{tmp_path}/there"
        victim = sorted((copy / "shards").iterdir())[-1]
        with flipped(victim):
            with pytest.raises(CorruptionError, match=victim.name):
                push(copy, url)
            assert not (tmp_path / "there" / "shards" / victim.name).exists()
            with pytest.raises(UsageError, match=r"dataset\.json"):
                LogitCache(url)
        push(copy, url)
        Pull(url, tmp_path / "p").run()
        assert verify_cache(tmp_path / "p").ok

    def test_a_file_that_changes_while_it_is_sent_leaves_no_object(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        monkeypatch.setattr(transfer, "hash_stream", lambda _: checked.pop(0))
        checked = [ref.sha256 for ref in files_of(Store.open(copy)).values()]
        monkeypatch.setattr(transfer, "AT_ONCE", 1)
        victim = copy / next(iter(files_of(Store.open(copy))))
        with flipped(victim), pytest.raises(CorruptionError, match=victim.name):
            push(copy, f"file://{tmp_path}/there")
        assert not (tmp_path / "there" / "shards" / victim.name).exists()

    @pytest.mark.parametrize("kind", ["shards", "bases", "tokenizer", "commits", "dataset.json"])
    def test_a_push_mends_what_is_damaged_in_the_store(
        self, folder: Path, url: str, tmp_path: Path, kind: str
    ) -> None:
        place = tmp_path / "store" / kind
        damage(sorted(place.iterdir())[0] if place.is_dir() else place)
        assert not verify_or_error(tmp_path / "store")
        push(folder, url)
        assert verify_cache(tmp_path / "store").ok

    @pytest.mark.parametrize("how", ["flipped", "link", "tokenizer", "dataset.json"])
    def test_a_pull_mends_what_is_damaged_here(
        self, folder: Path, url: str, tmp_path: Path, how: str
    ) -> None:
        here = tmp_path / "p"
        Pull(url, here).run()
        victim = sorted((here / "shards").iterdir())[0]
        if how == "link":
            victim.unlink()
            victim.symlink_to(folder / "shards" / victim.name)
        elif how == "tokenizer":
            damage(here / "tokenizer" / "tokenizer.json")
        else:
            damage(victim if how == "flipped" else here / how)
        assert not verify_or_error(here)
        Pull(url, here).run()
        assert verify_cache(here).ok


class TestObjects:
    @pytest.mark.parametrize("megabytes", [0, 1, 21])
    def test_an_etag_spares_the_read_of_an_equal_object_and_only_of_that(
        self, s3: str, megabytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = np.random.default_rng(3).bytes(megabytes << 20) + b"end"
        there, ref = RemoteFolder(s3), FileRef.of("x", data)
        there.upload("shards/x", lambda: iter([data]))
        other = data[:-1] + b"D"
        assert not there.holds("shards/x", FileRef.of("x", other), lambda: iter([other]))
        monkeypatch.setattr(remote, "_copy", None)  # reading would be an error
        pieces = [data[i : i + 999_983] for i in range(0, len(data), 999_983)]
        assert there.holds("shards/x", ref, lambda: iter(pieces))

    def test_a_push_replaces_an_object_of_the_right_size_and_moves_nothing_else(
        self, folder: Path, s3: str, tmp_path: Path
    ) -> None:
        push(folder, s3)
        path, ref = next(iter(files_of(Store.open(folder)).items()))
        RemoteFolder(s3).upload(path, lambda: iter([b"?" * ref.num_bytes]))
        again = push(folder, s3)
        assert (again.num_bytes, again.present) == (ref.num_bytes, len(files_of(Store.open(folder))) - 1)
        Pull(s3, tmp_path / "p").run()
        assert verify_cache(tmp_path / "p").ok


class TestProxies:
    @pytest.fixture
    def through(self, server: str, s3: str) -> Callable[[str], str]:
        return lambda address: s3.replace(server, address)

    def test_a_small_file_costs_one_request(
        self, folder: Path, server: str, through: Callable[[str], str]
    ) -> None:
        with faulty_proxy(server) as proxy:
            push(folder, through(proxy.address))
            first = len(proxy.seen)
            push(folder, through(proxy.address))
        files = len(files_of(Store.open(folder))) + len(Store.open(folder).committed()) + 1
        assert first < 2 * files + 40
        assert len(proxy.seen) - first < 3 * files + 40

    @pytest.mark.parametrize(("fault", "share"), [("503", 0.4), ("drop", 0.3)])
    def test_a_push_gets_through_a_bad_connection(
        self, fault: Any, share: float, folder: Path, server: str, through: Callable[[str], str]
    ) -> None:
        with faulty_proxy(server, fault=fault, share=share) as proxy:
            url = through(proxy.address)
            push(folder, url)
            assert len(proxy.seen) < 150
        assert fault in {what for _, what in proxy.seen}
        assert same_content(LogitCache(folder), LogitCache(url.replace(proxy.address, server)))

    def test_wrong_credentials_are_said_at_once(
        self, folder: Path, server: str, through: Callable[[str], str], tmp_path: Path
    ) -> None:
        for work in (
            lambda url: push(folder, url),
            lambda url: Pull(url, tmp_path / "p"),
        ):
            with faulty_proxy(server, fault="403", share=1.0) as proxy:
                with pytest.raises(CacheError, match="credentials") as caught:
                    work(through(proxy.address))
                assert len(proxy.seen) < 4
            assert "attempts" not in str(caught.value)
            assert "secret" not in str(caught.value)

    def test_a_bucket_that_is_not_there(self, folder: Path, s3: str) -> None:
        with pytest.raises(CacheError, match="credentials and bucket"):
            push(folder, s3.replace("&allow_bucket_creation=true", ""))

    def test_a_server_that_has_gone_is_an_error_after_some_time(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "ATTEMPTS", 2)
        heard: list[str] = []
        options = "endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
        with pytest.raises(CacheError, match=f"in {remote.ATTEMPTS} attempts"):
            push(folder, f"s3://key:secret@bucket/x?{options}", told=heard.append)
        assert heard[0] == f"look at dataset.json: attempt 1 of {remote.ATTEMPTS} failed"


@pytest.mark.parametrize(
    ("place", "expected"),
    [("s3://b/c", True), ("file:///x", True), ("runs/demo", False), (Path("s3:/b"), False), ("C:\\x", False)],
)
def test_urls(place: object, expected: bool) -> None:
    assert is_url(place) is expected


def test_an_unknown_scheme_is_explained() -> None:
    with pytest.raises(UsageError, match="pyarrow or fsspec"):
        RemoteFolder("gopher://somewhere/cache")
