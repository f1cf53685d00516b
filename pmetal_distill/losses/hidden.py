"""Losses between hidden states of teacher and student. One read of both, and one write for the gradient.

Where the widths differ the student's states first pass a learned linear map to the teacher's width. Layers
are numbered from 0, as the outputs of blocks.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum

import mlx.core as mx
import mlx.nn as nn

from pmetal_distill.kernels import hidden_sums
from schemas.errors import IncompatibleError, UsageError

_SMALLEST_SQUARE = 1e-12


class HiddenStateLoss(StrEnum):
    """How far two hidden states are from each other.

    - MSE: mean over features of (s - t)^2 (Romero et al. 2015, FitNets, arXiv:1412.6550).
    - COSINE: 1 - cos(s, t) (Sanh et al. 2019, DistilBERT, arXiv:1910.01108, section 3).
    """

    MSE = "mse"
    COSINE = "cosine"

    def per_token(self, student: mx.array, teacher: mx.array) -> mx.array:
        """The distance of each token, float32.

        Args:
            student: [..., d], any float type; reduced in float32.
            teacher: [..., d]; gets no gradient.

        Returns:
            [...]; a state of zeros has cosine 0 to everything.

        Raises:
            IncompatibleError: the shapes differ.
        """
        if student.shape != teacher.shape:
            raise IncompatibleError(
                f"hidden states must have equal shapes, found student {student.shape} and teacher "
                f"{teacher.shape}; project the student's to the teacher's width"
            )
        width = student.shape[-1]
        sums = hidden_sums(student.reshape(-1, width), mx.stop_gradient(teacher.reshape(-1, width)))
        if self is HiddenStateLoss.MSE:
            return (sums.square / width).reshape(student.shape[:-1])
        squares = mx.maximum(sums.student, _SMALLEST_SQUARE), mx.maximum(sums.teacher, _SMALLEST_SQUARE)
        cosine = sums.dot * mx.rsqrt(squares[0]) * mx.rsqrt(squares[1])
        return (1.0 - cosine).reshape(student.shape[:-1])

    def mean(self, student: mx.array, teacher: mx.array, mask: mx.array) -> mx.array:
        """The mean over tokens, weighted by `mask` [...]; 0 where it is 0 everywhere. Scalar float32."""
        weight = mask.astype(mx.float32)
        counted = mx.where(weight > 0, self.per_token(student, teacher), 0.0)
        return (weight * counted).sum() / mx.maximum(weight.sum(), 1e-9)


class HiddenAligner(nn.Module):
    """Compares pairs of layers; holds the projections, which learn with the student.

    Args:
        kind: the distance.
        pairs: (teacher layer, student layer).
        teacher_width, student_width: features of a hidden state.

    Attributes:
        projections: one linear map without bias a pair where the widths differ, else none.

    Raises:
        UsageError: no pair.
    """

    def __init__(
        self,
        kind: HiddenStateLoss,
        pairs: Sequence[tuple[int, int]],
        *,
        teacher_width: int,
        student_width: int,
    ) -> None:
        super().__init__()
        if not pairs:
            raise UsageError(
                "hidden_layers must name at least one layer, found none; or leave out hidden_loss"
            )
        self.kind, self.pairs = kind, tuple(pairs)
        self.projections: list[nn.Linear] = []
        if teacher_width != student_width:
            self.projections = [nn.Linear(student_width, teacher_width, bias=False) for _ in pairs]

    def __call__(
        self, student: Mapping[int, mx.array], teacher: Mapping[int, mx.array], mask: mx.array
    ) -> mx.array:
        """Mean over pairs of the mean over tokens. Scalar.

        Args:
            student, teacher: hidden states [..., d] by layer.
            mask: [...], how much each token counts.

        Raises:
            IncompatibleError: a layer of the pairs is missing.
        """
        total = mx.zeros(())
        for number, (from_layer, to_layer) in enumerate(self.pairs):
            if from_layer not in teacher or to_layer not in student:
                raise IncompatibleError(
                    f"hidden states of teacher layer {from_layer} and student layer {to_layer} are needed, "
                    f"found {sorted(teacher)} and {sorted(student)}; cache with --hidden-layers {from_layer}"
                )
            states = student[to_layer]
            states = self.projections[number](states) if self.projections else states
            total = total + self.kind.mean(states, teacher[from_layer], mask)
        return total / len(self.pairs)


def layer_pairs(
    teacher_layers: Sequence[int],
    *,
    num_teacher_layers: int,
    num_student_layers: int,
    student_layers: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """Which student layer is compared with each teacher layer.

    Args:
        teacher_layers: from 0; negative counts from the end.
        num_teacher_layers, num_student_layers: blocks of each model.
        student_layers: one for each teacher layer; those at the same relative depth if None.

    Raises:
        UsageError: a layer that does not exist, or lists of different lengths.
    """
    if student_layers is None:
        teacher = [_layer(i, num_teacher_layers, "teacher") for i in teacher_layers]
        depth = [(i + 1) / num_teacher_layers for i in teacher]
        return [(i, max(0, round(d * num_student_layers) - 1)) for i, d in zip(teacher, depth, strict=True)]
    if len(student_layers) != len(teacher_layers):
        raise UsageError(
            f"student_layers must name a layer for each of the {len(teacher_layers)} hidden_layers, found "
            f"{len(student_layers)}"
        )
    return [
        (_layer(i, num_teacher_layers, "teacher"), _layer(j, num_student_layers, "student"))
        for i, j in zip(teacher_layers, student_layers, strict=True)
    ]


def _layer(index: int, count: int, whose: str) -> int:
    if not -count <= index < count:
        raise UsageError(f"hidden_layers: the {whose} has layers {-count} to {count - 1}, found {index}")
    return index % count
