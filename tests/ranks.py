"""Runs a program in several processes as `mlx.launch` does, but lets each end as it will."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


def start_ranks(arguments: Sequence[object], size: int, folder: Path) -> list["subprocess.Popen[str]"]:
    """Starts `python ARGUMENTS` once for each rank, joined in a ring on this machine."""
    hosts = [[f"127.0.0.1:{port}"] for port in _free_ports(size)]
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=folder, delete=False) as file:
        json.dump(hosts, file)
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": file.name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def wait_ranks(processes: Sequence["subprocess.Popen[str]"], *, seconds: float = 120) -> list[Ended]:
    """Waits for all of them."""
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=seconds)
        ended.append(Ended(process.returncode, out, err))
    return ended


def run_ranks(arguments: Sequence[object], size: int, folder: Path) -> list[Ended]:
    """Starts and waits."""
    return wait_ranks(start_ranks(arguments, size, folder))


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
