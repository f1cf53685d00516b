"""Models: loading, hidden states and logits of any mlx-lm model, saving, fingerprints.

The only importer of mlx_lm, which takes seconds to import and is imported on first use. Loading costs the
read of the weights and five forward passes of 8 to 36 tokens, or up to nine where documents cannot share a
sequence, that find and verify where the body ends and the head begins. On the CPU everything runs in float32:
half-precision products are 30 to 60 times slower there.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from pmetal_distill import kernel_warmup
from pmetal_distill.device import on_cpu
from pmetal_distill.gguf import RECORD, conversion_record, convert_gguf, file_sha256
from pmetal_distill.home import cache_home
from pmetal_distill.kernel_folder import kernel_folder
from pmetal_distill.modelling.anatomy import CacheKind, examine
from pmetal_distill.modelling.configs import read_config
from pmetal_distill.modelling.evidence import Probe, vocabulary
from pmetal_distill.modelling.fingerprints import (
    chat_template_fingerprint,
    compare_tokenizers,
    folder_fingerprint,
    tensors_fingerprint,
    tokenizer_fingerprint,
)
from pmetal_distill.modelling.folders import new_folder
from pmetal_distill.modelling.heads import LinearHead
from pmetal_distill.modelling.loaded import Hidden, LoadedModel
from pmetal_distill.modelling.overflow import first_overflowing_layer, overflow
from pmetal_distill.modelling.sharding import shard_model
from pmetal_distill.precision import (
    TeacherType,
    Types,
    cast_model,
    dtype_name,
    float_types,
    main_type,
    stored_weights,
    teacher_type,
)
from schemas.errors import ModelError

__all__ = [
    "Hidden",
    "LinearHead",
    "LoadedModel",
    "build_model",
    "cache_home",
    "chat_template_fingerprint",
    "compare_tokenizers",
    "load_model",
    "load_tokenizer",
    "locate_model",
    "model_fingerprint",
    "open_model",
    "save_model",
    "tokenizer_fingerprint",
    "wrap_model",
    "write_model_files",
]

kernel_folder()  # before MLX builds its first kernel
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "*.tiktoken")


def wrap_model(
    model: nn.Module,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    source: str = "a model in memory",
    folder: Path | None = None,
    stored: Types | None = None,
) -> LoadedModel:
    """Takes a model that is already in memory apart.

    Args:
        model: of mlx-lm.
        tokenizer: mlx-lm's wrapper of it.
        config: its configuration.
        source: what messages call it.
        folder: the mlx-lm folder it was loaded from.
        stored: types of its parameters on disk; their own if None.

    Raises:
        ModelError: it cannot be called, or is not causal, or float16 is too narrow for it.
    """
    from mlx_lm.models.cache import make_prompt_cache

    for module in model.modules():
        if "_no_grad" not in vars(module):  # RecurrentGemma's model leaves out nn.Module's own __init__
            vars(module).update(_no_grad=set(), _training=False)
    try:
        kinds = [_cache_kind(cache) for cache in make_prompt_cache(model)]
        anatomy = examine(model, kinds, dict(config), source=source, caches=lambda: make_prompt_cache(model))
    except ModelError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{source}: the model loads, but fails on a few tokens ({error})") from error
    stored = float_types(model) if stored is None else stored
    loaded = LoadedModel(model, tokenizer, dict(config), source, folder, anatomy, stored)
    _require_range(loaded)
    return loaded


def _cache_kind(cache: Any) -> CacheKind:
    parts = tuple(_cache_kind(part) for part in getattr(cache, "caches", ()))
    return CacheKind(type(cache).__name__, getattr(cache, "max_size", None), parts)


def _require_range(loaded: LoadedModel) -> None:
    """A model that gives no numbers cannot be split either, so that others cost no pass."""
    layer = (
        None
        if loaded.splits
        else first_overflowing_layer(loaded, Probe.below(vocabulary(loaded.config)).alone)
    )
    if layer is not None:
        raise ModelError(f"{loaded.source}: {overflow(layer)}")


def load_model(
    path_or_repo: str | Path,
    *,
    dtype: TeacherType = "auto",
    trust_remote_code: bool = False,
    group: mx.distributed.Group | None = None,
    on_tokenizer: Callable[[Any], None] | None = None,
) -> LoadedModel:
    """Loads a model and takes it apart.

    Args:
        path_or_repo: an mlx-lm folder, a hub id "owner/name", or a llama-architecture .gguf file, which is
            converted once into `cache_home()`.
        dtype: of the weights in memory: float32, bfloat16, float16, or "auto" for what `precision` says is
            right on this device. `LoadedModel.stored` remembers the types on disk.
        trust_remote_code: whether Python code that comes with the model may run.
        group: processes that each load a share of it; all of them must make the same calls.
        on_tokenizer: is given the tokenizer before the weights are read, which may take minutes.

    Raises:
        ModelError: missing, not a model, of an unsupported kind, damaged, without a tokenizer, or not to be
            split over `group`.
        UsageError: no such dtype.
    """
    source = str(path_or_repo)
    folder = locate_model(path_or_repo, dtype=dtype)
    config = read_config(folder)
    _require_tokenizer_files(folder)
    model, config = open_model(folder, source=source, lazy=True, trust_remote_code=trust_remote_code)
    if group is not None:
        shard_model(model, config, group, source=source)
    tokenizer = load_tokenizer(
        folder, trust_remote_code=trust_remote_code, eos_token_ids=config.get("eos_token_id")
    )
    if on_tokenizer is not None:
        on_tokenizer(tokenizer)
    stored = float_types(model)
    _read_weights(model, teacher_type(dtype, main_type(stored)), main_type(stored), source)
    return wrap_model(model, tokenizer, config, source=source, folder=folder, stored=stored)


def _read_weights(model: nn.Module, wanted: mx.Dtype, stored: mx.Dtype, source: str) -> None:
    if wanted != stored or on_cpu():
        cast_model(model, wanted, exact=wanted == mx.float32)
    kernel_warmup.begin([dtype_name(wanted)])
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise _unloadable(source, error) from error
    kernel_warmup.wait()


def locate_model(path_or_repo: str | Path, *, dtype: TeacherType = "auto") -> Path:
    """The local mlx-lm folder of a model: as given, downloaded, or converted from a .gguf file.

    Args:
        path_or_repo: as for `load_model`.
        dtype: of the weights that a .gguf file is converted to.

    Raises:
        ModelError: there is none.
    """
    path = Path(path_or_repo).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _converted(path, dtype_name(teacher_type(dtype, mx.float32)))
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path}: a model must be a folder or a .gguf file, found another file")
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(str(path_or_repo)):
        raise ModelError(
            f"{path}: no such file or folder; give an mlx-lm folder, a hub id 'owner/name' or a .gguf file"
        )
    return _downloaded(str(path_or_repo))


def _converted(path: Path, dtype: str) -> Path:
    name = f"{path.stem}-{dtype}-{file_sha256(path)[:16]}"
    return convert_gguf(path, cache_home() / "gguf" / name, dtype=dtype)


def _downloaded(repo: str) -> Path:
    from mlx_lm.utils import _download

    try:
        return Path(_download(repo))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(
            f"{repo}: no such folder, and the hub does not give it ({reason}); "
            "check the name and the connection, or give a local folder"
        ) from error


def _require_tokenizer_files(folder: Path) -> None:
    if not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{folder}: no tokenizer (tokenizer.json or tokenizer.model); copy it beside the weights"
        )


def open_model(
    folder: Path, *, source: str, lazy: bool = False, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and configuration of an mlx-lm folder, not taken apart; `lazy` leaves the weights unread.

    Raises:
        ModelError: mlx_lm cannot load it; `source` is what the message calls it.
    """
    from mlx_lm.utils import load_model as load

    try:
        model, config = load(folder, lazy=lazy, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise _unloadable(source, error) from error
    return model, config


def _unloadable(source: str, error: Exception) -> ModelError:
    return ModelError(f"{source}: mlx_lm cannot load it ({_first_line(error)}); see that the folder is whole")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False, eos_token_ids: Any = None) -> Any:
    """Loads only the tokenizer of an mlx-lm folder.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from mlx_lm.utils import load_tokenizer as load

    _require_tokenizer_files(folder)
    try:
        return load(folder, {"trust_remote_code": trust_remote_code}, eos_token_ids=eos_token_ids)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(
            f"{folder}: the tokenizer cannot be read ({_first_line(error)}); copy it again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """A model of an architecture that mlx-lm knows, with MLX's own random initialisation.

    Raises:
        ModelError: unknown `model_type`, or keys that it needs are missing.
    """
    from mlx_lm.utils import _get_classes

    try:
        model_class, args_class = _get_classes(dict(config))
        model: nn.Module = model_class(args_class.from_dict(dict(config)))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ZeroDivisionError) as error:
        raise ModelError(f"config: mlx_lm cannot build this model ({_first_line(error)})") from error
    model.eval()
    return model


def save_model(
    model: LoadedModel | nn.Module,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    config: Mapping[str, Any] | None = None,
    weights: Mapping[str, mx.array] | None = None,
) -> Path:
    """Writes a folder that `mlx_lm.load` and `mlx_lm.generate` read. It appears whole or not at all.

    A loaded model is written in the types it had on disk, whatever it was trained in.

    Args:
        model: a loaded model, or a plain one with `tokenizer` and `config`.
        folder: must be missing or empty.
        tokenizer: instead of the loaded model's.
        config: instead of the loaded model's.
        weights: instead of the model's parameters.

    Returns:
        `folder`.

    Raises:
        UsageError: the folder is in use.
    """
    loaded = model if isinstance(model, LoadedModel) else None
    module = model.model if isinstance(model, LoadedModel) else model
    tokenizer = tokenizer if tokenizer is not None or loaded is None else loaded.tokenizer
    config = config if config is not None or loaded is None else loaded.config
    if tokenizer is None or config is None:
        raise TypeError("save_model: a plain model needs tokenizer and config")
    weights = dict(tree_flatten(module.parameters())) if weights is None else weights
    if loaded is not None:
        weights = stored_weights(weights, loaded.stored)
    with new_folder(Path(folder)) as draft:
        write_model_files(draft, weights, tokenizer, config)
        if loaded and loaded.folder and config.get("model_file"):
            for path in loaded.folder.glob("*.py"):
                shutil.copy(path, draft)
    return Path(folder)


def write_model_files(
    folder: Path, weights: Mapping[str, mx.array], tokenizer: Any, config: Mapping[str, Any]
) -> None:
    """Writes weights (in files of at most 5 GB), config and tokenizer into an existing folder."""
    from mlx_lm.utils import make_shards, save_config

    shards = make_shards(dict(weights))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    save_config(dict(config), folder / "config.json")
    tokenizer.save_pretrained(folder)


def model_fingerprint(loaded: LoadedModel) -> str:
    """SHA-256 that identifies the weights and the architecture, hex.

    Of a model from a folder, over its weight files as they are on disk; of a converted .gguf, of the .gguf
    file's bytes; of a model made in memory, over its tensors.
    """
    if loaded.folder is not None:
        record = conversion_record(loaded.folder) if (loaded.folder / RECORD).exists() else None
        return str(record["sha256"]) if record else folder_fingerprint(loaded.folder, loaded.config)
    tensors: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    return tensors_fingerprint(
        ((name, _tensor_bytes(tensors[name])) for name in sorted(tensors)), loaded.config
    )


def _tensor_bytes(tensor: mx.array) -> bytes:
    header = f"{tensor.dtype} {tensor.shape}".encode()
    data = tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor
    return header + np.ascontiguousarray(np.array(data)).tobytes()
