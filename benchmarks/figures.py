"""The pictures in README and docs, from the results of other benchmarks and the metrics of runs.

python benchmarks/fidelity.py --json fidelity.json
python benchmarks/peers.py --json peers.json
python benchmarks/growth.py --json growth.json
python benchmarks/figures.py --fidelity fidelity.json --peers peers.json --growth growth.json --run RUN
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.reporting.axes import Axis
from pipeline.reporting.figures import Figure, Table, line_figure
from pipeline.reporting.lines import HEIGHT as LINES_HEIGHT
from pipeline.reporting.lines import WIDTH as LINES_WIDTH
from pipeline.reporting.lines import Series, line_chart
from pipeline.reporting.markup import tag
from pipeline.reporting.run_files import read_metrics

TABLE, TEMPERATURE = "Python documentation", 2
WIDTH, HEIGHT = 640.0, 300.0
DECADES = (3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
OURS = "ours, sketch"
FAMILIES: dict[str, Callable[[str], bool]] = {
    OURS: lambda name: name.startswith("ours") and "sketch" in name,
    "ours, top 64 + bucket": lambda name: name == "ours, top-64 + bucket",
    "ours, top 64": lambda name: name == "ours, top-64 renormalised",
    "RS-KD, drawn at T = 2": lambda name: name.startswith("RS-KD") and name.endswith("T = 2"),
    "RS-KD, drawn at T = 1": lambda name: name.startswith("RS-KD") and "weights" in name,
    "gmlx": lambda name: name.startswith("gmlx"),
    "DistillKit": lambda name: name.startswith("DistillKit") and name.endswith("bucket"),
    "JSON lines": lambda name: name.startswith("vLLM") and name.endswith("bucket"),
    "mlx-lm DWQ": lambda name: name.startswith("mlx-lm") and not name.endswith("in its loss"),
    "mlx-kld": lambda name: name.startswith("mlx-kld"),
    "dense float16": lambda name: name.startswith("dense"),
}
GROWTH = {
    "cache": "Stage one: time a token",
    "cache_mb": "Stage one: memory",
    "step": "Training step: time a token",
    "step_mb": "Training step: memory",
}
AXES = {"vocab": "V", "k": "k", "rank": "rank", "length": "length", "batch": "batch"}
CUT = "a third of its teacher's layers, learns from the cache"
DEFAULT = "top-16 + sketch r=256, step 60"


def error_against_bytes(rows: list[dict[str, Any]]) -> Figure:
    """One point a kind of target; the sketch has a line through its sizes."""
    found = {row["name"]: (row["bytes"], row[f"gradient@{TEMPERATURE}"]) for row in rows}
    sketches = sorted(
        (point, name) for name, point in found.items() if "sketch" in name and ", no " not in name
    )
    buckets = sorted((point, name) for name, point in found.items() if name.endswith("+ bucket"))
    series = [
        Series(
            "top-16 + sketch, three sizes",
            [point for point, _ in sketches],
            notes=["default" if name == DEFAULT else "" for _, name in sketches],
        ),
        *(Series(name, [point], joined=False) for point, name in buckets),
        Series("top-64 renormalised", [found["top-64 renormalised"]], joined=False),
    ]
    said = "; ".join(f"{name}: {size:.1f} bytes, error {error:.4f}" for name, (size, error) in found.items())
    return line_figure(
        "error-bytes",
        f"How wrong the gradient is at T = {TEMPERATURE}, against the bytes that are kept",
        series,
        Axis("bytes a token on disk", ticks=(0.0, 25.0, 50.0, 75.0, 100.0, 125.0, 150.0)),
        Axis("relative error of the gradient at the output layer", log=True),
        description=said,
        width=WIDTH,
        height=HEIGHT,
    )


def learning_curve(run: Path, name: str, title: str) -> Figure:
    """Divergence and cross-entropy of a run."""
    metrics = read_metrics(run)
    series = [
        Series("cross-entropy", metrics.thinned("hard")),
        Series("KL to the teacher", metrics.thinned("soft")),
    ]
    said = [f"{s.name} falls from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f} nats" for s in series]
    return line_figure(
        name,
        title,
        series,
        Axis("training step", tight=True),
        Axis("nats a token; KL at T = 2", from_zero=True),
        description="; ".join(said),
        width=WIDTH,
        height=HEIGHT,
    )


def peers(rows: list[dict[str, Any]]) -> Figure:
    """One point a kind of target, both axes logarithmic; a line through what differs in size only."""
    shown = [row for row in rows if TEMPERATURE in row["temperatures"]]
    series = []
    for family, matches in FAMILIES.items():
        points = sorted(
            (row["bytes"], row[f"gradient@{TEMPERATURE}"]) for row in shown if matches(row["name"])
        )
        series += [Series(family, points, joined=family == OURS)] if points else []
    said = "; ".join(
        f"{row['name']}: {row['bytes']:,.0f} bytes, error {row[f'gradient@{TEMPERATURE}']:.3g}"
        for row in shown
    )
    return line_figure(
        "peers",
        f"Ways to keep a teacher: error of the gradient at T = {TEMPERATURE} against bytes",
        series,
        Axis("bytes a token on disk", log=True),
        Axis("relative error of the gradient at the output layer", log=True, ticks=DECADES),
        description=said,
        width=WIDTH + 120,
        height=HEIGHT + 220,
    )


def growth(found: dict[str, dict[str, list[tuple[float, float]]]]) -> Figure:
    """Cost against size, both relative to the smallest: a panel a cost, a line a kind of size."""
    content, said, rows = [], [], []
    sizes = Axis("size, times the smallest", log=True, ticks=(1.0, 2.0, 4.0, 8.0))
    for number, (quantity, title) in enumerate(GROWTH.items()):
        series = []
        for axis, values in found.items():
            size, cost = values[quantity][0]
            series.append(Series(AXES[axis], [(a / size, b / cost) for a, b in values[quantity]]))
        chart = line_chart(series, sizes, Axis(f"{title}, times", log=True))
        place = f"translate({number % 2 * LINES_WIDTH} {number // 2 * LINES_HEIGHT})"
        content.append(tag("g", *chart, transform=place))
        ends = [(s.name, *s.points[-1]) for s in series]
        said += [f"{title}: " + ", ".join(f"{b:.2f} times at {a:g} times {name}" for name, a, b in ends)]
        rows += [[title, *end] for end in ends]
    return Figure(
        "growth",
        "How cost grows with the vocabulary V, head k, sketch rank, sequence length and batch",
        "; ".join(said),
        content,
        2 * LINES_WIDTH,
        2 * LINES_HEIGHT,
        Table(["cost", "size", "times the smallest", "cost, times"], rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fidelity", type=Path, help="what fidelity.py wrote")
    parser.add_argument("--peers", type=Path, help="what peers.py wrote")
    parser.add_argument("--growth", type=Path, help="what growth.py wrote")
    parser.add_argument("--run", type=Path, help="folder of a training run")
    parser.add_argument("--long-run", type=Path, help="folder of the run that docs/precision.md describes")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    figures = []
    if args.fidelity:
        figures.append(error_against_bytes(json.loads(args.fidelity.read_text())["tables"][TABLE]))
    if args.peers:
        figures.append(peers(json.loads(args.peers.read_text())["rows"]))
    if args.growth:
        figures.append(growth(json.loads(args.growth.read_text())))
    if args.run:
        figures.append(learning_curve(args.run, "learning-curve", f"The demo's student, {CUT}"))
    if args.long_run:
        title = "10.3M tokens in mixed precision, stopped and resumed after 200 of 640 steps"
        figures.append(learning_curve(args.long_run, "long-run", title))
    args.out.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (args.out / f"{figure.name}.svg").write_text(figure.file(), encoding="utf-8")


if __name__ == "__main__":
    main()
