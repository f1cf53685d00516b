"""The checkpoints of a run: written, kept, found again. Costs a write of weights and optimizer each.

A checkpoint may fall between two batches of an accumulation: the gradients so far are in it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.console import Console
from schemas.errors import CheckpointError, CorruptionError, NonFiniteError, VersionError

if TYPE_CHECKING:
    from pmetal_distill.checkpoint import StateFile, TrainingState
    from pmetal_distill.precision import StudentPrecision

VERSION = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state that was found again.

    Attributes:
        iteration: batches trained before it.
        state: of the distiller, and what else was saved.
    """

    iteration: int
    state: "TrainingState"

    @property
    def precision(self) -> "StudentPrecision | None":
        """The precision that its run began with; None if it is of a version without a choice, in float32.

        Raises:
            CheckpointError: float16 weights, which no optimizer of ours goes on with.
        """
        import mlx.core as mx

        if (record := self.state.record.get("precision")) is not None:
            return cast("StudentPrecision", record["name"])
        types = {array.dtype for array in self.state.part("trained").values()}
        if mx.float16 in types:
            raise CheckpointError(
                f"checkpoint of iteration {self.iteration}: trained weights must be float32 or bfloat16, "
                "found float16, in which AdamW does not work; begin a new run"
            )
        return "bfloat16" if mx.bfloat16 in types else None


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """A folder of them.

    Attributes:
        folder: may be missing.
        keep: the latest ones that stay.
    """

    folder: Path
    keep: int

    def save(self, iteration: int, state: "TrainingState", *, best: int | None) -> "StateFile":
        """Writes a checkpoint; only then removes those that are no longer wanted.

        Args:
            iteration: batches trained so far.
            state: of the distiller, and what else a resumed run needs.
            best: the iteration whose checkpoint stays whatever comes.

        Raises:
            CheckpointError: the disk is full or fails; the others are as they were.
            NonFiniteError: weights that are no numbers, which nobody could go on from.
        """
        from pmetal_distill.checkpoint import list_states, remove_states, write_state

        _require_finite(iteration, state)
        record = {"version": VERSION, "iteration": iteration, **state.record}
        new = write_state(self.folder, iteration, type(state)(state.arrays, record))
        older = [file for file in list_states(self.folder) if file.number < iteration]
        kept = {new, *older[::-1][: self.keep - 1], *(file for file in older if file.number == best)}
        remove_states([file for file in list_states(self.folder) if file not in kept])
        return new

    def latest(self, console: Console) -> Checkpoint | None:
        """The newest checkpoint that is intact; None if there are none at all. Says which ones are damaged.

        Raises:
            CorruptionError: there are some, and all are damaged.
            VersionError: written by a newer version.
        """
        from pmetal_distill.checkpoint import list_states

        files = list_states(self.folder)
        for file in reversed(files):
            try:
                state = file.read()
            except CorruptionError as error:
                console.note(f"damaged checkpoint: {error}; trying the one before it")
                continue
            if state.record["version"] > VERSION:
                raise VersionError(
                    f"{file.path}: must be of version {VERSION} or before, found {state.record['version']}; "
                    "update pmetal-distill"
                )
            return Checkpoint(int(state.record["iteration"]), state)
        if files:
            raise CorruptionError(
                f"{self.folder}: one checkpoint must be intact, found {len(files)} damaged; remove the "
                "folder to begin again"
            )
        return None


def _require_finite(iteration: int, state: "TrainingState") -> None:
    import mlx.core as mx

    checks: dict[str, Any] = {name: mx.isfinite(array).all() for name, array in state.part("trained").items()}
    if bad := [name for name, check in checks.items() if not check.item()]:
        raise NonFiniteError(
            f"iteration {iteration}: the weights must be finite, found {len(bad)} tensors that are not, "
            f"{bad[0]} first; lower the learning rate; the checkpoint before is kept"
        )
