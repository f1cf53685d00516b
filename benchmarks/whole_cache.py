"""The whole `cache` command by the wall clock, beside the bare teacher, with a real model and real text.

    python benchmarks/whole_cache.py --teacher MODEL --data TEXT [--max-seq-len 1024 --batch-size 16]

The bare teacher runs body and head on the same packed batches, rows and chunks, keeping nothing, over the
first sequences, before and after; the mean counts. The command runs in a process of its own, from its start
to its end: imports, reading, tokenizing, loading, calibration, the pass, hashing. Beside it: its memory,
sampled twice a second; that of the last nine tenths should be flat.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (BLAS before MLX)

import mlx.core as mx  # isort: skip

from pipeline.settings import CacheSettings
from pipeline.teacher import TeacherRunner
from pipeline.text import packed_text
from pmetal_distill.losses.plain import token_slices
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.capture import rows_at_once

CLI = "from pipeline.cli import main; main()"


def bare_tokens_per_second(settings: CacheSettings, teacher: LoadedModel, data: Any, sequences: int) -> float:
    """Of body and head, nothing kept."""
    runner = TeacherRunner(teacher, data, settings.batch_size)
    chunk = rows_at_once(settings.head_chunk, teacher.vocab_size)

    def run(numbers: range) -> None:
        for states in runner.run(numbers):
            for rows in token_slices(len(states.final), chunk):
                mx.async_eval(teacher.logits(states.final[rows]))
        mx.synchronize()
        mx.clear_cache()  # the command beside it needs the memory

    run(range(settings.batch_size))
    numbers = range(min(sequences, data.num_sequences))
    started = time.perf_counter()
    run(numbers)
    return float(data.sequence_lengths()[: numbers.stop].sum()) / (time.perf_counter() - started)


def run_command(settings: CacheSettings) -> dict[str, Any]:
    """The command's JSON, its wall-clock seconds, and its resident memory in MB through its life."""
    line = [sys.executable, "-c", CLI, "cache", "--teacher", settings.teacher, "--data", settings.data]
    line += ["--out", str(settings.out), "--max-seq-len", str(settings.max_seq_len), "--json"]
    line += [
        "--batch-size",
        str(settings.batch_size),
        "--tail",
        settings.tail,
        "--top-k",
        str(settings.top_k),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    resident: list[float] = []

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            text = status.read_text() if status.exists() else ""
            resident.extend(
                float(row.split()[1]) / 1e3 for row in text.splitlines() if row.startswith("VmRSS")
            )
            time.sleep(0.5)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"cache: exit {process.returncode}")
    late = resident[len(resident) // 10 :]
    result: dict[str, Any] = json.loads(output)
    third = max(1, len(late) // 3)
    return {
        **result,
        "whole_seconds": time.perf_counter() - started,
        "resident_mb": [round(value) for value in resident],
        "resident_mb_thirds": [
            round(max(late[i : i + third], default=0)) for i in range(0, 3 * third, third)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tails", nargs="+", default=["sketch"])
    parser.add_argument("--bare-sequences", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="keep the caches there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    teacher = load_model(args.teacher)
    data = packed_text(args.data, teacher, split="train", max_seq_len=args.max_seq_len)
    with tempfile.TemporaryDirectory() as scratch:
        for tail in args.tails:
            settings = CacheSettings(
                teacher=args.teacher,
                data=args.data,
                out=(args.out or Path(scratch)) / tail,
                max_seq_len=args.max_seq_len,
                batch_size=args.batch_size,
                tail=tail,
                top_k=64 if tail == "bucket" else 16,
            )
            before = bare_tokens_per_second(settings, teacher, data, args.bare_sequences)
            print(f"bare teacher in {teacher.dtype}: {before:,.0f} tokens/s", flush=True)
            result = run_command(settings)
            after = bare_tokens_per_second(settings, teacher, data, args.bare_sequences)
            bare, whole = (before + after) / 2, result["tokens"] / result["whole_seconds"]
            found[tail] = {**result, "bare": [before, after], "whole_tokens_per_second": whole}
            print(f"bare teacher again: {after:,.0f} tokens/s")
            speed = result["tokens_per_second"]
            seconds, apart = (
                result["whole_seconds"],
                (result["calibration_seconds"], result["reading_seconds"]),
            )
            print(f"{tail}: {result['tokens']:,} tokens in {seconds:.1f} s by the wall clock")
            print(f"  the pass     {speed:,.0f} tokens/s, {speed / bare:.1%} of bare")
            print(f"  the command  {whole:,.0f} tokens/s, {whole / bare:.1%} of bare")
            print(f"  calibration {apart[0]:.1f} s, reading {apart[1]:.1f} s")
            print(f"  resident MB, largest of each third: {result['resident_mb_thirds']}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
