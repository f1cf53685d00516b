"""What a cache weighs: sidecars count, and where they outweigh the rest it is said before the run."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import run_cache, sidecar_hint
from pipeline.console import Console
from pipeline.demo import report
from pipeline.inspection import describe
from pipeline.settings import CacheSettings

QUIET = Console(quiet=True)


def settings(teacher: Any, data: Any, out: Path, **more: Any) -> CacheSettings:
    return CacheSettings(teacher=str(teacher), data=str(data), out=out, **more)


def test_compression_is_given_with_and_without_sidecars(
    tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    few = {"max_seq_len": 64, "sketch_rank": 8, "calibration_tokens": 400}
    made = run_cache(settings(tiny_teacher, text_file, tmp_path / "c", **few), QUIET)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "c" / "bases").iterdir())
    assert made["sidecar_bytes"] == on_disk
    full = 2 * 320
    assert made["compression"] == pytest.approx(full / made["bytes_per_token"])
    with_sidecar = made["bytes_per_token"] + on_disk / made["tokens"]
    assert made["bytes_per_token_with_sidecar"] == pytest.approx(with_sidecar)
    assert made["compression_with_sidecar"] == pytest.approx(full / with_sidecar)
    assert made["refit_bytes_per_token"] == 0
    described = describe(tmp_path / "c")
    for name in ("compression", "compression_with_sidecar", "sidecar_bytes", "refit_bytes_per_token"):
        assert described[name] == made[name]


def test_a_basis_that_does_not_pay_is_said_before_the_run(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = settings(tiny_teacher, "d", tmp_path / "c")
    hint = sidecar_hint(place, vocab_size=49152, num_tokens=999)
    assert hint is not None
    assert "25.4 MB, 25,388 bytes for each of these 999 tokens" in hint
    assert "'--tail bucket --top-k 64'" in hint
    assert "from about 330,000 tokens on" in hint
    assert sidecar_hint(place, vocab_size=49152, num_tokens=10**6) is None
    assert sidecar_hint(settings("t", "d", tmp_path, tail="bucket"), 49152, 999) is None
    (tmp_path / "little.txt").write_text("A teacher writes what it knows about every token. " * 5)
    run_cache(settings(tiny_teacher, tmp_path / "little.txt", tmp_path / "c", sketch_rank=24), Console())
    said = capsys.readouterr().err
    assert 0 < said.index("the basis of a sketch weighs 0.0166 MB") < said.index("calibrating")


def test_the_demo_counts_its_sidecars() -> None:
    cache = {
        "bytes_per_token": 50.0,
        "compression": 2000.0,
        "sidecar_bytes": 25_000_000,
        "compression_with_sidecar": 40.0,
        "tokens_per_second": 1.0,
    }
    scores = {
        "kl@1": 1.0,
        "kl@2": 1.0,
        "top1": 0.1,
        "perplexity": 3.0,
        "tokens": 9,
        "teacher_perplexity": 2.0,
    }
    text = report(
        {
            "before": scores,
            "after": scores,
            "cache": cache,
            "train": {"tokens_per_second": 1.0},
            "seconds": 1.0,
            "next": "",
        }
    )
    lines = {
        line.rsplit(None, 1)[0].strip(): line.rsplit(None, 1)[1]
        for line in text.splitlines()
        if " " in line.strip()
    }
    assert lines["times smaller than float16 logits"] == "40"
    assert lines["the same in a cache of 100 M tokens"] == "1,990"
