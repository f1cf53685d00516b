"""Shapes in signatures: jaxtyping's where it is installed, as in tests; else plain types. Free at a call."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Integer
else:
    try:
        from jaxtyping import Float, Integer
    except ModuleNotFoundError:

        class Float:
            """`Float[type, "shape"]` is `type`."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Integer = Float

__all__ = ["Float", "Integer"]
