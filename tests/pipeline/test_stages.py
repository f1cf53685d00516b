"""Both stages and the evaluation, run as a user runs them, on a tiny model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pipeline.batching import collate
from pipeline.cache import read_data, run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pmetal_distill.models import load_model
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.conftest import Cli


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def cached_events(cache: LogitCache, row: object, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Head probabilities [n, k] and tail mass [n] by the formula of FORMAT.md, float64."""
    targets = row.targets  # type: ignore[attr-defined]
    b = 1 / temperature
    head = targets.head_logprobs.astype(np.float64) * b
    tail = head[:, -1] + cache.spec.curve.evaluate(targets.tail_curve, b)
    total = np.logaddexp(np.logaddexp.reduce(head, axis=1), tail)
    return np.exp(head - total[:, None]), np.exp(tail - total)


def settings(teacher: Path, data: Path, out: Path, **changes: object) -> CacheSettings:
    values: dict[str, object] = {
        "tail": "bucket",
        "max_seq_len": 64,
        "batch_size": 4,
        "sequences_per_shard": 8,
    }
    return CacheSettings(teacher=str(teacher), data=str(data), out=out, **(values | changes))  # type: ignore[arg-type]


class TestCache:
    def test_targets_are_the_teachers(self, bucket_cache: Path, tiny_teacher: Path, text_file: Path) -> None:
        teacher = load_model(tiny_teacher)
        data = read_data(settings(tiny_teacher, text_file, bucket_cache), teacher)
        cache = LogitCache(bucket_cache)
        assert cache.num_sequences == data.num_sequences > 8
        for number in (0, 3, data.num_sequences - 1):
            batch, row = collate(data, [number]), cache.sequence(number)
            np.testing.assert_array_equal(row.token_ids, batch.token_ids[0])
            np.testing.assert_array_equal(row.loss_mask, batch.loss_mask[0])
            logits = np.array(
                teacher.full(mx.array(batch.token_ids), documents=batch.documents)[0], np.float64
            )
            mask = row.loss_mask
            for temperature in (1.0, 1.5, 2.0, 3.0, 4.0, 8.0):
                p = softmax(logits / temperature)
                exact = np.take_along_axis(p, row.targets.head_ids, axis=1)
                head, tail = cached_events(cache, row, temperature)
                assert np.abs(np.log(head) - np.log(exact))[mask].max() < 1e-2
                assert np.abs(tail - (1 - exact.sum(-1)))[mask].max() < 1e-2
            order = np.argsort(-logits, axis=1, kind="stable")[:, : cache.spec.k]
            np.testing.assert_array_equal(row.targets.head_ids[mask], order[mask])

    @pytest.mark.parametrize("change", [{"head_chunk": 7}, {"batch_size": 1}])
    def test_chunks_and_batches_change_nothing(
        self, bucket_cache: Path, tiny_teacher: Path, text_file: Path, tmp_path: Path, change: dict[str, int]
    ) -> None:
        run_cache(settings(tiny_teacher, text_file, tmp_path / "c", **change), Console(quiet=True))
        one, two = LogitCache(bucket_cache), LogitCache(tmp_path / "c")
        for number in range(one.num_sequences):
            a, b = one.sequence(number).targets, two.sequence(number).targets
            np.testing.assert_allclose(a.head_logprobs, b.head_logprobs, atol=2 * one.spec.logprob_step)
            np.testing.assert_allclose(a.tail_curve, b.tail_curve, atol=0.05)

    def test_an_interrupted_run_resumes_to_the_same_bytes(
        self, bucket_cache: Path, tiny_teacher: Path, text_file: Path, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(bucket_cache, tmp_path / "copy"))
        for path in sorted((copy / "commits").iterdir())[1:]:
            path.unlink()
        same = settings(tiny_teacher, text_file, copy, resume=True, head_chunk=50)  # as in the fixture
        summary = run_cache(same, Console(quiet=True))
        assert 0 < summary["new_tokens"] < summary["tokens"]
        assert LogitCache(copy).root == LogitCache(bucket_cache).root

    def test_prompts_are_masked_and_cost_almost_nothing(self, tiny_teacher: Path, tmp_path: Path) -> None:
        data = tmp_path / "chat.jsonl"
        record = {"prompt": "Say what a fox does. " * 4, "completion": "It runs."}
        data.write_text("\n".join(json.dumps(record) for _ in range(6)))
        run_cache(
            settings(tiny_teacher, data, tmp_path / "c", mask_prompt=True, max_seq_len=256),
            Console(quiet=True),
        )
        cache = LogitCache(tmp_path / "c")
        row = cache.sequence(0)
        assert 0 < row.loss_mask.sum() < len(row) / 2
        assert not row.targets.head_ids[~row.loss_mask].any()

    def test_hidden_states_travel_along(self, tiny_teacher: Path, text_file: Path, tmp_path: Path) -> None:
        run_cache(
            settings(tiny_teacher, text_file, tmp_path / "c", hidden_layers=(1, -1)), Console(quiet=True)
        )
        cache = LogitCache(tmp_path / "c", hidden_layers=(1, 3))
        row = cache.sequence(2)
        teacher = load_model(tiny_teacher)
        found = teacher.hidden(
            mx.array(row.token_ids[None]), documents=row.documents[None], layers=(1, 3)
        ).layers
        for layer in (1, 3):
            exact = np.array(found[layer][0])[row.loss_mask]
            error = np.abs(row.hidden[layer][row.loss_mask] - exact).max()
            assert error < 0.01 * np.abs(exact).max()


class TestSketch:
    def test_rebuilt_targets_are_close_to_the_teacher_and_training_takes_them(
        self, cli: Cli, tiny_teacher: Path, tiny_student: Path, text_file: Path, tmp_path: Path
    ) -> None:
        words = ("--teacher", tiny_teacher, "--data", text_file, "--out", tmp_path / "c", "--max-seq-len", 64)
        fine = ("--sketch-rank", 24, "--sketch-step", 0.5, "--calibration-tokens", 900, "--batch-size", 4)
        got = cli("cache", *words, *fine, "--sequences-per-shard", 8, "--json")
        assert got.code == 0, got.err
        assert cli("verify", tmp_path / "c").code == 0
        facts = cli("inspect", tmp_path / "c", "--json").json
        assert facts["target"]["tail"] == "sketch"
        measured = facts["measured"]
        assert 0 < measured["gradient@2"] < 0.5
        assert 0 < measured["kl@1"] < 0.2
        run = ("--iters", 20, "--learning-rate", 3e-3, "--alpha", 1.0, "--batch-size", 4, "--json")
        losses = {
            tail: cli(
                "train",
                "--student",
                tiny_student,
                "--cache",
                tmp_path / "c",
                "--out",
                tmp_path / tail,
                *run,
                "--tail",
                tail,
            ).json["soft"]
            for tail in ("sketch", "bucket", "none")
        }
        assert losses["bucket"] < losses["sketch"]

    def test_a_second_run_and_a_resumed_one_give_the_same_bytes(
        self, tiny_teacher: Path, text_file: Path, tmp_path: Path
    ) -> None:
        changes = {"tail": "sketch", "sketch_rank": 8, "sketch_step": 1.0, "calibration_tokens": 500}
        for name in ("one", "two"):
            run_cache(settings(tiny_teacher, text_file, tmp_path / name, **changes), Console(quiet=True))
        root = LogitCache(tmp_path / "one").root
        assert LogitCache(tmp_path / "two").root == root
        sorted((tmp_path / "two" / "commits").iterdir())[1].unlink()
        resumed = settings(tiny_teacher, text_file, tmp_path / "two", resume=True, **changes)
        run_cache(resumed, Console(quiet=True))
        assert LogitCache(tmp_path / "two").root == root

    def test_a_rank_that_the_sample_cannot_carry(self, cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
        data = tmp_path / "short.txt"
        data.write_text("The quick brown fox.")
        words = ("--teacher", tiny_teacher, "--data", data, "--out", tmp_path / "c", "--sketch-rank", 30)
        got = cli("cache", *words)
        assert got.code == 2
        assert "at least the sketch rank 30" in got.err


class TestTrain:
    @pytest.mark.parametrize("tail", ["bucket", "none"])
    def test_the_student_comes_closer(
        self,
        cli: Cli,
        tail: str,
        bucket_cache: Path,
        tiny_student: Path,
        tiny_teacher: Path,
        text_file: Path,
        tmp_path: Path,
    ) -> None:
        words = ("--iters", 40, "--learning-rate", 3e-3, "--alpha", 1.0, "--temperature", 1.0, "--tail", tail)
        got = cli(
            "train", "--student", tiny_student, "--cache", bucket_cache, "--out", tmp_path / "run", *words
        )
        assert got.code == 0, got.err
        judged = ("--teacher", tiny_teacher, "--data", text_file, "--split", "train", "--json")
        before = cli("eval", tiny_student, *judged).json
        after = cli("eval", tmp_path / "run", *judged).json
        assert after["top1"] > before["top1"]
        assert after["kl@1"] < 0.6 * before["kl@1"]

    def test_a_run_leaves_its_settings_metrics_and_a_model(
        self, cli: Cli, bucket_cache: Path, tiny_student: Path, tmp_path: Path
    ) -> None:
        config = tmp_path / "run.yaml"
        config.write_text("iters: 99\nlearning_rate: 1e-3\nalpha: 0.25\nsteps_per_report: 2\n")
        run = tmp_path / "run"
        got = cli(
            "train",
            "-c",
            config,
            "--model",
            tiny_student,
            "--cache",
            bucket_cache,
            "--out",
            run,
            "--iters",
            6,
            "--json",
        )
        assert got.code == 0, got.err
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == [2, 4, 6]
        assert {"loss", "soft", "hard", "learning_rate", "tokens_per_second"} <= lines[0].keys()
        total = 0.25 * 2.0**2 * lines[0]["soft"] + 0.75 * lines[0]["hard"]
        assert lines[0]["loss"] == pytest.approx(total, rel=0.02)
        saved = (run / "config.yaml").read_text()
        assert "iters: 6" in saved
        assert "learning_rate: 0.001" in saved
        assert load_model(run / "model").num_layers == 2
        again = cli("train", "-c", run / "config.yaml", "--out", tmp_path / "again", "--json")
        assert again.code == 0, again.err
        assert again.json["loss"] == pytest.approx(got.json["loss"], rel=1e-5)


def test_inspect_shows_the_teachers_view(cli: Cli, bucket_cache: Path, tiny_teacher: Path) -> None:
    view = cli("inspect", bucket_cache, "--sequence", 0, "--position", 5, "--temperature", 2, "--json").json
    cache = LogitCache(bucket_cache)
    head, tail = cached_events(cache, cache.sequence(0), 2.0)
    assert [entry["probability"] for entry in view["top"]] == pytest.approx(head[5, :10].tolist(), rel=1e-4)
    assert view["tail_probability"] == pytest.approx(tail[5], rel=1e-4)
    ids = cache.sequence(0).token_ids
    assert view["context"] == load_model(tiny_teacher).tokenizer.decode(ids[:6].tolist())
    assert (
        "teacher at T=2"
        in cli("inspect", bucket_cache, "--sequence", 0, "--position", 5, "--temperature", 2).out
    )


def test_help_imports_neither_mlx_nor_mlx_lm() -> None:
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = [n for n in ('mlx', 'mlx_lm', 'transformers', 'pyarrow') if n in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("cache", "train", "init-student", "inspect", "verify", "repair", "eval", "demo"):
        assert f"  {command} " in done.stdout
