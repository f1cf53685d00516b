"""`push` and `pull` for the command line."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.console import Console


def push(cache: Path, url: str, console: Console) -> dict[str, Any]:
    """Copies a cache to object storage; what was moved and what was there."""
    from pmetal_distill.offline import transfer
    from pmetal_distill.offline.store import Store

    total = sum(ref.num_bytes for ref in transfer.files_of(Store.open(cache)).values())
    with console.progress("pushing", total=total, unit="bytes") as progress:
        return asdict(transfer.push(cache, url, progress=progress.advance, told=progress.tell))


def pull(url: str, cache: Path, console: Console) -> dict[str, Any]:
    """Copies a cache from object storage; what was moved and what was there."""
    from pmetal_distill.offline.transfer import Pull

    waiting = _Waiting()
    job = Pull(url, cache, told=waiting.tell)
    with console.progress("pulling", total=job.num_bytes, unit="bytes") as progress:
        waiting.then = progress.tell
        return asdict(job.run(progress=progress.advance))


class _Waiting:
    """Attempts that fail before there is a bar are not shown."""

    def __init__(self) -> None:
        self.then: Callable[[str], None] = lambda _: None

    def tell(self, remark: str) -> None:
        self.then(remark)
