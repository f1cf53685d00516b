"""What a cache would cost, and how close it would be, before it is made.

Costs the calibration that `cache` would make (with the same sample, so that its errors are the ones that the
cache then records) for each setting of the grid, and one small cache of sampled sequences for each, written
by the cache's own writer. Minutes on a CPU; the head's products are most of it.
"""

import dataclasses
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.cache import (
    check_rank,
    describe,
    describe_cache,
    hidden_spec,
    largest_rank,
    read_data,
    target_spec,
)
from pipeline.calibration import CODEBOOK_TOKENS, HELD_BACK_TOKENS, Calibrator, Coding
from pipeline.console import Console, table
from pipeline.data import PackedDataset
from pipeline.settings import CacheSettings
from pipeline.stage_one import queue_batch
from pipeline.teacher import TeacherRunner, TeacherStates
from schemas.errors import UsageError
from schemas.manifest import Dataset
from schemas.spec import Tail

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.calibrate import Fitting
    from pmetal_distill.offline.fidelity import TargetError

WRITTEN_TOKENS = 8192
TEMPERATURES = (1.0, 2.0, 4.0)
RANKS = (128, 256, 384)


@dataclass(frozen=True, slots=True)
class Grid:
    """The settings that are tried.

    Attributes:
        tails: kinds of tail.
        top_k: head sizes.
        ranks, steps: of the sketch, each with each.
    """

    tails: tuple[Tail, ...] = ("sketch", "bucket")
    top_k: tuple[int, ...] = (16,)
    ranks: tuple[int, ...] = RANKS
    steps: tuple[float, ...] = (45.0, 60.0, 80.0)

    def allowed_by(self, teacher: "LoadedModel") -> "Grid":
        """The same, but with ranks that were not asked for cut to what the teacher allows."""
        if self.ranks != RANKS:
            return self
        largest = largest_rank(teacher)
        return replace(self, ranks=tuple(dict.fromkeys(min(rank, largest) for rank in self.ranks)))

    def settings(self, base: CacheSettings) -> Iterator[CacheSettings]:
        """`base` with each of them.

        Raises:
            UsageError: nothing to try, or a value that `cache` would refuse.
        """
        for name, values in dataclasses.asdict(self).items():
            if not values:
                raise UsageError(f"plan: {name} must have at least one value, found none; give some")
        for tail in self.tails:
            for k in self.top_k:
                sketches = [(r, s) for r in self.ranks for s in self.steps] if tail == "sketch" else [None]
                for sketch in sketches:
                    changes: dict[str, Any] = {}
                    if sketch is not None:
                        changes = {"sketch_rank": sketch[0], "sketch_step": sketch[1]}
                    yield replace(base, tail=tail, top_k=k, **changes)


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted: an error of at most `error` at `temperature`."""

    error: float
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not self.error > 0 or not self.temperature >= 1:
            raise UsageError(
                "--target-error, --temperature: must be greater than 0 and at least 1, found "
                f"{self.error:g} and {self.temperature:g}; 0.05 and 2 are usual"
            )


@dataclass(slots=True, eq=False)
class Planner:
    """Tries settings on samples of the text.

    Args:
        base: the settings that all share.
        teacher: the loaded teacher.
        data: packed text.
        console: where progress goes.
        temperatures: where errors are measured.
    """

    base: CacheSettings
    teacher: "LoadedModel"
    data: PackedDataset
    console: Console
    temperatures: tuple[float, ...] = TEMPERATURES
    _calibrator: Calibrator = field(init=False)
    _fitting: "Fitting" = field(init=False)
    _dataset: Dataset = field(init=False)
    _written: list[TeacherStates] = field(default_factory=list, init=False)
    _forward_seconds: float = field(default=0.0, init=False)

    def prepare(self) -> None:
        """Runs the teacher: over the calibration sample and over the sequences that are written."""
        import mlx.core as mx

        from pmetal_distill.offline.calibrate import Fitting

        spec, hidden = target_spec(self.base, self.teacher.vocab_size), hidden_spec(self.base, self.teacher)
        layers = hidden.layers if hidden else ()

        def runner() -> TeacherRunner:
            return TeacherRunner(self.teacher, self.data, self.base.batch_size, layers)

        self._calibrator = Calibrator(self.base, self.teacher, runner(), spec, self.console, hidden)
        self._fitting = Fitting(*self._calibrator.samples(most=HELD_BACK_TOKENS), self.teacher.head)
        chosen = self.data.sample_sequences(WRITTEN_TOKENS, seed=self.base.seed)
        started = time.perf_counter()
        for states in runner().sample(chosen.tolist()):
            mx.eval(states.final, dict(states.layers))
            self._written.append(states)
        self._forward_seconds = time.perf_counter() - started
        lengths = self.data.sequence_lengths(chosen)
        self._dataset = replace(
            describe(self.base, self.teacher, self.data, spec, hidden, weights="a plan"),
            num_sequences=len(lengths),
            num_tokens=int(lengths.sum()),
        )

    def rows(self, tried: list[CacheSettings]) -> list[dict[str, Any]]:
        """A row of each setting, and what a cache of the whole data set takes with it."""
        rows = []
        with self.console.progress("trying settings", total=len(tried), unit="settings") as progress:
            for settings in tried:
                row = self.row(settings)
                rows.append(row | _totals(row, self.data))
                progress.advance(1)
        return rows

    def row(self, settings: CacheSettings) -> dict[str, Any]:
        """Bytes, speed and errors of one setting."""
        started = time.perf_counter()
        coding, error = self._code(settings)
        learning = time.perf_counter() - started
        size, seconds = self._write(settings, coding)
        sketch = settings.tail == "sketch"
        return {
            "tail": settings.tail,
            "top_k": settings.top_k,
            "rank": settings.rank if sketch else None,
            "step": settings.sketch_step if sketch else None,
            "bytes_per_token": size["bytes_per_token"],
            "hidden_bytes_per_token": size["hidden_bytes_per_token"],
            "sidecar_bytes": size["sidecar_bytes"],
            "calibration_seconds": learning,
            "tokens_per_second": self._dataset.num_tokens / (self._forward_seconds + seconds),
            **{f"error@{t:g}": found.gradient for t, found in error.items()},
            **{f"kl@{t:g}": found.kl for t, found in error.items() if settings.tail != "none"},
        }

    def _code(self, settings: CacheSettings) -> "tuple[Coding, Mapping[float, TargetError]]":
        from pmetal_distill.offline.calibrate import measure
        from schemas.codec import Codec

        spec = target_spec(settings, self.teacher.vocab_size)
        error: dict[float, TargetError] = {}
        if settings.tail == "sketch":
            found = self._fitting.calibrate(spec, rank=settings.rank, step=settings.sketch_step)
            coding, error = self._calibrator.coding(found), dict(found.error)
        else:
            coding = self._calibrator.plain_coding(self._fitting.sample.thinned(CODEBOOK_TOKENS), spec)
        if missing := tuple(t for t in self.temperatures if t not in error):
            codec = Codec(spec, coding.sidecars.basis, coding.sidecars.codebook)
            error |= measure(self._fitting.held_back, codec, coding.map, temperatures=missing)
        return coding, {t: error[t] for t in self.temperatures}

    def _write(self, settings: CacheSettings, coding: Coding) -> tuple[dict[str, Any], float]:
        """A small cache of the sampled sequences: its size, and the seconds from states to shards."""
        from pmetal_distill.offline.writer import CacheWriter

        spec = target_spec(settings, self.teacher.vocab_size)
        dataset, sidecars = replace(self._dataset, target=spec), coding.sidecars
        started = time.perf_counter()
        found = [
            sequence
            for states in self._written
            for sequence in queue_batch(
                0, coding, states, self.teacher, spec, chunk=settings.head_chunk
            ).sequences()
        ]
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "cache"
            with CacheWriter.create_or_resume(place, dataset, {}, zstd_level=settings.zstd_level) as writer:
                for shard in range(dataset.num_shards):
                    part = dataset.shard_range(shard)
                    writer.write_shard(
                        shard,
                        found[part.start : part.stop],
                        basis=sidecars.basis,
                        codebook=sidecars.codebook,
                        hidden_basis=sidecars.hidden_basis,
                    )
            seconds = time.perf_counter() - started
            return describe_cache(place), seconds


def run_plan(
    base: CacheSettings, grid: Grid, console: Console, *, target: Target | None = None
) -> dict[str, Any]:
    """Tries every setting of the grid.

    Args:
        base: what all settings share; its own tail, top_k and sketch are not used.
        grid: the settings.
        console: where progress goes.
        target: the error that is wanted.

    Returns:
        `rows`, one a setting, with totals; `tokens`; `peak_memory_bytes`; and with a target `chosen`, the
        cheapest row that reaches it or None, and `command`.

    Raises:
        UsageError: settings that the teacher or the text do not allow.
    """
    import mlx.core as mx

    from pmetal_distill.models import load_model

    list(grid.settings(base))  # refuses what no teacher allows before one is loaded
    teacher = load_model(base.teacher, dtype=base.dtype, trust_remote_code=base.trust_remote_code)
    tried = list(grid.allowed_by(teacher).settings(base))
    largest = max((s for s in tried), key=lambda s: s.rank if s.tail == "sketch" else 0)
    for settings in tried:
        target_spec(settings, teacher.vocab_size)
        check_rank(settings, teacher)
    data = read_data(base, teacher)
    wanted = sorted({*TEMPERATURES, *([target.temperature] if target else [])})
    planner = Planner(replace(largest, tail="sketch"), teacher, data, console, tuple(wanted))
    mx.reset_peak_memory()
    planner.prepare()
    rows = planner.rows(tried)
    result: dict[str, Any] = {
        "tokens": data.num_tokens,
        "sequences": data.num_sequences,
        "peak_memory_bytes": mx.get_peak_memory(),
        "rows": rows,
    }
    if target is not None:
        result |= _choose(tried, rows, target)
    return result


def _totals(row: Mapping[str, Any], data: PackedDataset) -> dict[str, float]:
    per_token = row["bytes_per_token"] + row["hidden_bytes_per_token"]
    disk_bytes = per_token * data.num_tokens + row["sidecar_bytes"]
    return {
        "disk_bytes": disk_bytes,
        "bytes_per_token_with_sidecar": disk_bytes / data.num_tokens,
        "seconds": data.num_tokens / row["tokens_per_second"] + row["calibration_seconds"],
    }


def _choose(tried: list[CacheSettings], rows: list[dict[str, Any]], target: Target) -> dict[str, Any]:
    name = f"error@{target.temperature:g}"
    reached = [i for i, row in enumerate(rows) if row[name] <= target.error]
    best = min(row[name] for row in rows)
    if not reached:
        return {"chosen": None, "command": None, "best": best}
    chosen = min(reached, key=lambda i: cast(float, rows[i]["disk_bytes"]))
    return {"chosen": rows[chosen], "command": command_of(tried[chosen]), "best": best}


def command_of(settings: CacheSettings) -> str:
    """The `cache` command with these settings; what is a default anyway is left out, but for the target's."""
    words = ["pmetal-pipeline", "cache"]
    always = {"tail", "top_k", *(("sketch_rank", "sketch_step") if settings.tail == "sketch" else ())}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if "help" not in item.metadata or (item.name not in always and value == item.default):
            continue
        flag = "--" + item.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            words += [flag, ",".join(map(str, value))]
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def plan_text(plan: Mapping[str, Any], target: Target | None) -> str:
    """The plan for people, in 80 columns."""
    names = [name for name in plan["rows"][0] if name.startswith("error@")]
    header = ["target", "B/token", *(f"T={name[6:]}" for name in names), "disk MB", "time", "tok/s"]
    lines = [
        [
            _name(row),
            f"{row['bytes_per_token']:.1f}",
            *(f"{row[name]:.4f}" for name in names),
            f"{row['disk_bytes'] / 1e6:,.1f}",
            _minutes(row["seconds"]),
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in plan["rows"]
    ]
    text = [
        f"{plan['tokens']:,} tokens; errors of the gradient at T on held-back text, as `cache` records "
        "them;\nB/token without sidecars, disk MB with them",
        table(header, lines),
        f"peak memory: {plan['peak_memory_bytes'] / 1e9:.2f} GB",
    ]
    if target is not None and plan["command"]:
        text.append(
            f"cheapest with at most {target.error:g} at T = {target.temperature:g}:\n{plan['command']}"
        )
    return "\n".join(text)


def _name(row: Mapping[str, Any]) -> str:
    sketch = f" r={row['rank']} step={row['step']:g}" if row["rank"] else ""
    return f"top-{row['top_k']} {row['tail']}{sketch}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"
