"""What every settings class needs: help texts as metadata, and checks of values."""

from typing import Any

from schemas.errors import UsageError


def described(text: str, *, aliases: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"help": text, "aliases": aliases}


def in_files_only(text: str) -> dict[str, Any]:
    """Metadata of a key that is no option."""
    return {"meaning": text}


def check(holds: bool, name: str, must: str, found: object, do: str = "give another value") -> None:
    if not holds:
        raise UsageError(f"{name}: must be {must}, found {found!r}; {do}")


def check_whole(settings: Any, names: str, *, least: int = 1) -> None:
    for name in names.split():
        check(getattr(settings, name) >= least, name, f"at least {least}", getattr(settings, name))


def check_layers(name: str, layers: tuple[int, ...] | str) -> None:
    distinct = len(set(layers)) == len(layers) or layers == "all"
    check(distinct, name, "distinct layers", layers, "name each layer once")
