"""Stage one against its floor: speed and peak memory beside a bare loop of the same teacher.

The bare loop runs the teacher's body on the same batches and its head on the same rows and chunks, and keeps
nothing; it runs before and after `cache`, as machines are noisy. Tokens a second of `cache` count forward
pass, capture, encoding and writing; calibration stands beside them. Memory is MLX's own peak counter, per
batch shape: what `cache` needs beyond the body's activations must not grow with it.

    python benchmarks/stage_one.py [--teacher M] [--tokens 4096] [--tail sketch] [--json FILE]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pmetal_distill  # noqa: F401  (preloads OpenBLAS)

# isort: split
import mlx.core as mx

from pipeline.cache import read_data, run_cache
from pipeline.console import Console, table
from pipeline.data import split_by_size
from pipeline.demo import demo_teacher
from pipeline.demo_text import pydoc_topics
from pipeline.settings import CacheSettings
from pipeline.teacher import TeacherRunner
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.capture import rows_at_once

SHAPES = ((2, 256), (8, 256), (4, 512), (8, 512))


def bare_loop(teacher: LoadedModel, settings: CacheSettings, *, head: bool) -> None:
    """Body (and head) on every batch."""
    data = read_data(settings, teacher)
    runner = TeacherRunner(teacher, data, settings.batch_size)
    for states in runner.run(range(data.num_sequences)):
        mx.eval(states.final)
        chunk = rows_at_once(settings.head_chunk, teacher.vocab_size)
        for start in range(0, len(states.final) if head else 0, chunk):
            mx.eval(teacher.logits(states.final[start : start + chunk]))


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and peak MLX memory in MB above what was held before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started, (mx.get_peak_memory() - held) / 1e6


def write_text(path: Path, tokens: int) -> None:
    """About so many tokens of Python's documentation."""
    topics, _ = split_by_size(list(pydoc_topics()), fraction=0.2)
    left = 4 * tokens
    with path.open("w", encoding="utf-8") as file:
        for topic in topics:
            if left > 0:
                file.write(json.dumps({"text": topic.text[:left]}) + "\n")
                left -= len(topic.text)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a batch shape."""
    source = arguments.teacher or str(demo_teacher())
    teacher = load_model(source)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        write_text(text, arguments.tokens)
        for index, (batch_size, seq_len) in enumerate(SHAPES):
            settings = CacheSettings(
                teacher=source,
                data=str(text),
                out=Path(folder) / f"cache-{index}",
                tail=arguments.tail,
                max_seq_len=seq_len,
                batch_size=batch_size,
                calibration_tokens=arguments.tokens,
            )
            rows.append(one_shape(teacher, settings))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def one_shape(teacher: LoadedModel, settings: CacheSettings) -> dict[str, Any]:
    """Body alone, body and head, and stage one, in one run."""
    quiet = Console(quiet=True)
    _, body_mb = measured(lambda: bare_loop(teacher, settings, head=False))
    before, bare_mb = measured(lambda: bare_loop(teacher, settings, head=True))
    summary: dict[str, Any] = {}
    _, cache_mb = measured(lambda: summary.update(run_cache(settings, quiet, teacher=teacher)))
    after, _ = measured(lambda: bare_loop(teacher, settings, head=True))
    bare_speed = 2 * summary["tokens"] / (before + after)
    return {
        "batch": f"{settings.batch_size} x {settings.max_seq_len}",
        "bare_tokens_per_second": bare_speed,
        "bare_before_after": before / after,
        "cache_tokens_per_second": summary["tokens_per_second"],
        "ratio": summary["tokens_per_second"] / bare_speed,
        "calibration_seconds": summary["calibration_seconds"],
        "seconds": summary["seconds"],
        "body_mb": body_mb,
        "bare_mb": bare_mb,
        "cache_mb": cache_mb,
        "beyond_body_mb": cache_mb - body_mb,
    }


def main() -> None:
    """Prints one line a shape and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--tail", choices=("sketch", "bucket", "none"), default="sketch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = run(arguments)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
