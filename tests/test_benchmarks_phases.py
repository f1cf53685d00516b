"""The profile of stage one times what there is."""

from pathlib import Path

from benchmarks.letters import write_letters
from benchmarks.phases import PHASES, timed
from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pipeline.teacher import TeacherRunner


def test_phases_are_found_and_left_as_they_were(tiny_teacher: Path, tmp_path: Path) -> None:
    write_letters(tmp_path / "text.jsonl", documents=12, characters=300)
    settings = CacheSettings(
        teacher=str(tiny_teacher),
        data=str(tmp_path / "text.jsonl"),
        out=tmp_path / "cache",
        max_seq_len=64,
        batch_size=2,
        sketch_rank=8,
        sketch_step=0.5,
        calibration_tokens=600,
        sequences_per_shard=8,
    )
    before = TeacherRunner._forward
    with timed() as seconds:
        run_cache(settings, Console(quiet=True))
    assert TeacherRunner._forward is before
    assert set(seconds) <= set(PHASES)
    assert set(PHASES) - set(seconds) <= {"main: judge stretches"}  # data of one stretch is not judged
    assert all(value > 0 for value in seconds.values())
