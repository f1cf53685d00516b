"""The model card: valid front matter, the run's own facts, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.settings import LoraParameters, TrainSettings
from pipeline.training.card import Use, model_card
from pmetal_distill.schedule import TemperatureSchedule

FACTS = {"teacher": "some/teacher", "teacher_sha256": "ab" * 32, "data": "a|b.jsonl", "data_sha256": ""}


def card(use: Use = Use.MODEL_HERE, metrics: dict[str, Any] | None = None, **changes: Any) -> str:
    values = {"student": "some/student", "cache": Path("c"), "out": Path("runs/one")} | changes
    return model_card(TrainSettings(**values), FACTS, metrics or {}, use)


def front_of(text: str) -> Any:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def rows_of(text: str) -> dict[str, str]:
    rows = [
        line[2:-2].split(" | ", 1)
        for line in text.splitlines()
        if line.startswith("| ") and " | " in line[2:-2]
    ]
    return {row[0]: row[1] for row in rows}


def test_front_matter(tmp_path: Path) -> None:
    front = front_of(card())
    assert front["library_name"] == "mlx"
    assert front["base_model"] == "some/student"
    assert front["base_model_relation"] == "finetune"
    assert {"mlx", "distillation"} <= set(front["tags"])
    assert front_of(card(Use.ADAPTERS_HERE, fine_tune_type="lora"))["base_model_relation"] == "adapter"
    assert front_of(card(student=str(tmp_path)))["base_model"] == tmp_path.name
    huggingface_hub = pytest.importorskip("huggingface_hub")
    parsed = huggingface_hub.ModelCard(card()).data
    assert (parsed.library_name, parsed.base_model) == ("mlx", "some/student")


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (Use.MODEL_HERE, "--model . --prompt"),
        (Use.MODEL_INSIDE, "--model model --prompt"),
        (Use.ADAPTERS_HERE, "--model some/student --adapter-path . --prompt"),
    ],
)
def test_the_command(use: Use, words: str) -> None:
    assert f"\nmlx_lm.generate {words}" in card(use)


def test_the_command_names_where_a_local_student_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my student").mkdir()
    monkeypatch.chdir(tmp_path)
    text = card(Use.ADAPTERS_HERE, student="my student")
    assert f"--model '{tmp_path}/my student' --adapter-path ." in text


def test_facts_and_settings() -> None:
    text = card(temperature=TemperatureSchedule.linear(start=4.0, end=1.0, steps=100), learning_rate=3e-4)
    assert "`some/student`, distilled from `some/teacher` with pmetal-distill" in text
    rows = rows_of(text)
    assert rows["teacher_sha256"] == "ab" * 32
    assert rows["data"] == r"a\|b.jsonl"
    assert rows["learning_rate"] == "0.0003"
    assert json.loads(rows["temperature"])["start"] == 4.0
    assert "data_sha256" not in rows
    assert (
        not {"hidden_weight", "lora_parameters", "loss_parameter", "tail", "optimizer_config"} & rows.keys()
    )
    adapted = rows_of(card(fine_tune_type="dora", lora_parameters=LoraParameters(rank=4), hidden_loss="mse"))
    assert adapted["fine_tune_type"] == "dora"
    assert adapted["lora_parameters"].startswith('{"rank": 4, ')
    assert adapted["hidden_weight"] == "0.1"


def test_results_are_the_metrics_and_nothing_else() -> None:
    text = card(metrics={"iteration": 1200, "loss": 1.23456, "model": "a path", "done": True})
    results = text[text.index("## Results") :]
    assert rows_of(results) == {"iteration": "1,200", "loss": "1.235"}
    assert "held out" not in results
    assert "those with `val_` on text held out of it" in card(metrics={"val_kl@1": 0.5})
    assert "None were measured." in card()
