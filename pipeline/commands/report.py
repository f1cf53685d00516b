"""`report`: the pictures of a cache or a run as one HTML file."""

from pathlib import Path

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console
from pipeline.options import PLACE


@click.command("report")
@click.argument("source", type=PLACE, metavar="RUN|CACHE")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The HTML file to write.")
@click.option("--plan", type=click.Path(path_type=Path), help="For a cache: what `plan --json` printed.")
@click.option(
    "--eval", "evaluation", type=click.Path(path_type=Path), help="For a run: what `eval --json` printed."
)
@click.option(
    "--figures",
    type=click.Path(path_type=Path),
    help="Also write each figure as SVG into this folder, and as PNG where a Chromium is installed.",
)
@console_options
def command(
    source: str,
    out: Path,
    plan: Path | None,
    evaluation: Path | None,
    figures: Path | None,
    console: Console,
) -> None:
    """Draw a cache or a run: one HTML file that needs no network.

    Of a cache: entropy and tail mass by temperature, bytes by column, measured errors, and a page of text
    coloured by the teacher's entropy. Of a run: losses, schedules, held-out figures, speed, calibration, and
    a page of text coloured by the divergence between teacher and student.
    """
    from pipeline.reporting.build import ReportOptions, build_report, report_text

    options = ReportOptions(source, out, plan, evaluation, figures)
    result = build_report(options, console)
    console.result(result, report_text(result))
