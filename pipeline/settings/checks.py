"""What every settings class needs: help texts as metadata, and checks of values."""

from typing import Any

from schemas.errors import UsageError

MOST = (1 << 31) - 1
MOST_SEED = (1 << 63) - 1


def described(text: str, *, aliases: tuple[str, ...] = (), place: bool = False) -> dict[str, Any]:
    """Metadata of an option; `place`: its text may be a path, so shells complete it as one."""
    return {"help": text, "aliases": aliases, "place": place}


def in_files_only(text: str) -> dict[str, Any]:
    """Metadata of a key that is no option."""
    return {"meaning": text}


def check(holds: bool, name: str, must: str, found: object, do: str = "give another value") -> None:
    if not holds:
        raise UsageError(f"{name}: must be {must}, found {found!r}; {do}")


def check_whole(settings: Any, names: str, *, least: int = 1, most: int = MOST) -> None:
    for name in names.split():
        check(getattr(settings, name) >= least, name, f"at least {least}", getattr(settings, name))
        check(getattr(settings, name) <= most, name, f"at most {most:,}", getattr(settings, name))


def check_whole_or_none(settings: Any, names: str) -> None:
    for name in names.split():
        if getattr(settings, name) is not None:
            check_whole(settings, name)


def check_layers(name: str, layers: tuple[int, ...] | str) -> None:
    distinct = len(set(layers)) == len(layers) or layers == "all"
    check(distinct, name, "distinct layers", layers, "name each layer once")
