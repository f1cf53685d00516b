"""The world of a launcher: sums and means over real processes, and what happens when one of them dies."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.parallel import World
from tests.ranks import run_ranks, start_ranks, wait_ranks

PREAMBLE = """
import json, os, signal, sys
import mlx.core as mx
from pmetal_distill.parallel import World
world = World.launched()
"""


def write(folder: Path, code: str) -> Path:
    path = folder / "program.py"
    path.write_text(PREAMBLE + code)
    return path


def test_one_process_alone_sends_nothing() -> None:
    world = World.launched()
    assert (world.rank, world.size, world.leads) == (0, 1, True)
    gradients = {"w": mx.array([1.0, 2.0])}
    assert world.sum_gradients(gradients) is gradients
    assert world.all(True)
    assert not world.all(False)
    assert not world.any(False)


@pytest.mark.parametrize("hosts", ["", "\n", "[]", '[["127.0.0.1:1"]]'])
def test_one_process_of_a_launcher_waits_for_nobody(
    hosts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts.json").write_text(hosts)
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    assert World.launched().size == 1


@pytest.mark.parametrize("size", [2, 3])
def test_sums(tmp_path: Path, size: int) -> None:
    code = """
r = world.rank
gradients = {"a": mx.full((3, 2), r + 1.0), "b": [mx.array([10.0 * r])]}
gradients["h"] = mx.full((2,), r, mx.float16)
total = world.sum_gradients(gradients)
print(json.dumps({
    "rank": r, "size": world.size, "leads": world.leads, "sum": world.sum(mx.array([1, r])).tolist(),
    "a": total["a"].tolist(), "b": total["b"][0].tolist(), "h": total["h"].tolist(),
    "all": [world.all(True), world.all(r == 0)], "any": [world.any(r == 1), world.any(False)],
}))
"""
    found = [json.loads(end.out) for end in run_ranks([write(tmp_path, code)], size, tmp_path)]
    ranks = np.arange(size)
    for rank, said in enumerate(found):
        assert (said["rank"], said["size"], said["leads"]) == (rank, size, rank == 0)
        assert said["sum"] == [size, ranks.sum()]
        assert said["a"] == np.full((3, 2), (ranks + 1).sum()).tolist()
        assert said["b"] == [10 * ranks.sum()]
        assert said["h"] == [ranks.sum()] * 2
        assert said["all"] == [True, False]
        assert said["any"] == [True, False]


def test_a_dead_peer_is_an_error_that_says_so(tmp_path: Path) -> None:
    code = """
from schemas.errors import PeerLostError
world.all(True)
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    for _ in range(1000):
        world.all(True)
except PeerLostError as error:
    print(error)
"""
    survivor, dead = wait_ranks(start_ranks([write(tmp_path, code)], 2, tmp_path))
    assert dead.code == -9
    assert "--resume" in survivor.out, survivor.err
    assert survivor.code == 0


def test_a_dead_peer_is_noticed_amid_many_sums(tmp_path: Path) -> None:
    code = """
import time
from pmetal_distill import parallel
from schemas.errors import PeerLostError
parallel.PART_BYTES = 64
world.all(True)
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.5)
try:
    world.sum_gradients({str(n): mx.ones((8, 2)) for n in range(12)})
except PeerLostError as error:
    print(error)
"""
    survivor, _ = wait_ranks(start_ranks([write(tmp_path, code)], 2, tmp_path))
    assert "--resume" in survivor.out, survivor.err


def test_parts_of_gradients_add_up(tmp_path: Path) -> None:
    code = """
from pmetal_distill import parallel
parallel.PART_BYTES = 40
arrays = {str(n): mx.arange(n + 1.0) * (world.rank + 1) for n in range(9)}
total = world.sum_gradients({"x": [arrays], "y": {}})
print(json.dumps({name: array.tolist() for name, array in total["x"][0].items()}))
"""
    for end in run_ranks([write(tmp_path, code)], 2, tmp_path):
        assert json.loads(end.out) == {str(n): [3.0 * i for i in range(n + 1)] for n in range(9)}
