"""Public names of the library and of the on-disk contract, with one line each."""

import ast
import enum
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import pmetal_distill
from tools.reference.markdown import code, first_sentence, plain, table
from tools.reference.sources import Sources


class Name(NamedTuple):
    """A public name with its summary; `members` are a class's own methods and properties."""

    name: str
    module: str
    signature: str
    summary: str
    members: tuple[tuple[str, str], ...]


def library() -> Iterator[Name]:
    """The names of `pmetal_distill.__all__`."""
    for name in pmetal_distill.__all__:
        thing = getattr(pmetal_distill, name)
        members = tuple(_members(thing)) if inspect.isclass(thing) else ()
        yield Name(name, thing.__module__, _signature(thing), first_sentence(inspect.getdoc(thing)), members)


def _members(thing: type) -> Iterator[tuple[str, str]]:
    if issubclass(thing, enum.Enum):
        yield from ((f"{member.name} = {member.value!r}", "A value.") for member in thing)
    seen: set[str] = set()
    for base in thing.__mro__:
        if not base.__module__.startswith("pmetal_distill"):
            continue
        for name, member in vars(base).items():
            plain_member = member.__func__ if isinstance(member, staticmethod | classmethod) else member
            documented = inspect.isfunction(plain_member) or isinstance(member, property)
            if documented and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name + _signature(plain_member), first_sentence(inspect.getdoc(plain_member))


def _signature(thing: Any) -> str:
    """Names of the parameters; those without a star before them may go by position."""
    if isinstance(thing, property | enum.EnumType):
        return ""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except ValueError:
        return ""
    names: list[str] = []
    starred = False
    for parameter in parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            names, starred = [*names, "*"], True
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
        names.append(stars.get(parameter.kind.name, "") + parameter.name)
    return f"({', '.join(names)})"


def library_section() -> str:
    """One table of names, and one of the members of each class."""
    found = list(library())
    parts = [table(["name", "what it is"], [[code(n.name + n.signature), n.summary] for n in found])]
    for name in found:
        if name.members:
            rows = [[code(member), summary] for member, summary in name.members]
            parts += [f"### {name.name}", table(["member", "what it does"], rows)]
    return "\n\n".join(parts)


def contract(sources: Sources) -> Iterator[Name]:
    """Public classes and functions of `schemas`, by module."""
    for module, tree in sources.trees.items():
        if not module.startswith("schemas."):
            continue
        members = tuple(
            (node.name, first_sentence(ast.get_docstring(node)))
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        )
        yield Name(module, module, "", first_sentence(ast.get_docstring(tree)), members)


def contract_section(sources: Sources) -> str:
    """A table for each module."""
    rows = [
        [code(f"{module.name}.{name}"), summary]
        for module in contract(sources)
        for name, summary in module.members
    ]
    heads = [[code(module.name), plain(module.summary)] for module in contract(sources)]
    return "\n\n".join([table(["module", "what it holds"], heads), table(["name", "what it is"], rows)])
