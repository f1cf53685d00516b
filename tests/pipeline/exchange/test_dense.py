"""Dense logits: every tail, every file type, hostile headers."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TeacherTarget
from tests.pipeline.conftest import Cli, Outcome
from tests.pipeline.exchange.conftest import Truth, assert_same_targets


@pytest.fixture
def run(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> Any:
    def go(source: Path, *words: object) -> Outcome:
        return cli(
            *("import", "dense", source, "--out", tmp_path / "c", "--tokenizer", tiny_teacher),
            *("--teacher-name", "tiny", "--json", *words),
        )

    return go


@pytest.fixture(scope="module")
def folder(truths: list[Truth], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.safetensors` a document."""
    folder = tmp_path_factory.mktemp("dense")
    for number, truth in enumerate(truths):
        tensors = {"logits": truth.logits.astype(np.float32), "token_ids": np.array(truth.ids)}
        save_file(tensors, folder / f"{number}.safetensors")
    return folder


def padded(truths: list[Truth]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(t.ids) for t in truths)
    logits = np.zeros((len(truths), longest, 320), np.float32)
    ids = np.full((len(truths), longest), -100)
    for i, truth in enumerate(truths):
        logits[i, : len(truth.ids)], ids[i, : len(truth.ids)] = truth.logits, truth.ids
    return logits, ids


class TestTargets:
    def test_bucket_is_our_own_cache_with_its_curve(
        self, run: Any, folder: Path, own: Path, tmp_path: Path
    ) -> None:
        got = run(folder, "--tail", "bucket")
        assert got.code == 0, got.err
        assert_same_targets(tmp_path / "c", own, k=16)
        ours, theirs = LogitCache(own), LogitCache(tmp_path / "c")
        assert theirs.spec == ours.spec
        rows = {tuple(s.token_ids): s for s in map(ours.sequence, range(ours.num_sequences))}
        for number in range(theirs.num_sequences):
            row = theirs.sequence(number)
            want = rows[tuple(row.token_ids)]
            np.testing.assert_allclose(row.targets.tail_curve, want.targets.tail_curve, atol=0.012)

    def test_numpy_files_with_padding(self, run: Any, truths: list[Truth], own: Path, tmp_path: Path) -> None:
        logits, ids = padded(truths)
        np.save(tmp_path / "z.npy", logits)
        np.save(tmp_path / "t.npy", ids)
        got = run(tmp_path / "z.npy", "--tokens", tmp_path / "t.npy", "--tail", "none")
        assert got.code == 0, got.err
        assert_same_targets(tmp_path / "c", own, k=16)

    def test_bfloat16_and_masks(self, run: Any, truths: list[Truth], tmp_path: Path) -> None:
        truth = truths[0]
        mask = np.arange(len(truth.ids)) % 3 == 0
        tensors = {
            "logprobs": mx.array(truth.logprobs.astype(np.float32)).astype(mx.bfloat16),
            "input_ids": mx.array(truth.ids),
            "loss_mask": mx.array(mask),
            "documents": mx.array((np.arange(len(truth.ids)) > 9).astype(np.int32)),
        }
        mx.save_safetensors(str(tmp_path / "b.safetensors"), tensors)
        assert run(tmp_path / "b.safetensors", "--tail", "bucket").code == 0
        row = LogitCache(tmp_path / "c").sequence(0)
        np.testing.assert_array_equal(row.loss_mask, mask)
        assert row.documents.tolist() == [0] * 10 + [1] * (len(truth.ids) - 10)
        first = [truth.top(t, 1)[0][1] for t in np.flatnonzero(mask)]
        np.testing.assert_allclose(row.targets.head_logprobs[mask, 0], first, atol=0.05)

    def test_a_sketch_rebuilds_every_token_at_every_temperature(
        self, run: Any, folder: Path, truths: list[Truth], tmp_path: Path
    ) -> None:
        got = run(folder, "--sketch-rank", 32, "--sketch-step", 0.05)
        assert got.code == 0, got.err
        assert got.json["tail"] == "sketch"
        cache = LogitCache(tmp_path / "c")
        (basis,) = cache.bases
        for temperature in (1.0, 2.0, 4.0):
            row, truth = cache.sequence(3), truths[3]
            target = TeacherTarget.from_arrays(
                row.targets[:-1], cache.spec, bases=[TailBasis.from_sketch(basis)]
            )
            got_rows = np.array(target.at(temperature).rows(), np.float64)
            scaled = truth.logits[:-1] / temperature
            exact = scaled - np.log(np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1, keepdims=True))
            exact -= scaled.max(-1, keepdims=True)
            kl = (np.exp(exact) * (exact - got_rows)).sum(-1)
            assert kl.max() < 2e-3
        assert {"kl@2", "gradient@1"} <= set(cache.records[0].measured)

    def test_an_imported_cache_replays(
        self, run: Any, folder: Path, cli: Cli, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        run(folder, "--tail", "bucket")
        report = cli("verify", tmp_path / "c", "--replay", 50, "--teacher", tiny_teacher, "--json").json
        assert report["ok"]
        assert report["replay"]["mismatched_rows"] == 0
        got = cli("verify", tmp_path / "c", "--replay", 5, "--teacher", tiny_teacher, "--data", folder)
        assert got.code == 2

    def test_a_student_trains_from_it(
        self, run: Any, folder: Path, cli: Cli, tiny_student: Path, tmp_path: Path
    ) -> None:
        run(folder, "--sketch-rank", 16)
        got = cli(
            *("train", "--student", tiny_student, "--cache", tmp_path / "c", "--out", tmp_path / "run"),
            *("--iters", 2, "--batch-size", 2, "--quiet"),
        )
        assert got.code == 0, got.err

    def test_a_shift_by_one_is_noticed(self, run: Any, tmp_path: Path) -> None:
        """A teacher that is always right about the next token, with its rows beside the wrong one."""
        rng = np.random.default_rng(0)
        ids = rng.integers(3, 320, (4, 80))
        logits = rng.standard_normal((4, 80, 320)).astype(np.float32)
        np.put_along_axis(logits[:, :-1], ids[:, 1:, None], 9, axis=2)
        for shift, warned in ((0, False), (1, True), (-1, True)):
            tensors = {"logits": np.roll(logits, shift, axis=1), "token_ids": ids}
            save_file(tensors, tmp_path / "s.safetensors")
            got = run(tmp_path / "s.safetensors", "--tail", "bucket", "--out", tmp_path / f"c{shift}")
            assert got.code == 0, got.err
            assert ("seem to be shifted" in got.err) == warned
            assert (got.json["first_choice_is_next_token"] > 0.9) != warned


class TestRefusals:
    def test_pickles(self, run: Any, tmp_path: Path) -> None:
        np.save(tmp_path / "z.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        np.save(tmp_path / "t.npy", np.zeros((1, 3), int))
        got = run(tmp_path / "z.npy", "--tokens", tmp_path / "t.npy")
        assert got.code == 1
        assert "z.npy: must be a .npy file of numbers" in got.err

    def test_archives(self, run: Any, tmp_path: Path) -> None:
        np.savez(tmp_path / "z.npz", a=np.zeros(3))
        (tmp_path / "z.npz").rename(tmp_path / "z.npy")
        assert "found an archive" in run(tmp_path / "z.npy", "--tokens", tmp_path / "z.npy").err

    @pytest.mark.parametrize("damage", [b"(", b"\0", b"9", b"\n"])
    def test_damaged_numpy_headers(self, run: Any, tmp_path: Path, damage: bytes) -> None:
        np.save(tmp_path / "t.npy", np.zeros((2, 3), int))
        np.save(tmp_path / "z.npy", np.zeros((2, 3, 320), np.float32))
        data = (tmp_path / "z.npy").read_bytes()
        for place in (0, 8, 11, 40, 66, 100, 126):
            (tmp_path / "z.npy").write_bytes(data[:place] + damage + data[place + 1 :])
            got = run(tmp_path / "z.npy", "--tokens", tmp_path / "t.npy", "--vocab-size", 1)
            assert got.code in (1, 2)
            assert "Traceback" not in got.err

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [1 << 35, 320], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 1 << 50]},
            {"dtype": "F32", "shape": [2, 1], "data_offsets": [8, 0]},
            {"dtype": "F32", "shape": [-2, 1], "data_offsets": [0, 8]},
            {"dtype": "OBJ", "shape": [2, 1], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]},
            7,
        ],
    )
    def test_headers_that_lie(self, run: Any, tmp_path: Path, entry: object) -> None:
        header = json.dumps({"logits": entry}).encode()
        (tmp_path / "h.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
        got = run(tmp_path / "h.safetensors")
        assert got.code == 1
        assert "h.safetensors" in got.err

    @pytest.mark.parametrize("data", [b"", b"\xff" * 8, struct.pack("<Q", 3) + b"[1]"])
    def test_no_header(self, run: Any, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "h.safetensors").write_bytes(data)
        assert "h.safetensors" in run(tmp_path / "h.safetensors").err

    def test_pipes_are_not_waited_for(self, run: Any, tmp_path: Path) -> None:
        for name in ("p.npy", "p.safetensors"):
            os.mkfifo(tmp_path / name)
        assert "must be a file" in run(tmp_path / "p.safetensors").err
        assert "must be a file" in run(tmp_path / "p.npy", "--tokens", tmp_path / "p.npy").err

    def test_shapes_that_do_not_fit(self, run: Any, tmp_path: Path) -> None:
        save_file(
            {"logits": np.zeros((4, 320), np.float32), "token_ids": np.zeros(5, np.int64)},
            tmp_path / "x.safetensors",
        )
        assert "must have logits [n, V] or [B, L, V]" in run(tmp_path / "x.safetensors").err

    def test_numbers_that_are_not_finite(self, run: Any, truths: list[Truth], tmp_path: Path) -> None:
        logits = truths[0].logits.astype(np.float32).copy()
        logits[5, 3] = np.nan
        save_file({"logits": logits, "token_ids": np.array(truths[0].ids)}, tmp_path / "x.safetensors")
        got = run(tmp_path / "x.safetensors", "--tail", "bucket")
        assert got.code == 1
        assert "NaN" in got.err

    def test_another_vocabulary(self, run: Any, folder: Path) -> None:
        assert "vocab_size: must be 320" in run(folder, "--vocab-size", 400).err

    def test_too_few_rows_for_the_sketch(self, run: Any, folder: Path) -> None:
        got = run(folder, "--sketch-rank", 400)
        assert got.code == 2
        assert "rank" in got.err
