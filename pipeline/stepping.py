"""One training step: from a batch of the cache to updated weights."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from pipeline.settings import Ramp, TrainSettings
from pmetal_distill.losses.chunked_head import HeadOptions, LossParts, head_loss
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.models import LoadedModel
from pmetal_distill.offline.batch import Batch
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.target import SoftTarget, TailBasis, TeacherTarget


class Stepper:
    """Holds what a step needs; `step` runs forward, backward and, when it is due, the update."""

    def __init__(
        self, settings: TrainSettings, cache: LogitCache, student: LoadedModel, optimizer: optim.Optimizer
    ) -> None:
        self.settings, self.student, self.optimizer = settings, student, optimizer
        self._spec = cache.spec
        self._kind = settings.tail or cache.spec.tail
        self._bases = [TailBasis.from_sketch(basis) for basis in cache.bases]
        parameter = {} if settings.loss_parameter is None else {"parameter": settings.loss_parameter}
        self._divergence = Divergence(settings.loss, **parameter)
        self._options = HeadOptions(chunk_tokens=settings.head_chunk)
        self._loss_and_grad = nn.value_and_grad(student.model, self._loss)
        self._sum: Any = None
        self._steps = 0
        student.model.train()

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.learning_rate)

    def step(self, batch: Batch) -> dict[str, float]:
        """Trains on one batch; returns loss, soft and hard as numbers."""
        parts, gradients = self._loss_and_grad(batch)
        every = self.settings.grad_accumulation_steps
        if every > 1:
            gradients = tree_map(lambda g: g / every, gradients)
            gradients = gradients if self._sum is None else tree_map(mx.add, self._sum, gradients)
            self._sum = gradients
        self._steps += 1
        if self._steps % every == 0:
            if self.settings.grad_clip is not None:
                gradients, _ = optim.clip_grad_norm(gradients, self.settings.grad_clip)
            self.optimizer.update(self.student.model, gradients)
            self._sum = None
        mx.eval(parts, self.student.model.parameters(), self.optimizer.state, self._sum)
        return {"loss": parts.total.item(), "soft": parts.soft.item(), "hard": parts.hard.item()}

    def _loss(self, batch: Batch) -> LossParts:
        states = self.student.hidden(mx.array(batch.token_ids), documents=batch.documents).final
        rows = np.flatnonzero(batch.loss_mask)
        index = mx.array(rows.astype(np.int32))
        return head_loss(
            states.reshape(-1, states.shape[-1])[index],
            HeadParts.of(self.student.head),
            self._target(batch, rows),
            mx.array(batch.labels.reshape(-1)[rows]),
            mx.ones(len(rows)),
            divergence=self._divergence,
            alpha=_value(self.settings.alpha, self._steps),
            options=self._options,
        )

    def _target(self, batch: Batch, rows: np.ndarray[Any, Any]) -> SoftTarget:
        flat = batch.targets.reshape(batch.token_ids.size)[rows]
        per_token = np.repeat(batch.basis_index, batch.token_ids.shape[1])[rows]
        target = TeacherTarget.from_arrays(flat, self._spec, bases=self._bases, basis_index=per_token)
        if self._kind == "none" and target.kind != "none":
            target = TeacherTarget.none(
                mx.array(flat.head_ids), mx.array(flat.head_logprobs), vocab_size=self._spec.vocab_size
            )
        return target.at(_value(self.settings.temperature, self._steps))


def _value(setting: float | Ramp, step: int) -> float:
    if isinstance(setting, Ramp):
        share = min(step / setting.steps, 1.0)
        return setting.start + (setting.end - setting.start) * share
    return setting
