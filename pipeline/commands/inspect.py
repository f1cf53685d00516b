"""`inspect`: what is inside a cache."""

import click

from pipeline.commands.shared import console_options
from pipeline.console import Console
from pipeline.options import PLACE
from schemas.errors import UsageError


@click.command("inspect")
@click.argument("cache", type=PLACE)
@click.option("--sequence", type=int, help="Show the teacher's view of a position of this sequence.")
@click.option("--position", type=int, default=0, show_default=True, help="Position in the sequence.")
@click.option("--temperature", default=1.0, show_default=True, help="Softmax temperature of the view.")
@click.option("--top", default=10, show_default=True, help="Tokens to show.")
@console_options
def command(
    cache: str, sequence: int | None, position: int, temperature: float, top: int, console: Console
) -> None:
    """Show what CACHE holds: layout, size by column, errors measured while caching, what it was made from.

    With --sequence N --position P: the text up to P, and the teacher's probabilities for the next token.
    """
    if top < 1:
        raise UsageError(f"--top: must be at least 1, found {top}")
    from pipeline import inspection

    if sequence is None:
        facts = inspection.describe(cache)
        console.result(facts, inspection.describe_text(facts))
        return
    view = inspection.look(cache, sequence=sequence, position=position, temperature=temperature, top=top)
    console.result(view, inspection.look_text(view))
