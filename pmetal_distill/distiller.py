"""Trains a student on a teacher's distributions, batch by batch. Costs forward and backward of the student.

    config = DistillConfig(temperature=2.0, alpha=0.5)
    distiller = Distiller(teacher, student, config)      # teacher: a live model, or a LogitCache
    for batch in dataloader:
        loss = distiller.step(batch)

The student's weights are kept and updated in the types that `precision` chooses: float32 masters beside half
precision. On the CPU steps run eagerly, with the head's loss on the host. On Apple's GPUs they go through
`mx.compile`, which compiles again for every new shape of a batch, and so does the optimizer's update. On CUDA
they do where the config says so: building some forty kernels takes minutes there, once for each machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from pmetal_distill.adapters import require_trainable
from pmetal_distill.checkpoint import TrainingState
from pmetal_distill.config import DistillConfig
from pmetal_distill.device import on_cuda, on_gpu
from pmetal_distill.host_inputs import to_device
from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses.chunked_head import HeadOptions, LossParts, head_loss, head_rows
from pmetal_distill.losses.hidden import HiddenAligner, layer_pairs
from pmetal_distill.losses.job import TokenRows
from pmetal_distill.losses.taid import TaidState
from pmetal_distill.modelling.documents import holds_one_document
from pmetal_distill.models import LoadedModel
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.parallel import World
from pmetal_distill.precision import prepare_weights
from pmetal_distill.schedule import TemperatureSchedule
from pmetal_distill.target import SoftTarget, TeacherTarget
from pmetal_distill.teaching import CachedTeacher, LiveTeacher, Teacher, TextBatch, TrainingBatch
from schemas.errors import CheckpointError, ModelError, UsageError

Arrays = dict[str, Any]
Gradients = Any


class Distiller:
    """Holds teacher, student and optimizer; `step` trains on one batch.

    Args:
        teacher: a live model or an open cache.
        student: is trained in place: its trainable parameters, and only those.
        config: what to do.
        optimizer: any of `mlx.optimizers`; AdamW with learning rate 1e-5 if None.
        world: the processes that train together, each on its part of every batch; this one alone if None.
            Their losses and weights are those of one process with the whole batch, but for rounding.

    Attributes:
        trained: the module that learns: `student`, and `aligner` with projections if there are any.
        updates: optimizer updates so far.
        precision: the types of the student's weights, which this brings about.
        compiles: whether steps go through `mx.compile`.

    Raises:
        UsageError: a divergence without meaning for the teacher's targets, layers that do not exist, or no
            such precision.
        ModelError: hidden states are wanted of a student that does not give them.
    """

    def __init__(
        self,
        teacher: LoadedModel | LogitCache,
        student: LoadedModel,
        config: DistillConfig | None = None,
        *,
        optimizer: optim.Optimizer | None = None,
        world: World | None = None,
    ) -> None:
        self.config = config or DistillConfig()
        self.student = student
        self.world = world or World()
        self.teacher = _teacher(teacher, student.vocab_size)
        self.config.divergence.check(self.teacher.kind)
        _check_temperature(self.config.temperature, self.teacher)
        self.optimizer = optimizer or optim.AdamW(learning_rate=1e-5)
        require_trainable(student)
        self.precision = prepare_weights(student.model, self.config.precision, student.stored)
        self.trained = nn.Module()
        self.trained.student = student.model
        aligner = _aligner(self.config, self.teacher, student)
        if aligner is not None:
            self.trained.aligner = aligner
        self._pairs = aligner.pairs if aligner is not None else ()
        self._options = HeadOptions(chunk_tokens=self.config.chunk_tokens)
        self.compiles = False
        self._functions: dict[Any, Callable[..., tuple[LossParts, Gradients]]] = {}
        self._update = _updating(self.optimizer, self.config)
        if self.config.compiled or (self.config.compiled is None and on_gpu() and not on_cuda()):
            self.compile_steps()
        self._pending: Gradients = None
        self._batches = 0
        self._sent: tuple[TrainingBatch, tuple[TeacherTarget, Arrays]] | None = None
        self._taid = None if self.config.taid is None else self.config.taid.initial()
        self.updates = 0

    def step(self, batch: TrainingBatch | Any, *, upcoming: TrainingBatch | None = None) -> LossParts:
        """Trains on one batch; updates the weights with every `accumulation_steps`-th one.

        Args:
            batch: of the cache, or for a live teacher also token ids [B, L].
            upcoming: the batch of the next call, if it is known: a GPU gets it while it works on this one.

        Returns:
            the loss before the update and its components, evaluated; of the whole batch of all processes.

        Raises:
            IncompatibleError: the batch does not fit the teacher.
            ModelError: an operation of the student has no derivative.
            PeerLostError: another process is gone.
        """
        self.trained.train()
        inputs, template = self._inputs(batch)
        parts, gradients = self._differentiated(inputs, template)
        if self.world.size > 1:
            parts = LossParts(*self.world.sum(mx.stack(list(parts))))
            gradients = self.world.sum_gradients(gradients)
        # Apart from the update, whose new arrays would otherwise be made while activations are still there.
        mx.async_eval(parts, gradients)
        self._collect(gradients)
        del gradients  # so that each goes when it has been applied
        new = (parts, self._pending, self.trained.parameters(), self.optimizer.state, mx.random.state)
        if upcoming is not None and (self.compiles or on_gpu()) and isinstance(self.teacher, CachedTeacher):
            mx.async_eval(new)
            self._sent = upcoming, self._send(upcoming)
        mx.eval(new)
        if self._taid is not None and self._pending is None:
            self._taid = self._next_share(parts)
        return parts

    def compile_steps(self) -> None:
        """Has `mx.compile` make the steps from now on; the next one waits for the kernels that it builds."""
        if not self.compiles:
            self.compiles, self._update = True, mx.compile(self._update)

    def rows(self, batch: TrainingBatch | Any, *, temperatures: Sequence[float] = (1.0,)) -> TokenRows:
        """Losses and agreement of each of the B L tokens of a batch, without training."""
        self.trained.eval()
        text = _as_batch(batch)
        target, _ = self.teacher.answer(text, ())
        states, head = self._computing().scored(to_device(text.token_ids), documents=text.documents)
        return head_rows(
            states.final,
            head,
            [target.at(t) for t in temperatures],
            to_device(text.labels),
            to_device(text.loss_mask),
            divergence=self.config.divergence,
            options=self._options,
        )

    @property
    def state(self) -> TrainingState:
        """All that `other.state = distiller.state` needs to go on as if training had never stopped.

        That is: the trained weights, the optimizer's state, gradients that are not yet applied, the counters,
        and MLX's global random state. The arrays are those in use, not copies.
        """
        parts = {
            "trained": self.trained.trainable_parameters(),
            "optimizer": self.optimizer.state,
            "pending": {} if self._pending is None else self._pending,
        }
        arrays = {f"{part}.{name}": a for part, tree in parts.items() for name, a in _named(tree).items()}
        taid = self._taid
        return TrainingState(
            arrays,
            {
                "updates": self.updates,
                "batches": self._batches,
                "taid": None if taid is None else [taid.t, taid.momentum, taid.previous_loss],
                "precision": self.precision.describe(),
                "random": _random_state(),
            },
        )

    @state.setter
    def state(self, state: TrainingState) -> None:
        """Takes over a state.

        Raises:
            CheckpointError: of a training of other parameters; nothing is changed then.
        """
        self._require_precision(state)
        weights, pending = self._like_trained(state, "trained"), None
        if state.part("pending"):
            pending = self._like_trained(state, "pending")
        self.trained.update(weights)
        self.optimizer.state = cast(dict[str, Any], tree_unflatten(list(state.part("optimizer").items())))
        self._pending = pending
        self.updates, self._batches = int(state.record["updates"]), int(state.record["batches"])
        self._taid = None if state.record["taid"] is None else TaidState(*state.record["taid"])
        high, low = state.record["random"]
        mx.random.seed(high << 32 | low)

    def _require_precision(self, state: TrainingState) -> None:
        """States of before there was a choice do not name one; the types of their arrays must fit."""
        saved = state.record.get("precision")
        if saved is not None and saved["name"] != self.precision.name:
            raise CheckpointError(
                f"precision: must be '{saved['name']}', as when this training began, found "
                f"'{self.precision.name}'; give that one, or begin a new run"
            )

    def _like_trained(self, state: TrainingState, part: str) -> Any:
        """A part of the state as the tree of the trained parameters."""
        found, tree = state.part(part), self.trained.trainable_parameters()
        mine = _named(tree)
        for name in sorted(mine.keys() | found.keys()):
            have, saved = (
                f"{a[name].dtype} {a[name].shape}" if name in a else "nothing" for a in (mine, found)
            )
            if have != saved:
                raise CheckpointError(
                    f"state: {part} '{name}' must be {have}, as in this training, found {saved}; "
                    "give the model and the settings it was saved with"
                )
        return tree_map_with_path(lambda name, _: found[name], tree)

    def _inputs(self, batch: TrainingBatch | Any) -> tuple[Arrays, SoftTarget]:
        sent, self._sent = self._sent, None
        text = _as_batch(batch)
        target, arrays = sent[1] if sent is not None and sent[0] is batch else self._send(text)
        soft = target.at(self.config.temperature_at(self.updates))
        inputs = {
            **arrays,
            "target": soft.arrays(),
            "alpha": mx.array(self.config.alpha_at(self.updates)),
            "share": None if self._taid is None else mx.array(self._taid.t),
        }
        if self.world.size > 1:
            inputs |= self._counts(text)
        return {name: value for name, value in inputs.items() if value is not None}, soft

    def _send(self, text: TrainingBatch) -> tuple[TeacherTarget, Arrays]:
        """What a batch holds, on the device: the teacher's answer, and arrays by name or None."""
        target, layers = self.teacher.answer(text, tuple(pair[0] for pair in self._pairs))
        return target, {
            "token_ids": to_device(text.token_ids),
            "documents": None if holds_one_document(text.documents) else to_device(text.documents),
            "labels": to_device(text.labels),
            "mask": to_device(text.loss_mask),
            "layers": {str(layer): states for layer, states in layers.items()},
        }

    def _counts(self, text: TrainingBatch) -> Arrays:
        """Tokens of the whole batch, [soft, hard], and which share of them is here."""
        mask = np.asarray(text.loss_mask, np.float32)
        labelled = mask * (np.asarray(text.labels) != IGNORE_INDEX)
        own = mx.array(np.stack([mask.sum(), labelled.sum()]))
        total = self.world.sum(own)
        return {"counts": total, "own_share": own[0] / mx.maximum(total[0], 1)}

    def _differentiated(self, inputs: Arrays, template: SoftTarget) -> tuple[LossParts, Gradients]:
        try:
            return self._function(inputs, template)(inputs)
        except (ValueError, RuntimeError) as error:
            if "vjp" not in str(error).lower():  # in whatever MLX says of a derivative that it lacks
                raise
            raise ModelError(
                f"{self.student.source}: all that a student computes must have a derivative, found in the "
                f"backward pass of mlx-lm's '{self.student.config.get('model_type')}': {error}; take a "
                "student of another architecture"
            ) from error

    def _function(
        self, inputs: Arrays, template: SoftTarget
    ) -> Callable[[Arrays], tuple[LossParts, Gradients]]:
        """Loss and gradients of inputs of this form; compiled where wanted, once a form."""
        run = nn.value_and_grad(self.trained, self._loss(template))
        apart = "documents" in inputs and not self.student.supports_packing
        if not self.compiles or apart:  # where documents are run one by one, their lengths must be known
            return cast(Callable[[Arrays], tuple[LossParts, Gradients]], run)
        form = (template.kind, tuple(sorted(inputs)), tuple(sorted(inputs["target"])), template.bases)
        if form not in self._functions:
            state = [self.trained.state, mx.random.state]
            self._functions[form] = mx.compile(run, inputs=state, outputs=state)
        return self._functions[form]

    def _loss(self, template: SoftTarget) -> Callable[[Arrays], LossParts]:
        def loss(inputs: Arrays) -> LossParts:
            wanted = [pair[1] for pair in self._pairs]
            states, head = self._computing().scored(
                inputs["token_ids"], documents=inputs.get("documents"), layers=wanted
            )
            parts = head_loss(
                states.final,
                head,
                template.with_arrays(inputs["target"]),
                inputs["labels"],
                inputs["mask"],
                divergence=self.config.divergence,
                alpha=inputs["alpha"],
                teacher_share=inputs.get("share"),
                counts=tuple(inputs["counts"]) if "counts" in inputs else None,
                options=self._options,
            )
            if not self._pairs:
                return parts
            layers = {int(name): states for name, states in inputs["layers"].items()}
            hidden = self.trained.aligner(states.layers, layers, inputs["mask"]) * inputs.get("own_share", 1)
            return parts.with_hidden(hidden, self.config.hidden_weight)

        return loss

    def _computing(self) -> LoadedModel:
        """The student as it is multiplied, see `Precision.computing`."""
        model = self.precision.computing(self.student.model)
        return self.student if model is self.student.model else replace(self.student, model=model)

    def _collect(self, gradients: Gradients) -> None:
        """Adds a batch's gradients; applies their mean when it is due."""
        every = self.config.accumulation_steps
        if self._pending is not None:
            gradients = tree_map(mx.add, self._pending, gradients)
        self._batches += 1
        if self._batches % every:
            # In the order of rows, as read from a file: the norm's rounding depends on the order in memory.
            self._pending = tree_map(mx.contiguous, gradients)
            return
        parameters = self.trained.trainable_parameters()
        self.optimizer.init(parameters)  # does nothing where its state is there
        new, self.optimizer.state = self._update(gradients, parameters, self.optimizer.state)
        self.trained.update(new)
        self._pending = None
        self.updates += 1

    def _next_share(self, parts: LossParts) -> TaidState:
        assert self.config.taid is not None
        assert self._taid is not None
        steps = self.config.taid_steps
        loss = cast(float, parts.soft.item())
        return self.config.taid.update(self._taid, loss, step=min(self.updates, steps), num_steps=steps)


def _teacher(teacher: LoadedModel | LogitCache, vocab_size: int) -> Teacher:
    if isinstance(teacher, LogitCache):
        return CachedTeacher(teacher, vocab_size)
    teacher.model.eval()
    return LiveTeacher(teacher, vocab_size)


def _updating(
    optimizer: optim.Optimizer, config: DistillConfig
) -> Callable[[Gradients, Any, Any], tuple[Any, Any]]:
    """(sum of gradients, parameters, the optimizer's state) -> (parameters, state)."""

    def update(gradients: Gradients, parameters: Any, state: Any) -> tuple[Any, Any]:
        if (every := config.accumulation_steps) > 1:
            gradients = tree_map(lambda g: g / every, gradients)
        if config.max_grad_norm is not None:
            gradients, _ = optim.clip_grad_norm(gradients, config.max_grad_norm)
        optimizer.state = state
        return optimizer.apply_gradients(gradients, parameters), optimizer.state

    return update


def _named(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by their dotted names."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def _random_state() -> list[int]:
    """MLX's key as two words; seeding with both of them restores it."""
    state: Any = mx.random.state
    return cast(list[int], state[0].tolist())


def _check_temperature(temperature: float | TemperatureSchedule, teacher: Teacher) -> None:
    """Refuses now what would fail in the middle of a run."""
    lowest = temperature.lowest if isinstance(temperature, TemperatureSchedule) else temperature
    if lowest < teacher.lowest_temperature:
        raise UsageError(
            f"temperature: must be at least {teacher.lowest_temperature:g} at every step, where the cached "
            f"targets end, found {lowest:g}; raise the temperature"
        )


def _as_batch(batch: TrainingBatch | Any) -> TrainingBatch:
    return cast(TrainingBatch, batch) if hasattr(batch, "token_ids") else TextBatch.of(batch)


def _aligner(config: DistillConfig, teacher: Teacher, student: LoadedModel) -> HiddenAligner | None:
    if config.hidden_loss is None:
        return None
    if teacher.hidden_size is None:
        raise UsageError("hidden_loss: the teacher gives no hidden states; cache them with --hidden-layers")
    if student.anatomy.blocks is None:
        raise ModelError(
            f"{student.source}: a student must give the outputs of its blocks for a hidden-state loss, found "
            "that they cannot be had; leave out hidden_loss, or take another student"
        )
    count = teacher.num_layers
    if count is None:
        if config.student_layers is None or min(config.hidden_layers) < 0:
            raise UsageError(
                "hidden_layers: the cache must say how many layers its teacher has, which decides the "
                "student's layer for each, found nothing of it; cache again with --hidden-layers, or train "
                "from Python with DistillConfig(student_layers=...) and hidden_layers counted from 0"
            )
        count = max(config.hidden_layers) + 1
    pairs = layer_pairs(
        config.hidden_layers,
        num_teacher_layers=count,
        num_student_layers=student.num_layers,
        student_layers=config.student_layers,
    )
    return HiddenAligner(
        config.hidden_loss, pairs, teacher_width=teacher.hidden_size, student_width=student.hidden_size
    )
