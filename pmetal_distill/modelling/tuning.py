"""mlx-lm's LoRA and DoRA layers. Importing mlx_lm takes seconds and happens on first use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn


def adaptable_layers(module: nn.Module) -> list[str]:
    """Paths of the layers inside `module` that mlx-lm gives adapters."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (
        *(nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding),
        *(SwitchLinear, QuantizedSwitchLinear),
    )
    return [
        path for path, part in module.named_modules() if hasattr(part, "to_lora") or isinstance(part, kinds)
    ]


def insert_adapters(model: nn.Module, num_layers: int, parameters: Mapping[str, Any], *, dora: bool) -> None:
    """Wraps layers of the last blocks in place, as `mlx_lm.lora` does.

    Args:
        model: an mlx-lm model.
        num_layers: how many of the last blocks; -1 for all.
        parameters: `rank`, `scale`, `dropout`, and `keys` if only some layers are meant.
        dora: DoRA instead of LoRA.

    Raises:
        ValueError: a layer of a kind that has no such adapter.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    linear_to_lora_layers(model, num_layers, dict(parameters), use_dora=dora)


def load_adapter_folder(model: nn.Module, folder: Path) -> None:
    """Inserts the adapters of a folder with `adapter_config.json` and `adapters.safetensors`.

    Raises:
        ValueError: the adapters do not fit the model.
    """
    from mlx_lm.tuner.utils import load_adapters

    load_adapters(model, str(folder))


def merged_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path of each adapted layer -> one layer that computes the same, quantized where its base is.

    Copies: the model keeps its adapters.
    """
    return {path: part.fuse() for path, part in model.named_modules() if hasattr(part, "fuse")}


def is_quantized(module: nn.Module) -> bool:
    """Whether any layer inside is quantized."""
    return any("scales" in part and hasattr(part, "bits") for part in module.modules())
