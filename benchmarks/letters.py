"""Text of random letters for benchmarks that need only its length."""

import json
from pathlib import Path

import numpy as np


def write_letters(path: Path, *, documents: int, characters: int) -> None:
    """JSONL; a document has about two tokens in three characters."""
    rng = np.random.default_rng(0)
    alphabet = np.array(list("abcdefghijklmnopqrstuvwxyz     .,"))
    lines = (json.dumps({"text": "".join(rng.choice(alphabet, characters))}) for _ in range(documents))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
