"""The kernels' texts: bodies, which every back end compiles, and preludes. Cost: a few file reads, once."""

import hashlib
import re
from functools import cache
from importlib import resources

_INCLUDE = re.compile(r'^#include "(\w+\.metal)"\n', re.MULTILINE)


@cache
def text(name: str) -> str:
    """A file of `src/`, with the fragments that it includes in their places."""
    raw = (resources.files(__package__) / "src" / name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: text(match.group(1)), raw)


@cache
def header(prelude: str) -> str:
    """What stands before a body: the back end's prelude and the helpers that all share."""
    return (text(prelude) if prelude else "") + text("common.h")


@cache
def digest(name: str, prelude: str) -> str:
    """Ten hexadecimal digits that change with the kernel's text.

    They go into the kernel's name: MLX's CUDA back end keeps compiled kernels by name alone, on disk and
    across versions of this package.
    """
    whole = header(prelude) + text(f"{name}.metal")
    return hashlib.sha256(whole.encode()).hexdigest()[:10]
