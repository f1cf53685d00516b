"""`eval`: a student against its teacher on held-out text."""

from pathlib import Path

import click

from pipeline.commands.shared import FloatList, console_options
from pipeline.console import Console
from schemas.errors import UsageError


@click.command("eval")
@click.argument("student")
@click.option("--teacher", required=True, help="An mlx-lm folder, a hub id or a .gguf file.")
@click.option("--data", required=True, help="Held-out text, in any form that `cache` takes.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True)
@click.option("--temperatures", type=FloatList(), default="1,2", show_default=True, help="Where KL is taken.")
@click.option("--max-seq-len", default=512, show_default=True, help="Most tokens in a sequence.")
@click.option("--batch-size", default=8, show_default=True, help="Sequences at a time.")
@click.option("--head-chunk", default=256, show_default=True, help="Positions whose logits exist at once.")
@click.option("--max-tokens", type=int, help="Stop behind so many tokens.")
@click.option("--mask-prompt", is_flag=True, help="Leave prompts out.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model.")
@console_options
def command(
    student: str,
    teacher: str,
    data: str,
    split: str,
    temperatures: tuple[float, ...],
    max_seq_len: int,
    batch_size: int,
    head_chunk: int,
    max_tokens: int | None,
    mask_prompt: bool,
    trust_remote_code: bool,
    console: Console,
) -> None:
    """Compare STUDENT (a run folder or a model) with its teacher on held-out text.

    Prints KL(teacher || student) in nats at each temperature, the share of positions where both have the same
    first choice, where the teacher's first choice is among the student's five, and both perplexities.
    """
    if not temperatures or min(temperatures) <= 0:
        raise UsageError(f"--temperatures: must be greater than 0, found {temperatures}; 1,2 is usual")
    if min(max_seq_len - 1, batch_size, head_chunk, max_tokens or 1) < 1:
        raise UsageError(
            "--max-seq-len, --batch-size, --head-chunk, --max-tokens: must be positive; give larger ones"
        )
    from pipeline.evaluate import EvalOptions, evaluate
    from pipeline.text import packed_text
    from pmetal_distill.models import load_model

    teacher_model = load_model(teacher, trust_remote_code=trust_remote_code)
    dataset = packed_text(
        data,
        teacher_model,
        split=split,
        max_seq_len=max_seq_len,
        mask_prompt=mask_prompt,
    )
    student_model = load_model(model_folder(student), trust_remote_code=trust_remote_code)
    options = EvalOptions(temperatures, batch_size, head_chunk, max_tokens)
    console.result(evaluate(teacher_model, student_model, dataset, options=options, console=console))


def model_folder(run_or_model: str) -> str:
    """The model inside a run folder, or the argument itself."""
    inside = Path(run_or_model) / "model"
    return str(inside) if (inside / "config.json").exists() else run_or_model
