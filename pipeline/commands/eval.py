"""`eval`: a student against its teacher on held-out text."""

from typing import Any

import click

from pipeline.commands.shared import FloatList, console_options, dtype_option
from pipeline.console import Console
from pipeline.options import PLACE
from schemas.errors import UsageError


@click.command("eval")
@click.argument("student", type=PLACE)
@click.option("--teacher", type=PLACE, help="An mlx-lm folder, a hub id or a .gguf file; with --data.")
@click.option("--data", type=PLACE, help="Held-out text, in any form that `cache` takes; with --teacher.")
@click.option(
    "--cache", type=PLACE, help="Instead: a cache of the teacher, a folder or a URL in object storage."
)
@click.option(
    "--sequences",
    type=click.Choice(["held-out", "all"]),
    help="Of the cache. By default those that the run held out of it, if any.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    help="Which part of --data that has several; 'test' if not given. Other data is read as a whole.",
)
@click.option("--kind-feature", help="Column that names the kind of a document; by default its file does.")
@click.option("--temperatures", type=FloatList(), default="1,2", show_default=True, help="Where KL is taken.")
@click.option("--max-seq-len", default=512, show_default=True, help="Most tokens in a sequence.")
@click.option("--batch-size", default=8, show_default=True, help="Sequences at a time.")
@click.option(
    "--head-chunk", type=int, help="Positions whose logits exist at once; by the device if not given."
)
@click.option("--max-tokens", type=int, help="Stop behind so many tokens.")
@click.option("--mask-prompt", is_flag=True, help="Compare on answers only.")
@click.option("--tasks", help="Tasks of the lm-evaluation-harness to run too: a,b (pip install lm-eval).")
@click.option("--limit", type=int, help="Examples a task.")
@dtype_option("both models compute")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model.")
@console_options
def command(student: str, console: Console, **options: Any) -> None:
    """Compare STUDENT (a run folder or a model) with its teacher on held-out text.

    Prints KL(teacher || student) in nats at each temperature; top1 and top5, how often the teacher's first
    choice is the student's, or among its first five; both perplexities; and calibration errors: how far the
    student's confidence in its first choice is from how often the text has it (ece), and from the teacher's
    probability of it (ece_teacher). All of it also by position in the document and by kind of document.
    """
    _check(options)
    from pipeline.eval_text import evaluation_text

    result: dict[str, Any] = {}
    if options["cache"] is not None:
        result = _against_cache(student, console, options)
    elif options["teacher"] is not None:
        result = _against_teacher(student, console, options)
    if options["tasks"] is not None:
        result["tasks"] = _tasks(student, options)
    console.result(result, evaluation_text(result))


def _check(options: dict[str, Any]) -> None:
    temperatures = options["temperatures"]
    if not temperatures or min(temperatures) <= 0:
        raise UsageError(f"--temperatures: must be greater than 0, found {temperatures}; 1,2 is usual")
    chunk = 1 if options["head_chunk"] is None else options["head_chunk"]
    sizes = (options["max_seq_len"] - 1, options["batch_size"], chunk)
    if min(*sizes, options["max_tokens"] or 1, options["limit"] or 1) < 1:
        raise UsageError(
            "--max-seq-len, --batch-size, --head-chunk, --max-tokens, --limit: must be positive; "
            "give larger ones"
        )
    given = {name for name in ("teacher", "data", "cache", "tasks") if options[name] is not None}
    if given - {"tasks"} not in ({"teacher", "data"}, {"cache"}) and given != {"tasks"}:
        found = " and ".join(f"--{name}" for name in sorted(given)) or "none of them"
        raise UsageError(f"give --teacher and --data together, or --cache, or --tasks alone; found {found}")
    for name, needs in (("sequences", "cache"), ("kind_feature", "data"), ("limit", "tasks")):
        if options[name] is not None and options[needs] is None:
            raise UsageError(f"--{name.replace('_', '-')}: goes with --{needs}, found none; leave it out")
    if options["tasks"] is not None:
        from pmetal_distill.modelling.tasks import require_harness

        require_harness()


def _eval_options(options: dict[str, Any]) -> Any:
    from pipeline.evaluate import EvalOptions

    names = ("temperatures", "batch_size", "head_chunk", "max_tokens")
    return EvalOptions(**{name: options[name] for name in names})


def _against_teacher(student: str, console: Console, options: dict[str, Any]) -> dict[str, Any]:
    from pipeline.data import available_splits
    from pipeline.data.kinds import document_kinds
    from pipeline.eval_subject import load_subject
    from pipeline.evaluate import evaluate
    from pipeline.text import note_skipped, packed_text
    from pmetal_distill.models import load_model

    trusting = options["trust_remote_code"]
    teacher = load_model(options["teacher"], dtype=options["dtype"], trust_remote_code=trusting)
    data, names = options["data"], ("max_seq_len", "mask_prompt")
    split = options["split"] or ("test" if available_splits(data) else "train")
    note_skipped(data, console)
    dataset = packed_text(data, teacher, split=split, **{name: options[name] for name in names})
    kinds = document_kinds(dataset, feature=options["kind_feature"])
    subject = load_subject(student, dtype=options["dtype"], trust_remote_code=trusting)
    return evaluate(teacher, subject, dataset, options=_eval_options(options), console=console, kinds=kinds)


def _against_cache(student: str, console: Console, options: dict[str, Any]) -> dict[str, Any]:
    from pipeline.eval_subject import cache_sequences, load_subject
    from pipeline.evaluate import evaluate_cache
    from pmetal_distill.offline.reader import LogitCache

    cache = LogitCache(options["cache"])
    numbers, which = cache_sequences(student, cache, options["sequences"], cache_place=options["cache"])
    subject = load_subject(student, dtype=options["dtype"], trust_remote_code=options["trust_remote_code"])
    found = evaluate_cache(cache, subject, numbers, options=_eval_options(options), console=console)
    return {"sequences": which, "targets": cache.spec.tail, **found}


def _tasks(student: str, options: dict[str, Any]) -> Any:
    from pipeline.eval_subject import plain_model
    from pmetal_distill.modelling.tasks import run_tasks

    names = [name for part in options["tasks"].split(",") if (name := part.strip())]
    with plain_model(student, trust_remote_code=options["trust_remote_code"]) as folder:
        return run_tasks(folder, names, limit=options["limit"], batch_size=options["batch_size"])
