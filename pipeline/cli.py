"""`pmetal-pipeline`: the commands and what they share. Help does not import MLX: stages load when run."""

import difflib
import importlib
import sys
from collections.abc import Sequence

import click

from pipeline.console import printable
from schemas.errors import PmetalError

COMMANDS = {
    "plan": "pipeline.commands.plan",
    "cache": "pipeline.commands.cache",
    "train": "pipeline.commands.train",
    "init-student": "pipeline.commands.init_student",
    "inspect": "pipeline.commands.inspect",
    "status": "pipeline.commands.status",
    "verify": "pipeline.commands.verify",
    "repair": "pipeline.commands.repair",
    "push": "pipeline.commands.push",
    "pull": "pipeline.commands.pull",
    "eval": "pipeline.commands.eval",
    "report": "pipeline.commands.report",
    "import": "pipeline.commands.import_",
    "export": "pipeline.commands.export",
    "demo": "pipeline.commands.demo",
}


RUNS_MODELS = ("plan", "cache", "train", "init-student", "eval", "demo")


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            close = difflib.get_close_matches(cmd_name.lower().replace("_", "-"), COMMANDS, n=1)
            if close and not ctx.resilient_parsing:  # which completion does
                ctx.fail(f"no command '{cmd_name}'; did you mean '{close[0]}'?")
            return None
        command = importlib.import_module(COMMANDS[cmd_name]).command
        assert isinstance(command, click.Command)
        return command


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from pipeline import about

    click.echo(about.report() if ctx.params.get("verbose") else about.version_line())
    ctx.exit()


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "-v", "--verbose", is_flag=True, is_eager=True, help="With --version: back end, BLAS, libraries."
)
@click.option(
    "--version", is_flag=True, callback=_print_version, expose_value=False, help="Print the version."
)
def group(verbose: bool) -> None:
    """Distil a large language model into a small one: cache what it says once, train from the cache."""


def prepare_process(words: Sequence[str]) -> None:
    """What only a process of our own may do to itself, before it imports anything heavy.

    transformers, which mlx_lm imports, would load PyTorch where it is installed: ten seconds for nothing. And
    where kernels of MLX for a CUDA GPU have not been built yet, other processes begin with that now.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    if words and words[0] in RUNS_MODELS and not {"-h", "--help"} & set(words):
        from pmetal_distill import kernel_warmup

        kernel_warmup.begin(["bfloat16", "float32"])


def _of_the_system(error: Exception) -> str | None:
    """What to do about an error that says that the system gives no more of something; None for any other."""
    if isinstance(error, MemoryError):
        return (
            "memory: must suffice for the command, found none left; lower --batch-size or raise 'ulimit -v'"
        )
    if "not allowed to raise maximum limit" in str(error):
        return "open files: mlx_lm must be allowed 4,096, found a lower limit; raise it with 'ulimit -n 4096'"
    if "can't start new thread" in str(error):
        return "threads: must be to be had, found none left; raise 'ulimit -v' and 'ulimit -u'"
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exit code 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    if arguments is None:
        prepare_process(sys.argv[1:])
    try:
        group.main(args=arguments, prog_name="pmetal-pipeline", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PmetalError as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        advice = "check the path, its permissions and the space on its disk"
        click.echo(printable(f"error: {place}{error.strerror or error}; {advice}"), err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt) as stop:  # an Abort is a RuntimeError too
        said = str(stop.__cause__ or stop) or "interrupted; what was committed is kept, --resume continues"
        click.echo(printable(said), err=True)
        sys.exit(130)
    except (MemoryError, RuntimeError, ValueError) as error:
        if (reason := _of_the_system(error)) is None:
            raise
        click.echo(f"error: {reason}", err=True)
        sys.exit(1)
