"""The report of a run: its losses, schedules, held-out figures, speed, calibration, text, settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.reporting.axes import Axis
from pipeline.reporting.eval_figures import evaluation_section
from pipeline.reporting.figures import Figure, line_figure
from pipeline.reporting.lines import Series
from pipeline.reporting.numbers import percent, short
from pipeline.reporting.page import Report, Section, Tile, facts
from pipeline.reporting.places import shown
from pipeline.reporting.run_files import Metrics, find_cache, read_metrics, read_settings
from pipeline.reporting.student_page import student_section
from pipeline.training.finished import SMALL, check_run

LOSSES = {"loss": "total", "soft": "soft", "hard": "hard", "hidden": "hidden"}
SCHEDULES = {"learning_rate": "Learning rate", "temperature": "Temperature", "alpha": "Alpha"}
X = Axis("iteration", tight=True)


@dataclass(frozen=True, slots=True)
class RunInputs:
    """A run and what is shown beside it.

    Attributes:
        folder: of the run.
        evaluation: what `eval --json` printed, or None.
    """

    folder: Path
    evaluation: Mapping[str, Any] | None


def run_report(inputs: RunInputs, *, footer: str) -> Report:
    """The report of a run, finished or not.

    Args:
        inputs: where it is.
        footer: the page's last line.

    Raises:
        DataError, UsageError, CorruptionError: its files are damaged, or not what it wrote.
    """
    check_run(inputs.folder, SMALL)
    settings, metrics = read_settings(inputs.folder), read_metrics(inputs.folder)
    cache = find_cache(settings, inputs.folder)
    student = Path(str(settings.get("student", "a student")))
    source = settings.get("cache") or settings.get("teacher") or "a teacher"
    return Report(
        kicker="Distillation run",
        title="/".join(inputs.folder.resolve().parts[-2:]),
        subtitle=f"{student.name} learns from {shown(source)}",
        tiles=_tiles(metrics, inputs.evaluation),
        sections=[
            _training(metrics, settings),
            _held_out(metrics),
            evaluation_section(inputs.evaluation),
            student_section(inputs.folder, cache, settings),
            _speed(metrics),
            _settings(settings),
        ],
        footer=footer,
    )


def _tiles(metrics: Metrics, evaluation: Mapping[str, Any] | None) -> list[Tile]:
    tiles = []
    for name, label, unit in (
        ("loss", "loss at the end", ""),
        ("val_kl@1", "held-out KL, T\u00a0=\u00a01", "nats"),
        ("val_kl@2", "held-out KL, T\u00a0=\u00a02", "nats"),
        ("tokens", "tokens trained on", ""),
        ("seconds", "training", "seconds"),
        ("tokens_per_second", "speed", "tokens/s"),
    ):
        if (value := metrics.last(name)) is not None:
            tiles.append(Tile(label, short(round(value, 3)), unit))
    for name, label in (("kl@1", "KL to the teacher, T\u00a0=\u00a01"), ("top1", "same first choice")):
        value = (evaluation or {}).get(name)
        if isinstance(value, int | float):
            tiles.append(Tile(label, percent(value) if name == "top1" else short(value)))
    return tiles


def _training(metrics: Metrics, settings: Mapping[str, Any]) -> Section:
    title = "Training"
    series = [Series(label, metrics.thinned(name)) for name, label in LOSSES.items() if metrics[name]]
    if not series:
        return Section("training", title, skipped="the run has reported nothing yet")
    lead = [
        "The total is alpha T² times the soft loss plus (1 - alpha) times the hard one, and the weighted "
        "hidden-state loss if there is one.",
        f"Soft: {settings.get('loss', 'divergence')} to the teacher at T. Hard: cross-entropy with the text. "
        "Nats a token, means since the report before.",
    ]
    values = [v for s in series for _, v in s.points]
    figures = [_figure("losses", "Loss components", series, "nats", log=_wide(values))]
    figures += [
        _figure(name.replace("_", "-"), label, [Series(label, metrics.thinned(name))], "", from_zero=True)
        for name, label in SCHEDULES.items()
        if metrics[name]
    ]
    return Section("training", title, lead, figures)


def _held_out(metrics: Metrics) -> Section:
    title = "On held-out sequences"
    names = sorted(name for name in metrics.curves if name.startswith("val_kl@"))
    if not names and not metrics["val_loss"]:
        return Section(
            "held-out", title, skipped="the run held no sequences out; train with --val-share 0.05 to see it"
        )
    figures = []
    divergences = [Series(f"T = {name.partition('@')[2]}", metrics.thinned(name)) for name in names]
    if divergences:
        figures.append(_figure("held-out-kl", "KL(teacher ‖ student)", divergences, "nats"))
    if agree := metrics.thinned("val_top1"):
        series = [Series("agreement", agree)]
        figures.append(_figure("agreement", "Same first choice as the teacher", series, "share of tokens"))
    if losses := metrics.thinned("val_loss"):
        series = [Series("held out", losses), Series("training", metrics.thinned("loss"))]
        figures.append(_figure("held-out-loss", "Loss", [s for s in series if s.points], "nats"))
    lead = [
        "Measured in between on sequences that are not trained on. If these curves rise while the training "
        "loss falls, the student learns the text by heart.",
    ]
    return Section("held-out", title, lead, figures)


def _speed(metrics: Metrics) -> Section:
    title = "Speed"
    rate = metrics.rate("tokens", "seconds")
    if not rate:
        return Section("speed", title, skipped="the run has reported nothing yet")
    speed = _figure(
        "speed", "Tokens trained on a second", [Series("speed", rate)], "tokens/s", from_zero=True
    )
    figures = [speed]
    if waits := metrics.thinned("data_wait_share"):
        series = [Series("waiting", waits)]
        figures.append(
            _figure("waiting", "Time spent waiting for data", series, "share of all time", from_zero=True)
        )
    total = metrics.last("seconds") or 0.0
    iterations = metrics["seconds"][-1][0]
    lead = [
        f"{short(round(total, 1))} seconds for {iterations:,.0f} iterations, "
        f"{short(round(total / iterations, 3))} seconds each. Speed is measured between two reports, waiting "
        "since the beginning.",
    ]
    return Section("speed", title, lead, figures)


def _settings(settings: Mapping[str, Any]) -> Section:
    title = "Settings"
    if not settings:
        return Section("settings", title, skipped="the folder has no config.yaml")
    given = {
        name.replace("_", " "): _shown(value)
        for name, value in settings.items()
        if value not in (None, {}, [])
    }
    return Section("settings", title, ["As the run resolved them: config.yaml."], extra=[facts(given)])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else shown(value)


def _figure(
    name: str,
    title: str,
    series: list[Series],
    unit: str,
    *,
    log: bool = False,
    from_zero: bool = False,
) -> Figure:
    ends = [
        f"{s.name}: {short(round(s.points[0][1], 6))} to {short(round(s.points[-1][1], 6))}" for s in series
    ]
    y = Axis(unit, log=log, from_zero=from_zero)
    return line_figure(name, title, series, X, y, description=f"By iteration. {'; '.join(ends)}.")


def _wide(values: list[float]) -> bool:
    return min(values) > 0 and max(values) > 30 * min(values)
