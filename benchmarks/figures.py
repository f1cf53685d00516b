"""The pictures in the README: error against bytes from a result of `fidelity.py`, the losses of a run.

python benchmarks/fidelity.py --json fidelity.json
python benchmarks/figures.py --fidelity fidelity.json --run runs/demo/run [--out docs/images]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.reporting.axes import Axis
from pipeline.reporting.figures import Figure, line_figure
from pipeline.reporting.lines import Series
from pipeline.reporting.run_files import read_metrics

TABLE, TEMPERATURE = "Python documentation", 2
WIDTH, HEIGHT = 640.0, 300.0
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


def learning_curve(run: Path) -> Figure:
    """Divergence and cross-entropy of a run."""
    metrics = read_metrics(run)
    series = [
        Series("cross-entropy", metrics.thinned("hard")),
        Series("KL to the teacher", metrics.thinned("soft")),
    ]
    said = [f"{s.name} falls from {s.points[0][1]:.2f} to {s.points[-1][1]:.2f} nats" for s in series]
    return line_figure(
        "learning-curve",
        "The demo's student, a third of its teacher's layers, learns from the cache",
        series,
        Axis("training step", tight=True),
        Axis("nats a token; KL at T = 2", from_zero=True),
        description="; ".join(said),
        width=WIDTH,
        height=HEIGHT,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fidelity", type=Path, help="what fidelity.py wrote")
    parser.add_argument("--run", type=Path, help="folder of a training run")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    figures = []
    if args.fidelity:
        figures.append(error_against_bytes(json.loads(args.fidelity.read_text())["tables"][TABLE]))
    if args.run:
        figures.append(learning_curve(args.run))
    args.out.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (args.out / f"{figure.name}.svg").write_text(figure.file(), encoding="utf-8")


if __name__ == "__main__":
    main()
