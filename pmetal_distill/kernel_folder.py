"""Where compiled CUDA kernels are kept between processes, and that nothing damaged is loaded from there.

Building a kernel takes seconds, and a run needs dozens. MLX keeps those that it compiles itself in a folder
of temporary files, by names that say nothing about the GPU. Here it gets one in the user's cache for each
architecture and version of MLX, before it compiles the first one (it reads MLX_PTX_CACHE_DIR once).
`index.json` there has the SHA-256 of each kernel: at the start of a process what does not agree, or is not
whole, is removed and built again. Costs reading the folder, some milliseconds, and asking the driver for
the GPU, which MLX does anyway. On Apple GPUs and CPUs nothing is done: Metal keeps its own kernels.

A folder of the user's own in MLX_PTX_CACHE_DIR is used as it is. Where ours cannot be written, MLX keeps
its own.
"""

import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from pmetal_distill.home import cache_home

VARIABLE = "MLX_PTX_CACHE_DIR"
INDEX = "index.json"
_SUFFIXES = (".ptx", ".txt", ".cu")  # of one kernel of MLX: machine code or PTX, names in it, source
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_ELF = b"\x7fELF"


@cache
def kernel_folder() -> Path | None:
    """The folder, ready for use; None where there is no CUDA GPU or no folder can be written."""
    if given := os.environ.get(VARIABLE):
        folder = Path(given)
        return folder if _writable(folder) else None
    if (gpu := architecture()) is None:
        return None
    folder = cache_home() / "kernels" / f"mlx-{_mlx_version()}-{gpu}"
    if not _writable(folder):
        return None
    remove_damaged(folder)
    os.environ[VARIABLE] = str(folder)
    atexit.register(index_kernels, folder)
    return folder


@cache
def architecture() -> str | None:
    """Of the first NVIDIA GPU, as NVRTC names it: "sm_90"; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else f"sm_{major.value}{minor.value}"


def remove_damaged(folder: Path) -> list[str]:
    """Removes kernels of MLX that are not what was written, or not all of it; their names."""
    index, removed = _read_index(folder), []
    for path in _kernels(folder):
        name = path.relative_to(folder).as_posix()
        if not (_as_indexed(path, index[name]) if name in index else _whole(path)):
            removed.append(name)
            for suffix in _SUFFIXES:
                path.with_suffix(suffix).unlink(missing_ok=True)
    _write_index(folder, index, {name: digest for name, digest in index.items() if name not in removed})
    return removed


def index_kernels(folder: Path) -> None:
    """Writes down the hashes of the kernels that are there and whole. A full disk leaves the old index."""
    index, found = _read_index(folder), dict[str, object]()
    for path in _kernels(folder):
        name = path.relative_to(folder).as_posix()
        if name in index:
            found[name] = index[name]
        elif _whole(path):
            found[name] = _digest(path)
    _write_index(folder, index, found)


def _write_index(folder: Path, old: dict[str, object], new: dict[str, object]) -> None:
    if new == old:
        return
    with contextlib.suppress(OSError):
        write_whole(folder / INDEX, json.dumps(new, indent=0).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all, also where processes write the same.

    It need not survive a power cut, so nothing is flushed: what is kept here can be built again.
    """
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _kernels(folder: Path) -> Iterator[Path]:
    """MLX puts kernels with long names into folders of their own."""
    yield from sorted(folder.rglob("*.ptx"))


def _as_indexed(path: Path, digest: object) -> bool:
    try:
        return _digest(path) == digest
    except OSError:
        return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes())
    digest.update(path.with_suffix(".txt").read_bytes())
    return digest.hexdigest()


def _whole(path: Path) -> bool:
    """Whether a file that nobody has vouched for is at least complete, as far as its own headers say."""
    try:
        code, names = path.read_bytes(), path.with_suffix(".txt").read_bytes()
    except OSError:
        return False
    if not names.endswith(b"\n"):
        return False
    if not code.startswith(_ELF):
        return code.rstrip(b"\0").endswith(b"}\n")  # PTX
    # ELF64: where the table of sections begins, the size of an entry, how many; it is the last thing but one.
    start, entry, count = (int.from_bytes(code[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return len(code) >= start + entry * count > 0


def _read_index(folder: Path) -> dict[str, object]:
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _mlx_version() -> str:
    try:
        return metadata.version("mlx")
    except metadata.PackageNotFoundError:
        return "unknown"
