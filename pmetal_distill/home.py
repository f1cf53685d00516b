"""Where this package keeps what it can make or fetch again."""

import os
import sys
from pathlib import Path


def cache_home() -> Path:
    """$PMETAL_HOME, else a folder in the user's cache."""
    if home := os.environ.get("PMETAL_HOME"):
        return Path(home).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches/pmetal-distill").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pmetal-distill"
