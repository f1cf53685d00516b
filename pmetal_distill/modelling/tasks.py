"""Benchmarks of the lm-evaluation-harness through mlx-lm's own adapter. Costs what the tasks cost."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from schemas.errors import UsageError


def require_harness() -> None:
    """Raises UsageError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "--tasks: the lm-evaluation-harness must be installed, found no module lm_eval; "
            "run 'pip install lm-eval', or leave out --tasks"
        )


def run_tasks(
    folder: Path, tasks: Sequence[str], *, limit: int | None, batch_size: int, seed: int = 123
) -> Mapping[str, Mapping[str, Any]]:
    """The harness's results by task, as `mlx_lm.evaluate` gives them.

    Args:
        folder: an mlx-lm model.
        tasks: names that the harness knows; their data comes from the network or its cache.
        limit: examples a task; None for all.
        batch_size: prompts at a time.
        seed: of few-shot examples and sampling; the default is that of mlx_lm.evaluate.

    Raises:
        UsageError: the harness is not installed, or cannot run a task.
    """
    require_harness()
    from mlx_lm.evaluate import MLXLM

    harness: Any = importlib.import_module("lm_eval")
    model = MLXLM(str(folder), batch_size=batch_size)
    try:
        found = harness.simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            apply_chat_template=model.use_chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"--tasks: the lm-evaluation-harness must be able to run {', '.join(tasks)}, found {error!r}; "
            "'lm-eval --tasks list' lists what it knows"
        ) from error
    results: Mapping[str, Mapping[str, Any]] = found["results"]
    return results
