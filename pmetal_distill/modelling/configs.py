"""`config.json` of models, read and bounded before anything is built from it. Costs a walk over its values.

A model of a billion layers is a line of JSON, and mlx_lm makes the layers before it looks at the weights.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pmetal_distill.plain_files import json_object, open_regular
from schemas.errors import ModelError

MAX_BYTES = 1 << 24
MAX_DEPTH = 32
MOST = {
    "vocab_size": 1 << 24,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 1 << 18),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "n_inner"), 1 << 22),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1 << 12),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 1 << 14),
    "head_dim": 1 << 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 1 << 16),
}
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder.

    Raises:
        ModelError: there is none, it is not JSON, names no architecture, or sizes that no model has.
    """
    path = folder / "config.json"
    try:
        with open_regular(path) as file:
            config = json_object(file.read(MAX_BYTES))
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a model (no config.json); give a folder that mlx_lm loads") from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: not JSON that names a model_type ({error}); copy or download the model again"
        ) from error
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: names no model_type; give a folder that mlx_lm loads")
    check_config(config, where=str(path))
    return config


def check_config(config: Mapping[str, Any], *, where: str) -> None:
    """Refuses sizes that no model has, wherever they stand in a configuration.

    Raises:
        ModelError: names the key.
    """
    for name, value, depth in _values(config):
        if depth > MAX_DEPTH:
            raise ModelError(
                f"{where}: must have at most {MAX_DEPTH} levels, found more; give the config.json of a model"
            )
        least = 1 if depth == 1 and name in NEEDED else 0
        if name not in MOST or value is None or isinstance(value, bool | str | list | dict):
            continue
        if not least <= value <= MOST[name]:
            raise ModelError(
                f"{where}: {name!r} must be from {least} to {MOST[name]:,}, found {str(value)[:40]}; "
                "give the config.json of a model"
            )


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Key, value and level of everything that stands in mappings, without recursion."""
    left: list[tuple[Any, int]] = [(config, 1)]
    while left:
        value, depth = left.pop()
        for name, item in value.items() if isinstance(value, Mapping) else (("", item) for item in value):
            yield name, item, depth
            if isinstance(item, Mapping | list) and depth <= MAX_DEPTH:
                left.append((item, depth + 1))
