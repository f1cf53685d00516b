"""Starting the worker and the command line as processes of their own."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def worker(*words: object, prefix: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Runs the worker to its end; what it said."""
    command = [*prefix, sys.executable, "-m", "tests.faults.worker", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def start_writer(
    pristine: Path, folder: Path, *, slow_seed: int | None = None, direction: str = "forwards"
) -> "subprocess.Popen[str]":
    """A writer that waits for a line before it begins."""
    words = [str(pristine), str(folder), "" if slow_seed is None else str(slow_seed), direction]
    command = [sys.executable, "-m", "tests.faults.worker", "write", *words]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def go(*processes: "subprocess.Popen[str]") -> None:
    """Lets writers begin at the same moment."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def wait(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and stderr."""
    _, errors = process.communicate()
    return process.returncode, errors


class CacheCommand:
    """`pmetal-pipeline cache` on a tiny teacher."""

    def __init__(self, teacher: Path, data: Path) -> None:
        self._teacher, self._data = teacher, data

    def start(self, out: Path) -> "subprocess.Popen[str]":
        """Runs `cache --resume` into a folder."""
        words = [
            "--tail",
            "bucket",
            "--max-seq-len",
            "64",
            "--sequences-per-shard",
            "1",
            "--quiet",
            "--resume",
        ]
        command = [sys.executable, "-m", "tests.faults.cli", "cache", "--out", str(out), *words]
        command += ["--teacher", str(self._teacher), "--data", str(self._data)]
        pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=environment)

    def finish(self, out: Path) -> None:
        """Runs it to its end."""
        code, errors = wait(self.start(out))
        assert code == 0, errors

    def kill(self, out: Path, moment: random.Random, *, writers: int) -> int:
        """Kills writers at random moments, mostly after they have begun to write; how many it met alive."""
        processes = [self.start(out) for _ in range(writers)]
        if moment.random() < 0.85:
            wait_until_writing(out, processes)
        killed = 0
        for process in processes:
            time.sleep(moment.expovariate(4))
            killed += process.poll() is None
            process.kill()
            process.communicate()
        return killed


def wait_until_writing(out: Path, processes: "Sequence[subprocess.Popen[str]]") -> None:
    """Until a writer has a scratch folder, or all have ended."""
    while any(process.poll() is None for process in processes):
        if any((out / "_tmp").glob("*.lock")):
            return
        time.sleep(0.01)


def can_mount() -> list[str]:
    """Words before a command that let it mount; empty where that is not permitted."""
    prefix = ["unshare", "--map-root-user", "--mount"]
    if sys.platform != "linux" or not shutil.which("unshare"):
        return []
    probe = [*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return prefix if subprocess.run(probe, capture_output=True, check=False).returncode == 0 else []
