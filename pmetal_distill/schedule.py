"""Temperature and alpha as functions of the step number, which is their whole state. Costs nothing.

A schedule has up to four phases: `warmup` steps from `warmup_start` to `start` in a straight line, `hold`
    steps at `start`, `steps` steps of change from `start` to `end`, then `end` for ever.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

from schemas.errors import UsageError

Kind = Literal["constant", "linear", "cosine", "exponential", "step"]
KINDS: tuple[Kind, ...] = ("constant", "linear", "cosine", "exponential", "step")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A number that changes with the step. Use `TemperatureSchedule` or `AlphaSchedule`.

    Attributes:
        kind: shape of the change: linear; cosine (half a wave); exponential (constant ratio); step (`stages`
            equal jumps).
        start, end: values before and after the change.
        steps: length of the change.
        warmup: steps of the ramp before.
        hold: steps at `start` between ramp and change.
        warmup_start: where the ramp begins; `start` if None.
        stages: jumps of a step schedule.

    Raises:
        UsageError: a value out of range.
    """

    kind: Kind
    start: float
    end: float
    steps: int = 0
    warmup: int = 0
    hold: int = 0
    warmup_start: float | None = None
    stages: int = 1

    name: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            self._fail("kind", f"one of {', '.join(KINDS)}", self.kind)
        for field in ("steps", "warmup", "hold"):
            whole: Any = getattr(self, field)
            if not isinstance(whole, int) or whole < 0:
                self._fail(field, "a whole number of at least 0", whole)
        if self.kind != "constant" and self.steps < 1:
            self._fail("steps", "at least 1", self.steps)
        if not 1 <= self.stages <= max(1, self.steps):
            self._fail("stages", f"from 1 to steps={self.steps}", self.stages)
        for field in ("start", "end", "warmup_start"):
            value = getattr(self, field)
            if value is not None and (not math.isfinite(value) or not self.allows(value)):
                self._fail(field, self.allowed(), value)
        if self.kind == "exponential" and not (self.start > 0 and self.end > 0):
            self._fail("start and end", "positive in an exponential schedule", (self.start, self.end))

    @classmethod
    def constant(cls, value: float, *, warmup: int = 0, warmup_start: float | None = None) -> Self:
        """`value` at every step, after an optional ramp."""
        return cls("constant", value, value, warmup=warmup, warmup_start=warmup_start)

    @classmethod
    def linear(cls, *, start: float, end: float, steps: int, **phases: Any) -> Self:
        """A straight line. `phases`: warmup, hold, warmup_start."""
        return cls("linear", start, end, steps, **phases)

    @classmethod
    def cosine(cls, *, start: float, end: float, steps: int, **phases: Any) -> Self:
        """Half a cosine wave: flat, steep, flat. `phases` as for `linear`."""
        return cls("cosine", start, end, steps, **phases)

    @classmethod
    def exponential(cls, *, start: float, end: float, steps: int, **phases: Any) -> Self:
        """The same ratio every step; both ends positive. `phases` as for `linear`."""
        return cls("exponential", start, end, steps, **phases)

    @classmethod
    def step(cls, *, start: float, end: float, steps: int, stages: int, **phases: Any) -> Self:
        """`stages` equal jumps, the last of them at step `steps`. `phases` as for `linear`."""
        return cls("step", start, end, steps, stages=stages, **phases)

    def __call__(self, step: int) -> float:
        """The value at a step, from 0.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"{self.name}: step must be at least 0, found {step}")
        if step < self.warmup:
            first = self.start if self.warmup_start is None else self.warmup_start
            return first + (self.start - first) * step / self.warmup
        done = step - self.warmup - self.hold
        if done <= 0 or self.kind == "constant":
            return float(self.start)
        return float(self.end) if done >= self.steps else self._between(done / self.steps)

    def _between(self, share: float) -> float:
        if self.kind == "exponential":
            return self.start * math.pow(self.end / self.start, share)
        if self.kind == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        elif self.kind == "step":
            share = math.floor(share * self.stages + 1e-9) / self.stages
        return self.start + (self.end - self.start) * share

    @property
    def lowest(self) -> float:
        """The smallest value at any step."""
        return min(value for value in (self.start, self.end, self.warmup_start) if value is not None)

    @classmethod
    def allows(cls, value: float) -> bool:
        """Whether a finite `value` has a meaning."""
        return True

    @classmethod
    def allowed(cls) -> str:
        """In words, what `allows`."""
        return "finite"

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, for YAML."""
        defaults = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The schedule that `to_dict` wrote.

        Raises:
            UsageError: an unknown or missing key, a value of the wrong type or out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"{cls.name}: keys must be among {sorted(known)}, found {unknown}")
        if missing := sorted({"kind", "start", "end"} - set(values)):
            raise UsageError(f"{cls.name}: must have the keys kind, start and end, missing {missing}")
        for key in ("start", "end", "warmup_start"):
            if not isinstance(values.get(key), int | float | None) or isinstance(values.get(key), bool):
                raise UsageError(f"{cls.name}: {key} must be a number, found {values[key]!r}")
        return cls(**values)

    def _fail(self, field: str, must: str, found: object) -> None:
        raise UsageError(f"{self.name}: {field} must be {must}, found {found!r}")


@dataclass(frozen=True, slots=True)
class TemperatureSchedule(Schedule):
    """A softmax temperature, > 0 at every step.

    Example:
        `TemperatureSchedule.linear(start=4.0, end=1.0, steps=1000)`
    """

    name: ClassVar[str] = "temperature schedule"

    @classmethod
    def allows(cls, value: float) -> bool:
        """Positive numbers."""
        return value > 0

    @classmethod
    def allowed(cls) -> str:
        """See `Schedule.allowed`."""
        return "positive"


@dataclass(frozen=True, slots=True)
class AlphaSchedule(Schedule):
    """The weight of the divergence, from 0 to 1 at every step."""

    name: ClassVar[str] = "alpha schedule"

    @classmethod
    def allows(cls, value: float) -> bool:
        """Numbers from 0 to 1."""
        return 0 <= value <= 1

    @classmethod
    def allowed(cls) -> str:
        """See `Schedule.allowed`."""
        return "from 0 to 1"
