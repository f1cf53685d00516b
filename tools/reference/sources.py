"""The packages' syntax trees, with what the search for error texts asks of them. Reads every file once."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("schemas", "pmetal_distill", "pipeline")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A function or method.

    Attributes:
        module: where it stands, dotted.
        owner: its class, or "".
        node: its definition.
    """

    module: str
    owner: str
    node: FunctionNode

    @property
    def parameters(self) -> list[str]:
        """Names of its parameters, without self."""
        arguments = self.node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return [name for name in names if name not in ("self", "cls")]

    def annotation(self, parameter: str) -> str:
        """Of a parameter, as text."""
        arguments = self.node.args
        found = [a for a in (*arguments.args, *arguments.kwonlyargs) if a.arg == parameter]
        return ast.unparse(found[0].annotation) if found and found[0].annotation else ""

    def default(self, parameter: str) -> ast.expr | None:
        """Of a parameter, if it has one."""
        arguments = self.node.args
        late = dict(
            zip([a.arg for a in reversed(arguments.args)], reversed(arguments.defaults), strict=False)
        )
        early = {a.arg: value for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
        return {**late, **early}.get(parameter)

    def bound(self, call: ast.Call) -> dict[str, ast.expr]:
        """Parameter to the expression that a call gives it."""
        unbound = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == self.owner
        given = dict(zip(self.parameters, call.args[1:] if unbound else call.args, strict=False))
        given |= {word.arg: word.value for word in call.keywords if word.arg}
        for name in self.parameters:
            if name not in given and (default := self.default(name)) is not None:
                given[name] = default
        return given


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A node, and the function around it (None at module level)."""

    node: ast.AST
    function: Function | None
    module: str


@dataclass(slots=True, eq=False)
class Sources:
    """Every module of the packages.

    Attributes:
        trees: by dotted name.
        functions: by module.
        calls: by the last part of what is called.
        raises: every `raise` with an exception.
        imports: by module, the modules and names that it imports from.
    """

    trees: dict[str, ast.Module] = field(default_factory=dict)
    functions: dict[str, list[Function]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    raises: list[Place] = field(default_factory=list)
    imports: dict[str, set[tuple[str, str]]] = field(default_factory=lambda: defaultdict(set))

    @staticmethod
    def read(root: Path = ROOT) -> "Sources":
        """Parses the packages."""
        sources = Sources()
        for package in PACKAGES:
            for path in sorted((root / package).rglob("*.py")):
                module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
                sources.trees[module] = ast.parse(path.read_text(encoding="utf-8"))
                sources._walk(sources.trees[module], Place(sources.trees[module], None, module), owner="")
        return sources

    def _walk(self, node: ast.AST, inside: Place, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            place, name = Place(child, inside.function, inside.module), owner
            if isinstance(child, FunctionNode):
                function = Function(inside.module, owner, child)
                self.functions[inside.module].append(function)
                place = Place(child, function, inside.module)
            elif isinstance(child, ast.ImportFrom):
                self.imports[inside.module] |= {(child.module or "", alias.name) for alias in child.names}
            elif isinstance(child, ast.ClassDef):
                name = child.name
            elif isinstance(child, ast.Call) and called(child):
                self.calls[called(child)].append(place)
            elif isinstance(child, ast.Raise) and child.exc is not None:
                self.raises.append(place)
            self._walk(child, place, name)

    def constant(self, module: str, name: str) -> str | None:
        """A string that stands at the top of a module, or that it imports from there."""
        for node in self.trees[module].body:
            if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
                return node.value.value if is_text(node.value) else None  # type: ignore[attr-defined]
            if isinstance(node, ast.ImportFrom) and any(a.name == name and not a.asname for a in node.names):
                return self.constant(node.module, name) if node.module in self.trees else None
        return None

    def function(self, module: str, name: str) -> Function | None:
        """A function of this name that a module defines."""
        return next((f for f in self.functions[module] if f.node.name == name), None)

    def calls_of(self, function: Function) -> Iterator[Place]:
        """Where a function is called, as far as names tell."""
        name = function.owner or function.node.name
        for place in self.calls[function.node.name]:
            if place.module == function.module or (function.module, name) in self.imports[place.module]:
                yield place


def called(call: ast.Call) -> str:
    """The last part of what is called: `fail` of `self.cursor.fail(...)`."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def is_text(node: ast.AST | None) -> bool:
    """Whether a node is a plain string."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
