"""Which floating-point types a model is kept, multiplied and updated in. The one place that decides it.

                        weights at rest     multiplied in       updated in   saved in
    teacher             --dtype             --dtype             never        never
    student, mixed      float32 masters     bfloat16            float32      its own type
    student, bfloat16   bfloat16            bfloat16            bfloat16     its own type
    student, float32    float32             float32             float32      its own type

On the CPU everything is multiplied in float32, since half-precision products are 30 to 60 times slower there,
unless another type is asked for by name. On a GPU a teacher keeps the type of its file; one stored in float32
(or dequantized from a .gguf) becomes bfloat16, five times the speed of float32 on an H100 for a KL of 0.0013
nats to it (docs/precision.md). float16 is closer still, but real activations come near its largest number.

Why masters: a bfloat16 weight keeps 8 bits, so a weight of 0.5 does not move by less than 0.002, and most
updates are smaller: they add up in float32 and are lost in bfloat16. float16 cannot hold AdamW's eps of 1e-8.
Gradients below 6e-8 are 0 in float16, so a float16 student is multiplied in bfloat16 and saved in float16.

Mixed costs 4 bytes a trained weight for the master and 2 for the copy it is multiplied in, made at each step.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from pmetal_distill.device import on_cpu
from schemas.errors import UsageError

TeacherType = Literal["auto", "float32", "bfloat16", "float16"]
StudentPrecision = Literal["mixed", "bfloat16", "float32"]
Types = Mapping[str, mx.Dtype]

DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
HALF = (mx.bfloat16, mx.float16)
PRECISIONS: tuple[str, ...] = get_args(StudentPrecision)


def dtype_name(dtype: mx.Dtype) -> str:
    """`mx.bfloat16` -> "bfloat16"."""
    return str(dtype).rpartition(".")[2]


def float_types(model: nn.Module) -> dict[str, mx.Dtype]:
    """The type of every floating-point parameter, by name."""
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    return {name: a.dtype for name, a in parameters if mx.issubdtype(a.dtype, mx.floating)}


def main_type(types: Types) -> mx.Dtype:
    """The type of most parameters; float32 where there are none."""
    common = Counter(types.values()).most_common(1)
    return common[0][0] if common else mx.float32


def teacher_type(wanted: TeacherType, stored: mx.Dtype) -> mx.Dtype:
    """The type that a model which is only read computes in.

    Args:
        wanted: a type by name, or "auto" for what is right on this device.
        stored: of its weights on disk.

    Raises:
        UsageError: no such type.
    """
    if wanted not in ("auto", *DTYPES):
        raise UsageError(f"dtype: must be auto, float32, bfloat16 or float16, found {wanted!r}; correct it")
    if wanted != "auto":
        return DTYPES[wanted]
    if on_cpu():
        return mx.float32
    return stored if stored in HALF else mx.bfloat16


def cast_model(model: nn.Module, dtype: mx.Dtype, *, exact: bool) -> None:
    """Sets the type of a model's floating-point parameters, in place.

    Args:
        model: of mlx-lm.
        dtype: the new type.
        exact: all of them; else a model may keep what it declares to need float32 (`cast_predicate`: the
            routers' corrections of some mixtures of experts).
    """
    keeps = getattr(model, "cast_predicate", None)

    def cast_one(name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if floating and (exact or keeps is None or keeps(name)) else array

    model.update(tree_map_with_path(cast_one, model.parameters()))


@dataclass(frozen=True, slots=True, eq=False)
class Precision:
    """How a student is trained.

    Attributes:
        name: mixed, bfloat16 or float32.
        master: the type of the trained weights and of the optimizer's state.
        compute: the type they are multiplied in.
        stored: the type the model is saved in.
        copies: names of the trained parameters that are multiplied in `compute`, which is not their own type.
    """

    name: StudentPrecision
    master: mx.Dtype
    compute: mx.Dtype
    stored: mx.Dtype
    copies: frozenset[str] = frozenset()

    def describe(self) -> dict[str, str]:
        """Names of the types, for records and people."""
        types = {"master": self.master, "compute": self.compute, "stored": self.stored}
        return {"name": self.name, **{key: dtype_name(value) for key, value in types.items()}}

    def computing(self, model: nn.Module) -> nn.Module:
        """`model` as it is multiplied: a copy of its structure, trained weights cast to the compute type.

        Call it inside the function that is differentiated: gradients flow through the casts into the masters,
        in float32. Embeddings are looked up in their masters and the rows found are cast, for their gradient
        is a sum over every place where a token stands: a thousand of these in bfloat16 lose the small ones.
        """
        return cast(nn.Module, _View(self.copies, self.compute).of(model, "")) if self.copies else model


def precision_text(precision: Precision) -> str:
    """One line about a run's types."""
    names = precision.describe()
    if precision.master == precision.compute:
        types = f"weights, optimizer and products in {names['compute']}"
    else:
        types = f"{names['master']} weights and optimizer, products in {names['compute']}"
    return f"{precision.name} ({types}; saved in {names['stored']})"


def policy_text() -> str:
    """What this device's defaults are, for `--version -v`."""
    if on_cpu():
        return "float32 throughout; students are saved in their own type"
    return (
        "teachers in their own half precision, else bfloat16; students of half precision mixed: float32 "
        "masters, products in bfloat16, saved in their own type"
    )


def choose_precision(wanted: StudentPrecision | None, stored: Types) -> StudentPrecision:
    """The precision of a run: as asked for; mixed where weights are stored in half precision, else float32.

    Raises:
        UsageError: no such precision.
    """
    if wanted is not None and wanted not in PRECISIONS:
        raise UsageError(f"precision: must be {', '.join(PRECISIONS)}, found {wanted!r}; correct it")
    if wanted is not None:
        return wanted
    return "mixed" if main_type(stored) in HALF else "float32"


def prepare_weights(model: nn.Module, wanted: StudentPrecision | None, stored: Types) -> Precision:
    """Brings a student's weights into the types of a precision, in place.

    Args:
        model: with what is trained unfrozen.
        wanted: None for the default, see `choose_precision`.
        stored: the types of its parameters on disk.

    Raises:
        UsageError: no such precision.
    """
    name = choose_precision(wanted, stored or float_types(model))
    own = main_type(stored or float_types(model))
    master = mx.bfloat16 if name == "bfloat16" else mx.float32
    compute = mx.float32 if name == "float32" or (name == "mixed" and on_cpu()) else mx.bfloat16
    trained = dict(cast(list[tuple[str, mx.array]], tree_flatten(model.trainable_parameters())))
    kept = _kept_in_float32(model, stored)

    def set_type(path: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating) or (path in kept and array.dtype == mx.float32):
            return array
        return array.astype(master if path in trained else compute)

    model.update(tree_map_with_path(set_type, model.parameters()))
    copies = frozenset() if compute == master else frozenset(trained) - kept
    return Precision(name, master, compute, own, copies)


def _kept_in_float32(model: nn.Module, stored: Types) -> set[str]:
    """Parameters that a model of half precision keeps in float32 on purpose."""
    keeps: Callable[[str], bool] = getattr(model, "cast_predicate", None) or (lambda name: True)
    half = main_type(stored) in HALF
    return {name for name, dtype in stored.items() if not keeps(name) or (half and dtype == mx.float32)}


def stored_weights(weights: Mapping[str, mx.array], stored: Types) -> dict[str, mx.array]:
    """Weights in the types they have on disk; those without one stay as they are."""
    return {
        name: array if stored.get(name, array.dtype) == array.dtype else array.astype(stored[name])
        for name, array in weights.items()
    }


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """Copies a model's structure; `seen` keeps a module that stands in two places one module."""

    copies: frozenset[str]
    compute: mx.Dtype
    seen: dict[int, nn.Module] = field(default_factory=dict)

    def of(self, part: Any, path: str) -> Any:
        if isinstance(part, nn.Module):
            if id(part) not in self.seen:
                self.seen[id(part)] = self._module(part, path)
            return self.seen[id(part)]
        if isinstance(part, dict):
            return {key: self.of(value, _join(path, key)) for key, value in part.items()}
        if isinstance(part, list):
            return [self.of(value, _join(path, str(i))) for i, value in enumerate(part)]
        return part.astype(self.compute) if path in self.copies else part

    def _module(self, module: nn.Module, path: str) -> nn.Module:
        kind = type(module)
        looked_up = kind is nn.Embedding and _join(path, "weight") in self.copies
        view: nn.Module = kind.__new__(_MasterEmbedding if looked_up else kind)
        view.__dict__.update(module.__dict__)
        if looked_up:
            view.__dict__["compute"] = self.compute
            dict.update(view, module)
        else:
            dict.update(view, {key: self.of(value, _join(path, key)) for key, value in module.items()})
        return view


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


class _MasterEmbedding(nn.Embedding):  # type: ignore[misc]
    """Looks rows up in a float32 master and gives them in the compute type."""

    compute: mx.Dtype

    def __call__(self, x: mx.array) -> mx.array:
        rows: mx.array = self["weight"][x]
        return rows.astype(self.compute)

    def as_linear(self, x: mx.array) -> mx.array:
        weight: mx.array = self["weight"]
        return x @ weight.astype(self.compute).T
