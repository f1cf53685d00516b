"""A cache from a stranger executes nothing, stays in its folder, fills no memory, keeps nobody waiting."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pmetal_distill.modelling.gguf_format import read_gguf
from pmetal_distill.models import load_model, load_tokenizer
from pmetal_distill.offline.commit import hash_stream
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.repair import repair_cache
from pmetal_distill.offline.verify import MAX_MISSING, verify_cache
from schemas.errors import CacheError, CorruptionError, ModelError
from schemas.manifest import seal
from tests.faults.attacks import ATTACKS, dataset
from tests.faults.damage import flips
from tests.faults.forge import forge_shard
from tests.faults.processes import worker
from tests.faults.world import World, contents, noticed

MEGABYTES = 400


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory by Linux's ways")
def test_attacks_inside_files_are_refused_with_little_memory(world: World, tmp_path: Path) -> None:
    """In a process that may take 400 MB more than it has; each within a second; `verify` says no, too."""
    outcomes = worker("attack", world.pristine, tmp_path, MEGABYTES)
    done = {o["name"]: o for o in outcomes if "said" in o}
    assert done.keys() == ATTACKS.keys()
    for name, (_, must) in ATTACKS.items():
        assert re.search(must, done[name]["said"]), done[name]
        assert done[name]["verify"], name
        assert done[name]["seconds"] < 1, done[name]


def test_a_file_taken_apart_and_put_together_is_no_attack(world: World, tmp_path: Path) -> None:
    folder = world.copy(tmp_path / "c")
    forge_shard(folder, lambda parquet: None)
    forge_shard(folder, lambda parquet: None, family="hidden")
    assert noticed(world, folder) == ""
    assert contents(folder) == world.files


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody's, which no cache may touch."""
    folder = tmp_path / "outside"
    (folder / "poetry").mkdir(parents=True)
    (folder / ("ab" * 16)).mkdir()
    for name in ("poetry.lock", "poetry/code.py", "ab" * 16 + ".lock", "ab" * 16 + "/x", "tokenizer.json"):
        (folder / name).write_text(f"precious {name}")
    return folder


@pytest.mark.parametrize("name", ["_tmp", "quarantine", "tokenizer", "shards", "bases", "commits"])
@pytest.mark.parametrize("target", ["outside", "nowhere"])
def test_linked_folders_lead_nowhere(
    world: World, tmp_path: Path, outside: Path, name: str, target: str
) -> None:
    """Neither resuming nor repairing reads, writes or removes behind a link."""
    before = contents(outside)
    folder = world.copy(tmp_path / "c")
    if (folder / name).exists():
        (folder / name).rename(tmp_path / "away")
    (folder / name).symlink_to(tmp_path / target)
    shard = folder / "shards/targets-00000-0123456789abcdef.parquet"
    if shard.parent.exists() and not shard.parent.is_symlink():
        shard.write_bytes(b"to be moved")
    errors = 0
    for action in (repair_cache, world.write, noticed_by(world)):
        try:
            action(folder)
        except CacheError:
            errors += 1
    assert errors >= (3 if name not in ("_tmp", "quarantine") else 1)
    assert contents(outside) == before
    assert not (tmp_path / "nowhere").exists()


def noticed_by(world: World) -> Callable[[Path], None]:
    """A reader of the whole cache."""

    def read(folder: Path) -> None:
        if message := noticed(world, folder):
            raise CorruptionError(message)

    return read


@pytest.mark.parametrize("names", [["dataset.json"], None], ids=["dataset", "all others"])
def test_hard_links_are_never_written_through(world: World, tmp_path: Path, names: list[str] | None) -> None:
    """Every damaged file is also a file of somebody's, and stays as it is while the cache is mended."""
    folder, outside = world.copy(tmp_path / "c"), tmp_path / "outside"
    outside.mkdir()
    for name in names or sorted(world.files.keys() - {"dataset.json"}):
        next(flips(world.pristine, [name], 0)).apply(folder)
        os.link(folder / name, outside / name.replace("/", "-"))
    before = contents(outside)
    world.mend(folder)
    assert contents(folder) == world.files
    assert contents(outside) == before


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../tokenizer.json", "..", ".hidden", "a/b", "", "x" * 101, "a\nb"]
)
def test_names_cannot_leave_the_folder(world: World, tmp_path: Path, name: str) -> None:
    folder = world.copy(tmp_path / "c")
    dataset(lambda raw: raw["tokenizer"][0].update(name=name))(folder)
    with pytest.raises(CorruptionError, match=r"'tokenizer': 'name': must be a string"):
        verify_cache(folder)


def test_pipes_among_the_files_keep_nobody_waiting(world: World, tmp_path: Path) -> None:
    folder = world.copy(tmp_path / "c")
    (folder / "_tmp").mkdir(exist_ok=True)
    strays = (
        f"_tmp/{'0a' * 16}.lock",
        "commits/00009.json",
        "commits/x",
        "shards/x",
        "bases/x",
        ".x",
        "_tmp/y.lock",
    )
    for name in strays:
        os.mkfifo(folder / name)
    world.write(folder)
    assert noticed(world, folder) == ""
    assert {f.path for f in verify_cache(folder).findings} == {"shards/x", "bases/x"}
    repair_cache(folder)
    os.mkfifo(folder / "tokenizer/x")
    with pytest.raises(CorruptionError, match="tokenizer/x: must be named by"):
        _ = LogitCache(folder).tokenizer_path


def test_a_pipe_for_a_model_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"cannot be read \(a folder, pipe or device"):
        read_gguf(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="a model must be a folder or a"):
        load_model(tmp_path / "x.gguf")


def test_a_file_that_grows_while_it_is_hashed_ends(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * 1000)

    class Growing:
        def __init__(self) -> None:
            self.file = path.open("rb")

        def read(self, size: int) -> bytes:
            with path.open("ab") as more:
                more.write(b"a" * (1 << 21))
            return self.file.read(size)

        def seek(self, *where: int) -> int:
            return self.file.seek(*where)

    growing = Growing()
    with growing.file:
        hash_stream(growing)  # type: ignore[arg-type]


def test_sixteen_million_missing_shards_are_counted_not_listed(world: World, tmp_path: Path) -> None:
    folder = world.copy(tmp_path / "c")
    dataset(lambda raw: raw.update(num_sequences=(1 << 25)))(folder)
    findings = [finding for finding in verify_cache(folder).findings if finding.kind == "missing"]
    assert len(findings) == MAX_MISSING + 1
    assert "16,776,214 more shards" in findings[-1].message


def test_strange_tokenizer_files_are_refused_and_repaired(world: World, tmp_path: Path) -> None:
    """A tokenizer library takes whatever lies in its folder: a chat template, code."""
    folder = world.copy(tmp_path / "c")
    (folder / "tokenizer/chat_template.jinja").write_text("{{ evil }}")
    (folder / "tokenizer/.DS_Store").write_text("harmless")
    with pytest.raises(
        CorruptionError, match=r"tokenizer/chat_template\.jinja: must be named by dataset\.json"
    ):
        _ = LogitCache(folder).tokenizer_path
    assert [f.path for f in verify_cache(folder).findings] == ["tokenizer/chat_template.jinja"]
    assert repair_cache(folder).moved == ["tokenizer/chat_template.jinja"]
    assert LogitCache(folder).tokenizer_path.is_dir()


EVIL = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\n"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def test_code_that_comes_with_a_model_runs_only_when_asked(
    tiny_teacher: Path, tmp_path: Path, marker: Path
) -> None:
    """`model_file` of mlx_lm, `auto_map` of transformers for the model and the tokenizer."""
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "model"))
    (folder / "evil.py").write_text(
        EVIL.format(marker=str(marker)) + "class Model: pass\nclass ModelArgs: pass\n"
    )
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.Evil"]},
        tokenizer_class="Evil",
    )
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    for load in (load_model, load_tokenizer):
        try_to(load, folder)
    edit(folder / "config.json", model_file="evil.py")
    with pytest.raises(ModelError):
        load_model(folder)
    assert not marker.exists()
    with pytest.raises(ModelError):
        load_model(folder, trust_remote_code=True)
    assert marker.exists()


def test_code_that_comes_with_a_cache_does_not_run(world: World, tmp_path: Path, marker: Path) -> None:
    folder = world.copy(tmp_path / "c")
    code = EVIL.format(marker=str(marker)).encode()
    config = json.dumps(
        {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    ).encode()
    files = {"evil.py": code, "tokenizer_config.json": config, "__init__.py": code}

    def add(raw: dict[str, Any]) -> None:
        raw["tokenizer"] = [
            {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        ]

    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / "tokenizer" / name).write_bytes(data)
    dataset(add)(folder)
    try_to(load_tokenizer, LogitCache(folder).tokenizer_path)
    for words in (["inspect", folder], ["inspect", folder, "--sequence", 0], ["verify", folder]):
        with contextlib.suppress(SystemExit):
            main([str(word) for word in words])
    assert not marker.exists()


def try_to(load: Callable[[Path], object], folder: Path) -> None:
    with contextlib.suppress(ModelError):
        load(folder)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_files_say_cannot_take_over_a_terminal(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.copy(tmp_path / "c")
    dataset(lambda raw: raw.update(meta={"teacher": "\x1b]0;owned\x07\x1b[2J\u202e"}))(folder)
    main(["inspect", str(folder)])
    shown = capsys.readouterr().out
    assert r"\x1b]0;owned\x07\x1b[2J\u202e" in shown
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    raw = json.loads((folder / "dataset.json").read_bytes())
    del raw["checksum"]
    raw["\x1b[2J"] = 1
    (folder / "dataset.json").write_bytes(seal(raw))
    with pytest.raises(SystemExit):
        main(["verify", str(folder)])
    assert "\x1b" not in capsys.readouterr().err
