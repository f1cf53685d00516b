"""Exports: plain lists that pyarrow reads, and rows over the vocabulary as target.py rebuilds them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file

from pipeline.console import Console
from pipeline.exchange.exporting import stored_in_order, write_files
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TeacherTarget
from tests.pipeline.conftest import Cli
from tests.pipeline.exchange.conftest import TEXTS, Truth, own_cache


@pytest.fixture(scope="module")
def sketch(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sketch")
    return own_cache(tiny_teacher, TEXTS, folder, tail="sketch", sketch_rank=16, sketch_step=0.2)


@pytest.fixture(scope="module")
def plain(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_cache(tiny_teacher, TEXTS, tmp_path_factory.mktemp("none"), tail="none", sequences_per_shard=2)


def read_lists(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.rglob("data-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


class TestLists:
    @pytest.mark.parametrize("tail", ["own", "sketch", "plain"])
    def test_are_what_the_cache_holds(
        self, tail: str, cli: Cli, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        folder: Path = request.getfixturevalue(tail)
        got = cli("export", folder, "--out", tmp_path / "x", "--json")
        assert got.code == 0, got.err
        cache, rows = LogitCache(folder), read_lists(tmp_path / "x")
        assert got.json["tokens"] == cache.num_tokens
        assert len(rows) == cache.num_sequences
        for number, row in enumerate(rows):
            want = cache.sequence(number)
            assert row["input_ids"] == want.token_ids.tolist()
            assert row["documents"] == want.documents.tolist()
            assert row["loss_mask"] == want.loss_mask.tolist()
            for t, on in enumerate(row["loss_mask"]):
                assert (row["tail_mass"][t] is not None) == on
                assert len(row["head_ids"][t]) == len(row["head_logprobs"][t]) == (16 if on else 0)
                if on:
                    assert row["head_ids"][t] == want.targets.head_ids[t].tolist()
                    assert row["head_logprobs"][t] == want.targets.head_logprobs[t].tolist()

    def test_mass_is_the_teachers(self, own: Path, truths: list[Truth], cli: Cli, tmp_path: Path) -> None:
        cli("export", own, "--out", tmp_path / "x")
        by_ids = {tuple(t.ids): t for t in truths}
        for row in read_lists(tmp_path / "x"):
            truth = by_ids[tuple(row["input_ids"])]
            for t in np.flatnonzero(row["loss_mask"]):
                head = sum(np.exp(logprob) for _, logprob in truth.top(t, 16))
                assert row["tail_mass"][t] == pytest.approx(1 - head, abs=0.01)
                assert np.exp(row["head_logprobs"][t]).sum() + row["tail_mass"][t] == pytest.approx(
                    1, abs=1e-5
                )

    def test_types_and_card(self, own: Path, cli: Cli, tmp_path: Path) -> None:
        cli("export", own, "--out", tmp_path / "x")
        (file,) = (tmp_path / "x" / "data").iterdir()
        assert pq.read_table(tmp_path / "x" / "data").num_rows == LogitCache(own).num_sequences
        types = {field.name: str(field.type) for field in pq.read_schema(file)}
        assert types["input_ids"] == "list<element: int32>"
        assert types["head_ids"] == "list<element: list<element: int32>>"
        assert types["head_logprobs"] == "list<element: list<element: float>>"
        assert types["tail_mass"] == "list<element: float>"
        card = (tmp_path / "x" / "README.md").read_text()
        assert "`head_logprobs`" in card
        assert yaml.safe_load(card.split("---")[1])["configs"][0]["data_files"] == "data/*.parquet"
        assert (tmp_path / "x" / "tokenizer" / "tokenizer.json").is_file()

    def test_large_caches_go_to_several_files(self, own: Path, tmp_path: Path) -> None:
        cache = LogitCache(own)
        with Console(quiet=True).progress("x", total=1, unit="x") as progress:
            files = write_files(cache, tmp_path, progress, file_bytes=1, group_tokens=1)
        assert len(files) == cache.num_sequences
        ids = [row["input_ids"] for row in read_lists(tmp_path)]
        assert ids == [cache.sequence(n).token_ids.tolist() for n in range(cache.num_sequences)]

    def test_a_used_folder_is_left_alone(self, own: Path, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "mine").touch()
        assert cli("export", own, "--out", tmp_path / "x").code == 2

    def test_a_damaged_cache_leaves_nothing(self, own: Path, cli: Cli, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(own, tmp_path / "copy"))
        shard = next((copy / "shards").iterdir())
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        assert cli("export", copy, "--out", tmp_path / "x").code == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def rebuilt(cache: LogitCache, number: int) -> np.ndarray:
    """Rows of a sequence by target.py."""
    row = cache.sequence(number)
    bases = [TailBasis.from_sketch(basis) for basis in cache.bases]
    target = TeacherTarget.from_arrays(row.targets[row.loss_mask], cache.spec, bases=bases).at(1.0)
    if target.complete:
        return np.array(target.rows())
    events = np.array(target.events(), np.float64)
    size = cache.spec.vocab_size
    rows = np.repeat(events[:, -1:] - np.log(size - cache.spec.k), size, axis=1)
    np.put_along_axis(rows, row.targets.head_ids[row.loss_mask], events[:, :-1], axis=1)
    return rows


class TestDense:
    @pytest.mark.parametrize("tail", ["own", "sketch", "plain"])
    def test_rows_are_those_of_the_target(
        self, tail: str, cli: Cli, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        folder: Path = request.getfixturevalue(tail)
        got = cli("export", folder, "--out", tmp_path / "x", "--dense", "--sequences", "1:3", "--json")
        assert got.code == 0, got.err
        assert got.json["sequences"] == 2
        cache = LogitCache(folder)
        files = sorted((tmp_path / "x").iterdir())
        assert [file.name for file in files] == ["sequence-00001.safetensors", "sequence-00002.safetensors"]
        for number, file in zip((1, 2), files, strict=True):
            tensors, row = load_file(file), cache.sequence(number)
            np.testing.assert_array_equal(tensors["token_ids"], row.token_ids)
            np.testing.assert_array_equal(tensors["loss_mask"], row.loss_mask)
            got_rows = tensors["logprobs"]
            assert np.isnan(got_rows[~row.loss_mask]).all()
            want = rebuilt(cache, number)
            small = want < -1e20
            np.testing.assert_array_equal(np.isneginf(got_rows[row.loss_mask]), small)
            np.testing.assert_allclose(got_rows[row.loss_mask][~small], want[~small], atol=2e-4)

    def test_numpy_files(self, own: Path, cli: Cli, tmp_path: Path) -> None:
        cli("export", own, "--out", tmp_path / "x", "--dense", "npy", "--sequences", "3,0")
        cache = LogitCache(own)
        for number in (0, 3):
            row = cache.sequence(number)
            rows = np.load(tmp_path / "x" / f"sequence-{number:05d}.logprobs.npy")
            ids = np.load(tmp_path / "x" / f"sequence-{number:05d}.token_ids.npy")
            np.testing.assert_array_equal(ids, row.token_ids)
            np.testing.assert_allclose(rows[row.loss_mask], rebuilt(cache, number), atol=2e-4)

    def test_what_is_exported_can_be_imported(
        self, sketch: Path, cli: Cli, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        cli("export", sketch, "--out", tmp_path / "x", "--dense", "--sequences", ":")
        got = cli(
            *("import", "dense", tmp_path / "x", "--tail", "bucket", "--out", tmp_path / "c"),
            *("--tokenizer", tiny_teacher, "--teacher-name", "t"),
        )
        assert got.code == 0, got.err
        first, second = LogitCache(sketch), LogitCache(tmp_path / "c")
        for number in range(first.num_sequences):
            a, b = first.sequence(number), second.sequence(number)
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
            # Rounding makes ties and lets a tail token pass the last of the head: compare the leading values.
            leading = (a.targets.head_logprobs[:, :12], b.targets.head_logprobs[:, :12])
            np.testing.assert_allclose(*leading, atol=0.012)

    @pytest.mark.parametrize("text", ["x", "9:", "0,99", "1:2:3", "-1", ""])
    def test_sequences_that_are_not_there(self, own: Path, cli: Cli, tmp_path: Path, text: str) -> None:
        got = cli("export", own, "--out", tmp_path / "x", "--dense", f"--sequences={text}")
        assert got.code == 2
        assert "--sequences" in got.err
        assert not (tmp_path / "x").exists()

    def test_sequences_and_dense_belong_together(self, own: Path, cli: Cli, tmp_path: Path) -> None:
        assert cli("export", own, "--out", tmp_path / "x", "--dense").code == 2
        assert cli("export", own, "--out", tmp_path / "x", "--sequences", "0:1").code == 2


def test_order_and_choice(own: Path) -> None:
    cache = LogitCache(own)
    assert [row.number for row in stored_in_order(cache)] == list(range(cache.num_sequences))
    assert [row.number for row in stored_in_order(cache, [4, 1])] == [1, 4]
