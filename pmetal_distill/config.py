"""What to distil and how: one frozen object whose defaults stand here and nowhere else. Checks itself, free.

The public names and defaults follow the crate this library descends from: temperature 2, alpha 0.5, no
hidden-state loss, hidden weight 0.1.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.hidden import HiddenStateLoss
from pmetal_distill.losses.named import NamedLoss
from pmetal_distill.losses.taid import TaidSchedule
from pmetal_distill.precision import PRECISIONS, StudentPrecision
from pmetal_distill.schedule import AlphaSchedule, TemperatureSchedule
from pmetal_distill.yaml_files import read_yaml, write_yaml
from schemas.errors import UsageError


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Settings of a distillation.

    The loss of a batch is `alpha T^2 divergence + (1 - alpha) cross-entropy + hidden_weight hidden_loss`.

    Attributes:
        temperature: T of teacher and student, a number or a schedule over updates.
        alpha: weight of the divergence, a number or a schedule over updates.
        loss: name of the divergence, see `Divergence`, or a loss such as `JensenShannonLoss(beta=0.3)`, which
            is kept as its name and parameter.
        loss_parameter: beta of jensen_shannon, skew of the skewed losses; the usual value if None.
        hidden_loss: between hidden states, or None.
        hidden_layers: teacher layers that are aligned, from 0; negative counts from the end.
        student_layers: the student's layer for each; those at the same relative depth if None.
        hidden_weight: weight of the hidden-state loss.
        taid: moves the teacher from the student to itself over `taid_steps`; None for the teacher alone.
        taid_steps: updates until the teacher stands alone.
        accumulation_steps: batches in an update.
        max_grad_norm: gradients are scaled down to this norm; None for no limit.
        chunk_tokens: tokens whose logits exist at once; by vocabulary and device if None.
        precision: mixed, bfloat16 or float32, see `precision`; None for mixed where the student's weights are
            stored in half precision, else float32.
        compiled: whether steps go through `mx.compile`; on Apple's GPUs only if None (see `distiller`).

    Raises:
        UsageError: a value without meaning; says which and what must hold.
    """

    temperature: float | TemperatureSchedule = 2.0
    alpha: float | AlphaSchedule = 0.5
    loss: str | NamedLoss = "forward_kl"
    loss_parameter: float | None = None
    hidden_loss: HiddenStateLoss | None = None
    hidden_layers: Sequence[int] = ()
    student_layers: Sequence[int] | None = None
    hidden_weight: float = 0.1
    taid: TaidSchedule | None = None
    taid_steps: int = 0
    accumulation_steps: int = 1
    max_grad_norm: float | None = None
    chunk_tokens: int | None = None
    precision: StudentPrecision | None = None
    compiled: bool | None = field(default=None)

    def __post_init__(self) -> None:
        for name in ("hidden_layers", "student_layers"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if isinstance(self.hidden_loss, str):
            object.__setattr__(self, "hidden_loss", _hidden_loss(self.hidden_loss))
        if isinstance(self.loss, NamedLoss):
            self._unpack_loss(self.loss.divergence)
        self._check_loss()
        self._check_hidden()
        self._check_steps()

    @property
    def divergence(self) -> Divergence:
        """The soft loss."""
        return Divergence(str(self.loss), self.loss_parameter)

    def temperature_at(self, update: int) -> float:
        """T at an update, from 0."""
        return _value(self.temperature, update)

    def alpha_at(self, update: int) -> float:
        """alpha at an update, from 0."""
        return _value(self.alpha, update)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON, defaults included; `from_dict` reads them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "DistillConfig":
        """The config of plain values; keys that are missing take their defaults.

        Raises:
            UsageError: an unknown key (with a suggestion), a value of the wrong type or out of range.
        """
        known = [f.name for f in fields(DistillConfig)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
                raise UsageError(f"DistillConfig: unknown key '{key}'; {hint}")
        return DistillConfig(**{key: _read(key, value) for key, value in values.items()})

    def to_yaml(self, path: Path) -> None:
        """Writes every setting; the file appears whole or not at all."""
        write_yaml(self.to_dict(), path)

    @staticmethod
    def from_yaml(path: Path) -> "DistillConfig":
        """The config in a YAML file.

        Raises:
            UsageError: as `from_dict`, and for files that are not YAML or give a key twice.
        """
        return DistillConfig.from_dict(read_yaml(path)[0])

    def _unpack_loss(self, divergence: Divergence) -> None:
        if self.loss_parameter not in (None, divergence.parameter):
            _fail("loss_parameter", f"left out beside {self.loss!r}", self.loss_parameter)
        object.__setattr__(self, "loss", divergence.name)
        object.__setattr__(self, "loss_parameter", divergence.parameter)

    def _check_loss(self) -> None:
        _number("temperature", self.temperature, TemperatureSchedule, "positive", lambda v: v > 0)
        _number("alpha", self.alpha, AlphaSchedule, "from 0 to 1", lambda v: 0 <= v <= 1)
        if not isinstance(self.loss, str):
            _fail("loss", "a name, or a loss such as KLDivergenceLoss()", self.loss)
        _ = self.divergence
        if self.taid is not None and not (self.taid_steps >= 1 and self.loss == "forward_kl"):
            _fail("taid", "used with forward_kl and taid_steps >= 1", f"{self.loss}, {self.taid_steps}")

    def _check_hidden(self) -> None:
        _number("hidden_weight", self.hidden_weight, None, "at least 0", lambda v: v >= 0)
        if self.hidden_loss is not None and not self.hidden_layers:
            _fail("hidden_layers", "given with hidden_loss, as in hidden_layers=[6, 12]", self.hidden_layers)
        if self.hidden_loss is None and self.hidden_layers:
            _fail("hidden_loss", "given with hidden_layers, MSE or COSINE", None)
        if self.student_layers is not None and len(self.student_layers) != len(self.hidden_layers):
            _fail("student_layers", f"{len(self.hidden_layers)} long, as hidden_layers", self.student_layers)

    def _check_steps(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            _fail("precision", ", ".join(PRECISIONS), self.precision)
        for name in ("accumulation_steps", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                _fail(name, "a whole number of at least 1", value)
        if self.max_grad_norm is not None:
            _number("max_grad_norm", self.max_grad_norm, None, "positive", lambda v: v > 0)


def _value(setting: float | TemperatureSchedule | AlphaSchedule, update: int) -> float:
    return float(setting) if isinstance(setting, int | float) else setting(update)


def _number(
    name: str, value: object, schedule: type | None, must: str, holds: Callable[[float], bool]
) -> None:
    if schedule is not None and isinstance(value, schedule):
        return
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not holds(value):  # type: ignore[arg-type]
        _fail(name, f"{must}{'' if schedule is None else ', or a ' + schedule.__name__}", value)


def _fail(name: str, must: str, found: object) -> None:
    raise UsageError(f"DistillConfig: {name} must be {must}; found {found!r}")


def _hidden_loss(name: str) -> HiddenStateLoss:
    if name not in list(HiddenStateLoss):
        _fail("hidden_loss", "mse or cosine", name)
    return HiddenStateLoss(name)


def _plain(value: Any) -> Any:
    if isinstance(value, TemperatureSchedule | AlphaSchedule):
        return value.to_dict()
    if isinstance(value, TaidSchedule):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, HiddenStateLoss):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def _read(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        if key == "temperature":
            return TemperatureSchedule.from_dict(value)
        if key == "alpha":
            return AlphaSchedule.from_dict(value)
        if key == "taid":
            return _taid(value)
    if key in ("hidden_layers", "student_layers") and value is not None:
        whole = isinstance(value, list | tuple) and all(type(item) is int for item in value)
        if not whole:
            _fail(key, "a list of whole numbers", value)
    return value


def _taid(values: Mapping[str, Any]) -> TaidSchedule:
    known = {f.name for f in fields(TaidSchedule)}
    if unknown := sorted(set(values) - known):
        _fail("taid", f"of the keys {sorted(known)}", unknown)
    for key, value in values.items():
        _number(f"taid.{key}", value, None, "a number", lambda _: True)
    return TaidSchedule(**values)
