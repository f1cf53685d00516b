"""A tiny teacher, what it truly says about a few documents, and our own cache of them to compare with.

Writers of the foreign formats start from the true logits, so that a row beside the wrong token shows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pmetal_distill.models import load_model
from pmetal_distill.offline.reader import LogitCache
from tests.tiny import SENTENCES, build_tiny_model

TEXTS = tuple(sentence * (1 + n % 2) for n, sentence in enumerate(SENTENCES))


@dataclass(frozen=True, eq=False)
class Truth:
    """One document: int token ids [n] and the teacher's logits, float64 [n, V]."""

    ids: list[int]
    logits: np.ndarray

    @property
    def logprobs(self) -> np.ndarray:
        shifted = self.logits - self.logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def top(self, row: int, k: int) -> list[tuple[int, float]]:
        """The k most likely tokens after token `row`, ties by lower id."""
        logprobs = self.logprobs[row]
        order = np.argsort(-logprobs, kind="stable")[:k]
        return [(int(i), float(logprobs[i])) for i in order]


def truths_of(teacher: Path, texts: Sequence[str]) -> list[Truth]:
    model = load_model(teacher)
    found = []
    for text in texts:
        ids = [*model.tokenizer.encode(text), model.tokenizer.eos_token_id]
        found.append(Truth(ids, np.array(model.full(mx.array([ids]))[0].astype(mx.float32), np.float64)))
    return found


def own_cache(teacher: Path, texts: Sequence[str], folder: Path, **changes: Any) -> Path:
    """Our own cache, a document a sequence."""
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    values: dict[str, Any] = {"tail": "bucket", "max_seq_len": 256, "pack": False, "batch_size": 2} | changes
    settings = CacheSettings(teacher=str(teacher), data=str(data), out=folder / "own", **values)
    run_cache(settings, Console(quiet=True))
    return folder / "own"


@pytest.fixture(scope="session")
def truths(tiny_teacher: Path) -> list[Truth]:
    return truths_of(tiny_teacher, TEXTS)


@pytest.fixture(scope="session")
def own(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our cache of `TEXTS`, tail bucket, k = 16; do not change it."""
    return own_cache(tiny_teacher, TEXTS, tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with more tokens than the 1,024 that DWQ keeps."""
    folder = tmp_path_factory.mktemp("wide") / "teacher"
    return build_tiny_model(folder, vocab_size=1100, tokenizer_size=320, seed=3)


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def assert_same_targets(imported: Path, own: Path, *, k: int, relative: bool = False) -> None:
    """Same text, masks and head ids; log-probabilities within the grids (2 x 1/256 nat, and the top's).

    Args:
        relative: compare with the first entry, where the imported total is not that of the vocabulary.
    """
    ours, theirs = LogitCache(own), LogitCache(imported)
    assert theirs.num_sequences == ours.num_sequences
    by_text = {}
    for number in range(ours.num_sequences):
        row = ours.sequence(number)
        by_text[tuple(row.token_ids.tolist())] = row
    assert len(by_text) == ours.num_sequences
    for number in range(theirs.num_sequences):
        got = theirs.sequence(number)
        want = by_text.pop(tuple(got.token_ids.tolist()))
        np.testing.assert_array_equal(got.loss_mask, want.loss_mask)
        np.testing.assert_array_equal(got.documents, want.documents)
        on = got.loss_mask
        assert on.sum() == len(on) - 1
        a, b = got.targets[on], want.targets[on]
        np.testing.assert_array_equal(a.head_ids[:, :k], b.head_ids[:, :k])
        first = (a.head_logprobs[:, :1], b.head_logprobs[:, :1]) if relative else (0, 0)
        difference = (a.head_logprobs[:, :k] - first[0]) - (b.head_logprobs[:, :k] - first[1])
        assert np.abs(difference).max() < 0.012
    assert not by_text
