"""Processes for the tests of this folder: `python -m tests.faults.worker WHAT ...` prints lines of JSON."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pmetal_distill.offline.repair import repair_cache
from pmetal_distill.offline.verify import VerifyReport, verify_cache
from schemas.errors import CacheError, PmetalError
from tests.faults.disk import Disk
from tests.faults.world import World, noticed


def forked(job: Callable[[], object]) -> int:
    """The exit status of a child that runs `job`: 0 done, 1 an error that a user can act on, -9 killed."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            job()
            status = 0
        except PmetalError as error:
            print(error, file=sys.stderr, flush=True)
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(pristine: str, folder: str, what: str, *sites: str) -> None:
    """Kills a `write` or `repair` at each site, then completes the cache; says how each went."""
    world = World(Path(pristine))
    for at in map(int, sites):
        root = Path(folder) / f"{what}-{at}"
        if what == "repair":
            damage(world.copy(root))

        def job(root: Path = root, at: int = at) -> None:
            with Disk(root, "kill", at):
                world.write(root) if what == "write" else repair_cache(root)

        status = forked(job)
        readable = world.check_committed(root) if what == "write" else None
        forked(lambda root=root: world.mend(root)) if what == "repair" else world.write(root)  # type: ignore[misc]
        world.check_whole(root)
        shutil.rmtree(root)
        print(json.dumps({"at": at, "status": status, "readable": readable}), flush=True)


def damage(root: Path) -> None:
    """A shard, a sidecar and a tokenizer file that must be repaired."""
    shard = next((root / "shards").glob("targets-00001-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (root / "tokenizer/tokenizer.json").write_bytes(b"[]")
    next((root / "bases").glob("codebook-*")).write_bytes(b"x")


def write(pristine: str, folder: str, delay_seed: str, direction: str) -> None:
    """Writes what is missing; with a seed, on a disk that dawdles. Waits for a line on stdin first."""
    world = World(Path(pristine))
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    root = Path(folder)
    with Disk(root, "slow" if delay_seed else "count", int(delay_seed or 0)):
        world.write(root, backwards=direction == "backwards")
    print(json.dumps({"done": True}), flush=True)


def small_disk(pristine: str, mount: str, *limits: str) -> None:
    """Writes to file systems of these limits until they are full, makes room, completes; needs `mount`."""
    world = World(Path(pristine))
    for limit in limits:
        run("mount", "-t", "tmpfs", "-o", limit, "tmpfs", mount)
        root = Path(mount) / "cache"
        message = attempt(lambda root=root: world.write(root))  # type: ignore[misc]
        readable = world.check_committed(root)
        run("mount", "-o", "remount,size=8m,nr_inodes=1k", mount)
        world.write(root)
        world.check_whole(root)
        run("mount", "-o", "remount,ro", mount)
        world.check_whole(root)
        refused = [attempt(lambda: world.write(root)), attempt(lambda: repair_cache(root))]  # noqa: B023
        run("umount", mount)
        print(json.dumps({"limit": limit, "error": message, "readable": readable, "read_only": refused}))


def attack(pristine: str, folder: str, megabytes: str) -> None:
    """Reads and verifies a cache after each attack, with little memory; says what the reader said."""
    from tests.faults.attacks import ATTACKS

    world = World(Path(pristine))
    world.check_whole(world.pristine)
    room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (
        int(megabytes) << 20
    )
    for number, (name, (change, _)) in enumerate(ATTACKS.items()):
        root = world.copy(Path(folder) / str(number))
        change(root)
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        print(json.dumps({"name": name, "begins": True}), flush=True)
        started = time.perf_counter()
        said = noticed(world, root)
        verdict = attempt(lambda root=root: say(verify_cache(root)))  # type: ignore[misc]
        outcome = {"name": name, "said": said, "verify": verdict, "seconds": time.perf_counter() - started}
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shutil.rmtree(root)
        print(json.dumps(outcome), flush=True)


def say(report: VerifyReport) -> None:
    """The findings as an error."""
    if not report.ok:
        raise CacheError("\n".join(map(str, report.findings)))


def attempt(job: Callable[[], object]) -> str:
    """What a user is told; "" if nothing went wrong."""
    try:
        job()
    except PmetalError as error:
        return str(error)
    return ""


def run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    {"attack": attack, "kill": kill, "write": write, "small_disk": small_disk}[sys.argv[1]](*sys.argv[2:])
