"""What the code fixes and no object describes: exit codes, metrics, environment variables."""

import ast
from collections.abc import Iterator

from tools.reference.markdown import code, first_sentence, plain, table
from tools.reference.raises import CLASSES
from tools.reference.sources import Sources, is_text

EXIT_CODES = {
    "0": "Done.",
    "1": "Failed: an error of the table below, or of the operating system. Also `verify` that found "
    "something wrong, and `plan --target-error` that no setting reaches.",
    "2": "Wrong usage: an option, a configuration key, an output folder.",
    "130": "Interrupted (Ctrl-C). What was committed is kept; `--resume` goes on.",
}

METRICS = {
    "iteration": "Batches so far, from 1.",
    "loss": "alpha T^2 soft + (1 - alpha) hard + hidden_weight hidden: what is minimised. Like soft, hard "
    "and hidden, the mean over the tokens since the last report.",
    "soft": "The divergence `--loss` at the training temperature, nats a token, without T^2.",
    "hard": "Cross-entropy with the text at T = 1, nats a token.",
    "hidden": "Hidden-state loss; only with `--hidden-loss`.",
    "temperature": "T of the last update.",
    "alpha": "Weight of the divergence in the last update.",
    "learning_rate": "Of the next update.",
    "tokens": "Tokens that counted since the run began, over all processes and resumed parts.",
    "seconds": "Time in training steps since the run began; evaluation and checkpoints are not in it.",
    "tokens_per_second": "tokens / seconds.",
    "data_wait_share": "Share of the seconds that steps waited for their batch.",
    "val_loss": "alpha T^2 val_soft + (1 - alpha) val_hard, with T and alpha of the run's end.",
    "val_soft": "The divergence on held-out tokens, at the temperature of the run's end.",
    "val_hard": "Cross-entropy with held-out text.",
    "val_kl@1": "KL(teacher || student) at T = 1 on held-out tokens, nats, as far as the targets know the "
    "teacher.",
    "val_kl@2": "The same at T = 2.",
    "val_top1": "Share of held-out tokens where the student's first choice is the teacher's.",
    "val_perplexity": "exp(val_hard).",
}

VARIABLES = {
    "PMETAL_HOME": "Folder for what can be made or fetched again: converted GGUF files, compiled "
    "CUDA kernels, mirrors of caches in object storage. By default `~/Library/Caches/pmetal-distill` on "
    "macOS, else `$XDG_CACHE_HOME/pmetal-distill`.",
    "PMETAL_KERNELS": "`auto` (default): fused kernels where the device has them; `plain`: MLX operations "
    "everywhere.",
    "PMETAL_MIRROR_GB": "Most gigabytes of remote caches kept in `PMETAL_HOME`; 32 (GiB) by default, 0 "
    "keeps none.",
    "MLX_PTX_CACHE_DIR": "Folder for the CUDA kernels that MLX compiles; by default one in `PMETAL_HOME` for "
    "each version of MLX and architecture.",
    "CUDA_HOME": "Where CUDA's headers are, if not in NVIDIA's Python packages nor in `/usr/local/cuda`.",
    "CUDA_PATH": "The same.",
    "XDG_CACHE_HOME": "See PMETAL_HOME; `~/.cache` by default.",
    "MLX_RANK": "Set by `mlx.launch`: the process is one of several.",
    "OMPI_COMM_WORLD_RANK": "Set by `mpirun` of Open MPI: the same.",
    "PMI_RANK": "Set by other MPI launchers: the same.",
    "MLX_HOSTFILE": "Set by `mlx.launch`: the ring's hosts; a ring of one is no ring.",
}

OTHERS = {
    "_PMETAL_PIPELINE_COMPLETE": "click: `bash_source`, `zsh_source` or `fish_source` prints the script "
    "that completes commands and options.",
    "HF_HOME, HF_TOKEN, HF_HUB_OFFLINE": "huggingface_hub: where models by hub id are kept, access, no "
    "network.",
    "AWS_*, GOOGLE_APPLICATION_CREDENTIALS": "pyarrow.fs: credentials, region and end point of `s3://` and "
    "`gs://`.",
}


def read_variables(sources: Sources) -> set[str]:
    """Environment variables that the packages read, found in their syntax trees."""
    return {
        name
        for module, tree in sources.trees.items()
        for node in _names(tree)
        for name in _texts(node, module, sources)
    }


def _names(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions that name a variable: arguments of environ.get and getenv, keys, what is looked up."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "os.environ.get",
            "os.getenv",
            "environ.get",
        ):
            yield node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            yield node.slice
        elif isinstance(node, ast.GeneratorExp) and "in os.environ" in ast.unparse(node.elt):
            yield node.generators[0].iter


def _texts(node: ast.expr, module: str, sources: Sources) -> Iterator[str]:
    if is_text(node):
        yield ast.literal_eval(node)
    elif isinstance(node, ast.Name):
        if (text := sources.constant(module, node.id)) is not None:
            yield text
        for statement in sources.trees[module].body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == node.id:
                value = ast.literal_eval(statement.value)
                yield from value if isinstance(value, tuple) else ()


def exit_section() -> str:
    """Exit codes, and the classes of errors with theirs."""
    classes = [
        [code(name), str(kind.exit_code), first_sentence(kind.__doc__)] for name, kind in CLASSES.items()
    ]
    return "\n\n".join(
        [
            table(["code", "meaning"], [[code(number), text] for number, text in EXIT_CODES.items()]),
            table(["class of `schemas.errors`", "code", "meaning"], classes),
        ]
    )


def metrics_section() -> str:
    """The keys of metrics.jsonl."""
    return table(["key", "meaning"], [[code(name), plain(text)] for name, text in METRICS.items()])


def variables_section() -> str:
    """Environment variables of this package, and of those below it."""
    rows = [[code(name), text] for name, text in VARIABLES.items()]
    others = [[", ".join(map(code, name.split(", "))), text] for name, text in OTHERS.items()]
    return (
        table(["variable", "meaning"], rows)
        + "\n\nRead by the libraries below:\n\n"
        + table(["variable", "meaning"], others)
    )
