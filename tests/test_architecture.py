"""The walk through the code is true: names exist, types are those of a real run, the tree is whole."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pipeline.teacher import TeacherRunner
from pipeline.text import packed_text
from pmetal_distill import Distiller, LogitCache, load_model
from pmetal_distill.offline.capture import CoordinateMap, PendingCapture
from tests.pages import ROOT
from tests.tiny import SENTENCES, build_tiny_model
from tools.tree import PACKAGES, tree

PAGE = (ROOT / "docs" / "architecture.md").read_text()
TREE = PAGE.split("## The files")[1]
B, L, D, V, K, M, R = 3, 64, 40, 320, 16, 7, 8


def test_the_tree_is_that_of_the_code() -> None:
    assert tree() in TREE, "run: python -m tools.tree"


def test_every_file_is_in_it_once() -> None:
    listed, path = [], []
    for line in TREE.split("```")[1].strip("\n").splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 4
        path = [*path[:depth], name.rstrip("/")]
        assert len(line.split()) > 2, line
        listed.append("/".join(path))
    files = {path for path in listed if path.endswith(".py")}
    there = {p.relative_to(ROOT).as_posix() for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert len(listed) == len(set(listed))
    assert files == {path for path in there if not path.endswith("/__init__.py")}
    assert all((ROOT / path).exists() for path in listed)
    assert {path.removesuffix("/__init__.py") for path in there - files} <= set(listed)


def names() -> list[str]:
    """The dotted names of the page."""
    return sorted(set(re.findall(r"`((?:pipeline|pmetal_distill|schemas)(?:\.\w+)+)`", PAGE)))


@pytest.mark.parametrize("name", names())
def test_a_name_exists(name: str) -> None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return
    raise AssertionError(f"{name} is no module")


def test_the_page_names_something_of_every_station() -> None:
    stations = re.split(r"^### \d+\. ", PAGE, flags=re.MULTILINE)[1:]
    assert len(stations) == 15
    for station in stations:
        assert re.search(r"`(?:pipeline|pmetal_distill)\.", station), station


@pytest.fixture(scope="module")
def stations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One text on its way, as far as there are arrays."""
    folder = tmp_path_factory.mktemp("walk")
    teacher = build_tiny_model(folder / "teacher", hidden_size=D, vocab_size=V)
    (folder / "text.txt").write_text(SENTENCES[1] * 31)
    settings = CacheSettings(
        teacher=str(teacher),
        data=str(folder / "text.txt"),
        out=folder / "cache",
        max_seq_len=L,
        sketch_rank=R,
        hidden_layers=(1,),
    )
    run_cache(settings, Console(quiet=True))
    model, cache = load_model(teacher), LogitCache(folder / "cache", hidden_layers=(1,))
    data = packed_text(str(folder / "text.txt"), model, split="train", max_seq_len=L)
    states = next(TeacherRunner(model, data, B, layers=(1,)).run(range(B)))
    made = CoordinateMap("hidden", np.ones((R, D), np.float32), np.zeros(R, np.float32))
    captured = PendingCapture(states.final, model.logits, cache.spec, sketch=made).result()
    with cache.batches(batch_size=B, seed=0, shuffle=False) as batches:
        batch = next(batches)
    distiller = Distiller(LogitCache(folder / "cache"), load_model(teacher))
    return {
        "PackedSequence": data.sequence(data.num_sequences - 1),
        "TokenBatch": states.batch,
        "TeacherStates": states,
        "TargetArrays": captured,
        "Batch": batch,
        "loss": distiller.step(batch),
    }


def described(array: Any, *, trained: int, length: int) -> str:
    """A type as the page writes it."""
    sizes = {B: "B", L: "L", D: "d", K: "k", M: "m", R: "r", trained: "t", length: "n"}
    kind = str(array.dtype).removeprefix("mlx.core.")
    return f"{kind} [{', '.join(sizes[size] for size in array.shape)}]"


def rows() -> Iterator[tuple[str, str]]:
    yield from re.findall(r"^\| `(\w+(?:\.\w+)+)` \| (\w+ \[.*\]) \|$", PAGE, re.MULTILINE)


def test_types_are_those_of_the_page(stations: dict[str, Any]) -> None:
    length, trained = len(stations["PackedSequence"].token_ids), len(stations["TeacherStates"].final)
    assert len({B, L, D, K, M, R, trained, length}) == 8, (trained, length)
    checked = set()
    for name, shown in rows():
        station, *fields = name.split(".")
        value = stations[station]
        for field in fields:
            value = getattr(value, field)
        value = value[1] if isinstance(value, dict) else value
        assert described(value, trained=trained, length=length) == shown, name
        checked.add(name)
    assert len(checked) == 22


def test_a_loss_is_float32_scalars(stations: dict[str, Any]) -> None:
    for name in ("total", "soft", "hard", "hidden"):
        value = getattr(stations["loss"], name)
        assert (value.dtype, value.shape) == (mx.float32, ())
        assert f"`{name}`" in PAGE
        assert np.isfinite(value.item())


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / Path(link)).exists(), link
