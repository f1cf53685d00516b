"""`verify --replay`: an honest cache passes; rows that another token or teacher made do not.

The tampered caches are written again with valid hashes, so that nothing but the teacher can tell.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pmetal_distill.offline.batch import StoredSequence
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.replay import NOISE, compare_head_and_curve, noise_of
from pmetal_distill.offline.writer import CacheWriter, CapturedSequence
from schemas.arrays import TargetArrays
from schemas.grid import MAX_STEPS
from schemas.spec import TargetSpec
from tests.pipeline.conftest import Cli, Outcome
from tests.tiny import CHAT_TEMPLATE, save_tokenizer

ALL = 1_000_000
SEQUENCE, POSITION = 9, 20
Change = Callable[[TargetArrays], None]


@pytest.fixture(scope="module")
def sketch_cache(tiny_teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "sketch"
    settings = CacheSettings(
        teacher=str(tiny_teacher),
        data=str(text_file),
        out=out,
        tail="sketch",
        sketch_rank=8,
        sketch_step=0.5,
        calibration_tokens=900,
        max_seq_len=64,
        batch_size=3,
        sequences_per_shard=8,
    )
    run_cache(settings, Console(quiet=True))
    return out


@pytest.fixture(params=["bucket", "sketch"])
def cache(request: pytest.FixtureRequest, bucket_cache: Path, sketch_cache: Path) -> Path:
    return bucket_cache if request.param == "bucket" else sketch_cache


def tampered(folder: Path, out: Path, change: Change) -> Path:
    """The cache with the targets of sequence `SEQUENCE` changed in place, sound in every hash."""
    cache = LogitCache(folder)
    files = {ref.name: (folder / "tokenizer" / ref.name).read_bytes() for ref in cache.dataset.tokenizer}
    with CacheWriter.create_or_resume(out, cache.dataset, files) as writer:
        for shard in cache.shards:
            numbers = cache.dataset.shard_range(shard.record.shard)
            rows = [captured(cache.sequence(number), change) for number in numbers]
            codec = shard.codec
            writer.write_shard(shard.record.shard, rows, basis=codec.basis, codebook=codec.codebook)
    return out


def captured(row: StoredSequence, change: Change) -> CapturedSequence:
    targets = TargetArrays(*(part.copy() for part in row.targets.parts()))
    if row.number == SEQUENCE:
        assert row.loss_mask[: POSITION + 10].all()
        change(targets)
    return CapturedSequence(row.token_ids, row.documents, row.loss_mask, targets)


def replay(cli: Cli, cache: Path, teacher: Path, *words: object, rows: int = ALL) -> Outcome:
    return cli("verify", cache, "--replay", rows, "--teacher", teacher, "--json", *words)


def shift(targets: TargetArrays) -> None:
    for part in targets.parts():
        part[1 : POSITION + 1] = part[:POSITION].copy()


def swap(targets: TargetArrays) -> None:
    for part in targets.parts():
        part[[POSITION, POSITION + 3]] = part[[POSITION + 3, POSITION]]


def swap_coordinates(targets: TargetArrays) -> None:
    part = targets.coordinates
    part[[POSITION, POSITION + 3]] = part[[POSITION + 3, POSITION]]


def alter_id(targets: TargetArrays) -> None:
    head = targets.head_ids[POSITION]
    head[-1] = next(i for i in range(320) if i not in head)


class TestHonest:
    def test_all_rows_pass(self, cli: Cli, cache: Path, tiny_teacher: Path, text_file: Path) -> None:
        got = replay(cli, cache, tiny_teacher, "--data", text_file)
        assert got.code == 0, got.out
        opened = LogitCache(cache)
        assert got.json["findings"] == []
        assert got.json["replay"] == {
            "rows": opened.num_trained_tokens,
            "sequences": opened.num_sequences,
            "mismatched_rows": 0,
            "mismatches": {},
        }

    @pytest.mark.parametrize("rows", [1, 100])
    def test_some_rows_pass(self, cli: Cli, sketch_cache: Path, tiny_teacher: Path, rows: int) -> None:
        got = replay(cli, sketch_cache, tiny_teacher, rows=rows)
        assert got.code == 0, got.out
        assert got.json["replay"]["rows"] == rows
        assert 1 <= got.json["replay"]["sequences"] <= rows

    def test_writing_again_alone_passes(
        self, cli: Cli, cache: Path, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        again = tampered(cache, tmp_path / "again", lambda targets: None)
        got = replay(cli, again, tiny_teacher)
        assert got.code == 0, got.out

    def test_it_says_so(self, cli: Cli, bucket_cache: Path, tiny_teacher: Path) -> None:
        out = cli("verify", bucket_cache, "--replay", 5, "--teacher", tiny_teacher).out
        assert "replayed 5 rows of" in out
        assert "all match" in out


class TestTampered:
    @pytest.mark.parametrize("change", [shift, swap, alter_id])
    def test_rows_of_other_tokens(
        self, cli: Cli, cache: Path, tiny_teacher: Path, tmp_path: Path, change: Change
    ) -> None:
        got = replay(cli, tampered(cache, tmp_path / "t", change), tiny_teacher)
        assert got.code == 1
        wrong = {"shift": POSITION, "swap": 2, "alter_id": 1}[change.__name__]
        assert 0.8 * wrong <= got.json["replay"]["mismatched_rows"] <= wrong
        messages = [finding["message"] for finding in got.json["findings"]]
        assert all(f"sequence {SEQUENCE} position " in message for message in messages)
        assert all("targets-00001" in message for message in messages)
        if change is alter_id:
            assert len(messages) == 1
            assert f"position {POSITION}: head id 15 must be" in messages[0]

    def test_swapped_coordinates(
        self, cli: Cli, sketch_cache: Path, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        got = replay(cli, tampered(sketch_cache, tmp_path / "t", swap_coordinates), tiny_teacher)
        assert got.code == 1
        assert got.json["replay"]["mismatches"] == {"coordinates": 2}
        places = [f"sequence {SEQUENCE} position {position}:" for position in (POSITION, POSITION + 3)]
        for place, finding in zip(places, got.json["findings"], strict=True):
            assert place in finding["message"]

    def test_swapped_columns(self, cli: Cli, sketch_cache: Path, tiny_teacher: Path, tmp_path: Path) -> None:
        def change(targets: TargetArrays) -> None:
            targets.coordinates[:, [0, 1]] = targets.coordinates[:, [1, 0]]

        got = replay(cli, tampered(sketch_cache, tmp_path / "t", change), tiny_teacher)
        assert got.json["replay"]["mismatches"]["coordinates"] > 30

    @pytest.mark.parametrize("part", ["head_logprobs", "tail_curve"])
    def test_values_two_grid_steps_off(
        self, cli: Cli, bucket_cache: Path, tiny_teacher: Path, tmp_path: Path, part: str
    ) -> None:
        def change(targets: TargetArrays) -> None:
            if part == "head_logprobs":
                targets.head_logprobs[POSITION, 1:] -= 2 / 128
            else:
                targets.tail_curve[POSITION, 0] += 3 / 256

        got = replay(cli, tampered(bucket_cache, tmp_path / "t", change), tiny_teacher)
        assert got.code == 1
        assert part in got.json["replay"]["mismatches"]


class TestOtherInputs:
    def test_another_teacher(self, cli: Cli, cache: Path, tiny_student: Path) -> None:
        got = replay(cli, cache, tiny_student, rows=50)
        assert got.code == 1
        findings = got.json["findings"]
        assert "weights of" in findings[0]["message"]
        assert sum(finding["kind"] == "fingerprint" for finding in findings) == 1
        assert got.json["replay"]["mismatched_rows"] == 50
        assert "head_ids: 30 more rows do not match" in [finding["message"] for finding in findings]

    def test_another_chat_template(
        self, cli: Cli, bucket_cache: Path, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
        save_tokenizer(other, chat_template=CHAT_TEMPLATE + " ")
        got = replay(cli, bucket_cache, other, rows=5)
        assert got.code == 1
        (finding,) = got.json["findings"]
        assert finding["message"].startswith("chat template of")

    def test_another_tokenizer(
        self, cli: Cli, bucket_cache: Path, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
        save_tokenizer(other, vocab_size=300)
        (finding,) = replay(cli, bucket_cache, other, rows=5).json["findings"]
        assert finding["message"].startswith("tokenizer of")

    def test_other_text(self, cli: Cli, bucket_cache: Path, tiny_teacher: Path, tmp_path: Path) -> None:
        data = tmp_path / "other.jsonl"
        data.write_text(json.dumps({"text": "The quick brown fox."}))
        (finding,) = replay(cli, bucket_cache, tiny_teacher, "--data", data, rows=5).json["findings"]
        assert finding["message"].startswith("text of")

    def test_wrong_usage(self, cli: Cli, bucket_cache: Path, tiny_teacher: Path) -> None:
        assert cli("verify", bucket_cache, "--replay", 5).code == 2
        assert cli("verify", bucket_cache, "--teacher", tiny_teacher).code == 2
        assert replay(cli, bucket_cache, tiny_teacher, rows=0).code == 2

    def test_a_damaged_cache_is_not_replayed(
        self, cli: Cli, bucket_cache: Path, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(bucket_cache, tmp_path / "copy"))
        shard = sorted((copy / "shards").iterdir())[0]
        shard.write_bytes(shard.read_bytes()[:-1])
        got = replay(cli, copy, tiny_teacher, rows=5)
        assert got.code == 1
        assert got.json["replay"] is None


class TestComparison:
    SPEC = TargetSpec(vocab_size=6, k=3, tail="bucket", curve_nodes=(0.5, 1.0))

    def exact(self, logits: np.ndarray) -> TargetArrays:
        rows = logits.astype(np.float64)
        ids = np.argsort(-rows, axis=1, kind="stable")[:, :3]
        head = np.take_along_axis(rows, ids, axis=1)
        logprobs = head - np.log(np.exp(rows - rows.max()).sum(1, keepdims=True)) - rows.max()
        rest = np.sort(rows, axis=1)[:, :3] - head[:, -1:]
        curve = np.stack([np.log(np.exp(b * rest).sum(1)) for b in (0.5, 1.0)], axis=1)
        return TargetArrays(
            ids.astype(np.int32),
            logprobs.astype(np.float32),
            curve.astype(np.float32),
            np.zeros((len(rows), 0), np.float32),
        )

    def test_ties_may_be_told_either_way(self) -> None:
        logits = np.array([[5.0, 3.0, 2.0, 2.0, 1.0, 0.0]], np.float32)
        targets = self.exact(logits)
        for other, ok in ((3, True), (4, False)):
            ids = targets.head_ids.copy()
            ids[0, 2] = other
            found = compare_head_and_curve(
                replace(targets, head_ids=ids), logits, self.SPEC, noise=noise_of(logits, 0.0)
            )
            assert [mismatch.part for mismatch in found] == ([] if ok else ["head_ids"])

    def test_noise_grows_with_the_rounding_of_the_type(self) -> None:
        logits = np.array([[-20.0, 10.0]], np.float32)
        assert noise_of(logits, 0.0) == NOISE
        assert noise_of(logits, 2.0**-9) == pytest.approx(NOISE + 80 * 2.0**-9)

    def test_saturated_logprobs_may_lie_further_down(self) -> None:
        logits = np.array([[900.0, 899.0, 100.0, 99.0, 98.0, 97.0]], np.float32)
        targets = self.exact(logits)
        clipped = targets.head_logprobs.copy()
        clipped[0, 2] = clipped[0, 0] - MAX_STEPS / 128
        shift = (targets.head_logprobs[0, 2] - clipped[0, 2]) * np.array([0.5, 1.0], np.float32)
        curve = np.clip(targets.tail_curve + shift, -32767 / 256, 32767 / 256).astype(np.float32)
        noise = noise_of(logits, 0.0)
        stored = replace(targets, head_logprobs=clipped, tail_curve=curve)
        assert compare_head_and_curve(stored, logits, self.SPEC, noise=noise) == []
        clipped[0, 2] += 1.0
        found = compare_head_and_curve(stored, logits, self.SPEC, noise=noise)
        assert "head_logprobs" in [mismatch.part for mismatch in found]
