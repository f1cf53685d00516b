"""A run's student beside its teacher on a page of text. Costs a forward pass on a few sequences."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.reporting.cache_data import (
    SHOWN_CHOICES,
    SHOWN_TOKENS,
    head_choices,
    predicts_next,
    shown_sequences,
)
from pipeline.reporting.pieces import TokenNames, text_pieces
from pipeline.reporting.text_page import Choice, Token, chance

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.batch import StoredSequence
    from pmetal_distill.offline.reader import LogitCache

_CHUNK = 64


def compare_texts(
    cache: "LogitCache", student: "LoadedModel", tokenizer: Any, numbers: npt.NDArray[np.int64]
) -> list[tuple[str, list[Token]]]:
    """KL(teacher || student) at T=1 of every token of a few sequences, with both first choices.

    Args:
        cache: the run's.
        student: the run's.
        tokenizer: of both.
        numbers: sequences to choose from.
    """
    rows = shown_sequences(cache, numbers)
    return [(f"sequence {row.number}", _tokens(row, cache, student, tokenizer)) for row in rows]


def _tokens(
    row: "StoredSequence", cache: "LogitCache", student: "LoadedModel", tokenizer: Any
) -> list[Token]:
    ids = [int(i) for i in row.token_ids[:SHOWN_TOKENS]]
    positions = [p for p in range(len(ids) - 1) if predicts_next(row, p)]
    seen = dict(zip(positions, _student_views(row, positions, cache, student), strict=True))
    pieces, names = text_pieces(tokenizer, ids), TokenNames(tokenizer, ids[0])
    tokens = [Token(pieces[0])]
    for position in range(len(ids) - 1):
        if position not in seen:
            tokens.append(Token(pieces[position + 1]))
            continue
        divergence, best, probabilities, of_next = seen[position]
        came = ids[position + 1]
        teacher, _ = head_choices(row, position, cache, names)
        mine = [
            Choice(names(int(i)), float(p), int(i) == came) for i, p in zip(best, probabilities, strict=True)
        ]
        lists = [("the teacher expected", teacher), ("the student expected", mine)]
        remark = f"the student gave it {chance(of_next)}"
        tokens.append(Token(pieces[position + 1], divergence, lists, remark))
    return tokens


View = tuple[float, npt.NDArray[np.int64], npt.NDArray[np.float64], float]


def _student_views(
    row: "StoredSequence", positions: list[int], cache: "LogitCache", student: "LoadedModel"
) -> list[View]:
    """At every position: divergence, the student's likeliest tokens, their chances, that of the next one."""
    import mlx.core as mx

    from pmetal_distill.losses.functional import forward_kl

    target = _Targets.of(cache, min(student.vocab_size, cache.spec.vocab_size))
    token_ids, documents = mx.array(row.token_ids[None]), row.documents[None]
    states = (
        student.hidden(token_ids, documents=documents).final[0]
        if student.splits
        else student.full(token_ids, documents)[0]
    )
    views: list[View] = []
    for start in range(0, len(positions), _CHUNK):
        chosen = positions[start : start + _CHUNK]
        part = states[mx.array(chosen)]
        logits = (student.logits(part) if student.splits else part)[:, : target.vocab_size]
        logits = logits.astype(mx.float32)
        divergences = np.asarray(forward_kl(logits, target.at(row, chosen), temperature=1.0), np.float64)
        came = row.token_ids[np.array(chosen) + 1]
        for divergence, scores, token in zip(divergences, np.asarray(logits, np.float64), came, strict=True):
            views.append((float(divergence), *_best(scores, int(token))))
    return views


def _best(
    scores: npt.NDArray[np.float64], token: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], float]:
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")[:SHOWN_CHOICES]
    return best, probabilities[best], float(probabilities[token])


@dataclass(frozen=True, slots=True, eq=False)
class _Targets:
    """The cache's targets on the device, cut to the vocabulary that both have."""

    cache: "LogitCache"
    vocab_size: int
    bases: tuple[Any, ...]

    @staticmethod
    def of(cache: "LogitCache", vocab_size: int) -> "_Targets":
        from pmetal_distill.tail_basis import TailBasis

        bases = [TailBasis.from_sketch(basis) for basis in cache.bases]
        return _Targets(cache, vocab_size, tuple(basis.restricted(vocab_size) for basis in bases))

    def at(self, row: "StoredSequence", positions: list[int]) -> Any:
        """The `TeacherTarget` of some positions."""
        from pmetal_distill.target import TeacherTarget

        index = np.full(len(positions), row.basis_index, np.int32) if len(self.bases) > 1 else None
        return TeacherTarget.from_arrays(
            row.targets[np.array(positions)],
            self.cache.spec,
            bases=self.bases,
            basis_index=index,
            vocab_size=self.vocab_size,
        )
