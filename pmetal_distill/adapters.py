"""What of a student is trained: everything, its last blocks, or LoRA and DoRA adapters in mlx-lm's files.

Adapters cost rank x (inputs + outputs) weights a layer; everything else stays frozen, and may be quantized.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from pmetal_distill.losses.head import HeadParts
from pmetal_distill.modelling.evidence import FAILURES, Probe
from pmetal_distill.modelling.randomness import seeded
from pmetal_distill.modelling.tuning import (
    adaptable_layers,
    insert_adapters,
    is_quantized,
    load_adapter_folder,
    merged_layers,
)
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.precision import TeacherType
from schemas.errors import ModelError, UsageError

ADAPTERS, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"
_DORA_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Which adapters.

    Attributes:
        kind: low-rank updates, or these with trained magnitudes.
        rank: of the updates, at least 1.
        scale: factor on what they add.
        dropout: share of their input that is dropped in training, in [0, 1).
        keys: layers that get one, named from within a block ("self_attn.q_proj") or the model ("lm_head");
            None for all linear layers in the blocks.
        num_layers: how many of the last blocks get them; -1 for all.
    """

    kind: Literal["lora", "dora"] = "lora"
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: Sequence[str] | None = None
    num_layers: int = -1

    def config(self) -> dict[str, Any]:
        """The keys that `adapter_config.json` needs."""
        parameters: dict[str, Any] = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}
        if self.keys is not None:
            parameters["keys"] = list(self.keys)
        return {
            "fine_tune_type": self.kind,
            "num_layers": self.num_layers,
            "lora_parameters": parameters,
        }


def require_trainable(loaded: LoadedModel) -> None:
    """Sees that MLX can tell which parameters of a model are trained.

    Raises:
        ModelError: a class in it is no complete `nn.Module`, put in after loading, which mends such.
    """
    try:
        loaded.model.trainable_parameters()
    except AttributeError as error:
        raise ModelError(
            f"{loaded.source}: a student must be of a class that MLX can train, found {type(loaded.model)} "
            f"of mlx-lm, where {error}; take a student of another architecture"
        ) from error


def require_dense(loaded: LoadedModel, part: nn.Module | None = None) -> None:
    """Sees that weights can be trained: of `part`, or of the whole model.

    Raises:
        UsageError: a layer is quantized.
    """
    if is_quantized(part if part is not None else loaded.model):
        raise UsageError(
            f"{loaded.source}: weights that are trained must not be quantized, found quantized layers; train "
            "adapters (fine_tune_type lora or dora), or take the model before quantization"
        )


def train_last_blocks(loaded: LoadedModel, num_layers: int) -> None:
    """Freezes all but the last `num_layers` blocks.

    Raises:
        UsageError: there are not so many, or one is quantized.
    """
    _check_num_layers(loaded, num_layers)
    blocks = loaded.model.layers[-num_layers:]
    loaded.model.freeze()
    for block in blocks:
        require_dense(loaded, block)
        block.unfreeze()


def add_adapters(loaded: LoadedModel, spec: AdapterSpec, *, seed: int) -> LoadedModel:
    """Freezes a model and puts new adapters, which change nothing yet, into it.

    Args:
        loaded: is changed in place; use only the returned one afterwards.
        spec: which adapters.
        seed: of their weights; the same as `mlx_lm.lora --seed` gives. The global random state is left alone.

    Raises:
        UsageError: layers that do not exist or cannot have such an adapter.
    """
    if spec.num_layers != -1:
        _check_num_layers(loaded, spec.num_layers)
    _check_keys(loaded, spec)
    loaded.model.freeze()
    try:
        with seeded(seed):
            insert_adapters(
                loaded.model, spec.num_layers, spec.config()["lora_parameters"], dora=spec.kind == "dora"
            )
    except ValueError as error:
        raise UsageError(f"lora_parameters: {error}; leave these layers out of 'keys'") from error
    if not adapter_weights(loaded.model):
        raise UsageError(
            f"lora_parameters: no layer in the last {spec.num_layers} blocks has one of these keys"
        )
    loaded.model.eval()
    _require_running(loaded)
    adapted = _with_current_head(loaded)
    if adapted.head is not None:
        HeadParts.of(adapted.head)
    return adapted


def _require_running(loaded: LoadedModel) -> None:
    """Some architectures read the weights of a layer, which one with an adapter does not have."""
    try:
        mx.eval(loaded.full(Probe.below(loaded.vocab_size).alone))
    except FAILURES as error:
        raise UsageError(
            f"lora_parameters: {loaded.source} must run with its adapters, found that it fails ({error}), as "
            "in mlx_lm; name other layers in 'keys', such as self_attn.q_proj"
        ) from error


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trained parameters by name: what `adapters.safetensors` holds."""
    return dict(tree_flatten(model.trainable_parameters()))


def load_adapter_weights(loaded: LoadedModel, path: Path, *, spec: AdapterSpec | None = None) -> list[str]:
    """Sets trained parameters from a file.

    Args:
        loaded: with the adapters in place, or whatever else is trained.
        path: a .safetensors file.
        spec: if given, an `adapter_config.json` beside the file must agree with it.

    Returns:
        names of the trained parameters that the file does not have.

    Raises:
        UsageError: unreadable, or made for other adapters.
    """
    if spec is not None:
        _check_same_adapters(path, spec)
    try:
        tensors: Any = mx.load(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"{path}: must be an {ADAPTERS}, found something else ({error}); give the file itself"
        ) from error
    trained = adapter_weights(loaded.model)
    for name, tensor in tensors.items():
        found = trained[name].shape if name in trained else "no such parameter"
        if tensor.shape != found:
            raise UsageError(
                f"{path}: {name} must be trained here with the shape it has, {tensor.shape}, found {found}; "
                "give the fine_tune_type, num_layers and lora_parameters it was made with"
            )
    loaded.model.load_weights([(n, t.astype(trained[n].dtype)) for n, t in tensors.items()], strict=False)
    return sorted(trained.keys() - tensors.keys())


def save_adapters(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> None:
    """Writes `adapters.safetensors` and `adapter_config.json`, each whole or not at all.

    Args:
        model: with adapters.
        folder: exists.
        config: `AdapterSpec.config()`, `model`, and whatever else is worth knowing.
    """
    draft = folder / f".{ADAPTERS}.part.safetensors"
    mx.save_safetensors(str(draft), adapter_weights(model))
    draft.replace(folder / ADAPTERS)
    draft = folder / f".{ADAPTER_CONFIG}.part"
    draft.write_text(json.dumps(dict(sorted(config.items())), indent=4), encoding="utf-8")
    draft.replace(folder / ADAPTER_CONFIG)


def load_adapted(
    folder: str | Path, *, dtype: TeacherType = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """The model that `adapter_config.json` names, with the adapters of the folder.

    Args:
        folder: with `adapter_config.json` and `adapters.safetensors`.
        dtype: of the model, as for `load_model`.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        ModelError: the model cannot be loaded, or the adapters do not fit it.
    """
    folder = Path(folder)
    try:
        model = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG}: must name a model ({error}); train again") from error
    loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        load_adapter_folder(loaded.model, folder)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{folder}: the adapters do not fit {model} ({error}); train again") from error
    loaded.model.eval()
    return replace(_with_current_head(loaded), source=str(folder))


def merged_weights(model: nn.Module) -> dict[str, mx.array]:
    """All weights by name, adapters merged in as `mlx_lm.fuse` does it; the model keeps its adapters."""
    merged = merged_layers(model)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    prefixes = tuple(f"{path}." for path in merged)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}
    for path, layer in merged.items():
        inside: dict[str, mx.array] = dict(tree_flatten(layer.parameters()))
        kept |= {f"{path}.{name}": tensor for name, tensor in inside.items()}
    return kept


def _check_num_layers(loaded: LoadedModel, num_layers: int) -> None:
    if not 1 <= num_layers <= loaded.num_layers:
        raise UsageError(
            f"num_layers: must be from 1 to {loaded.num_layers}, which {loaded.source} has, or -1 for all, "
            f"found {num_layers}"
        )


def _check_keys(loaded: LoadedModel, spec: AdapterSpec) -> None:
    layers = {path for block in loaded.model.layers for path in adaptable_layers(block)}
    everywhere = layers | set(adaptable_layers(loaded.model))
    for key in spec.keys if spec.keys is not None else ():
        if key not in everywhere:
            near = difflib.get_close_matches(key, sorted(everywhere), n=3, cutoff=0.3)
            raise UsageError(
                f"lora_parameters: keys must name linear or embedding layers, found {key!r}; "
                f"{loaded.source} has {', '.join(near or sorted(layers))}"
            )
    if not (layers if spec.keys is None else spec.keys):
        raise UsageError("lora_parameters: keys must name a layer, found none; leave them out for all")
    if spec.kind == "dora":
        _check_dora(loaded, spec)


def _check_dora(loaded: LoadedModel, spec: AdapterSpec) -> None:
    """mlx-lm's DoRA layers take their width wrongly from some packed weights."""
    blocks = loaded.model.layers
    wanted = [m for b in blocks for k, m in b.named_modules() if spec.keys is None or k in spec.keys]
    wanted += [m for k, m in loaded.model.named_modules() if k in (spec.keys or ())]
    for module in wanted:
        odd = isinstance(module, nn.QuantizedLinear) and module.bits not in _DORA_BITS
        if odd or isinstance(module, nn.QuantizedEmbedding):
            raise UsageError(
                f"fine_tune_type: dora takes linear layers of 2, 4 or 8 bits, found in {loaded.source} a "
                f"{type(module).__name__} of {module.bits} bits; choose lora"
            )


def _check_same_adapters(path: Path, spec: AdapterSpec) -> None:
    beside = path.parent / ADAPTER_CONFIG
    if not beside.is_file():
        return
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        found = (config.get("fine_tune_type", "lora"), config["lora_parameters"]["scale"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{beside}: must describe the adapters ({error!r}); remove it or mend it") from error
    if found != (spec.kind, spec.scale):
        raise UsageError(
            f"{path}: must be {spec.kind} adapters of scale {spec.scale:g}, found {found[0]} of scale "
            f"{found[1]}; give the fine_tune_type and lora_parameters they were made with"
        )


def _with_current_head(loaded: LoadedModel) -> LoadedModel:
    """The head's module may have been wrapped; the rest of the anatomy is as it was."""
    head = loaded.head
    if head is None:
        return loaded
    module = dict(loaded.model.named_modules())[head.path]
    return replace(loaded, anatomy=replace(loaded.anatomy, head=replace(head, module=module)))
