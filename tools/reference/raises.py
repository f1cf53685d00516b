"""Every error text that the packages can raise, out of their syntax trees.

A text is the literal of an f-string with its values as `{name}`, or `…` where a value is longer. Where a
message is put together by a helper from its arguments, the helper's callers give the texts.
"""

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from schemas import errors
from tools.reference.sources import Function, Place, Sources, called, is_text

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.PmetalError)
}
CLICK = {"fail": "BadParameter"}
"""What types of options (IntList, FloatList, TailList) raise through click."""
DEPTH = 3
SENTENCE = 10
"""Letters that make what a helper returns part of a message, where less is a value in it."""

Piece = str | ast.expr
Template = tuple[Piece, ...]


@dataclass(frozen=True, slots=True, order=True)
class ErrorText:
    """A message.

    Attributes:
        module: where it is raised, or where the helper that raises it is called.
        error: the class.
        text: its skeleton.
    """

    module: str
    error: str
    text: str


class Collector:
    """Finds the texts.

    Args:
        sources: the packages.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._entered: list[Function] = []

    def texts(self) -> list[ErrorText]:
        """All of them, sorted, each once."""
        found: set[ErrorText] = set()
        for places in list(self.sources.calls.values()):
            for place in places:
                assert isinstance(place.node, ast.Call)
                found |= set(self.texts_of(place))
        return sorted(
            text for text in found if any(letter.isalpha() for letter in text.text.replace("…", ""))
        )

    def texts_of(self, place: Place) -> Iterator[ErrorText]:
        """The texts of one error that is made; none if the call makes no error."""
        assert isinstance(place.node, ast.Call)
        if not (error := self.error_of(place)):
            return
        for template in self.templates(place.node.args[0] if place.node.args else None, place):
            for at, text in self.expanded(template, place, DEPTH):
                yield ErrorText(at.module, error, rendered(text))

    def error_of(self, place: Place) -> str:
        """The error class that a call makes, or several; empty if it makes no error."""
        call, function = place.node, place.function
        assert isinstance(call, ast.Call)
        name = called(call)
        if name in CLASSES:
            return name
        if name == "fail" and function is not None and function.owner.endswith("List"):
            return CLICK[name]
        if name not in ("error", "_error") or function is None:
            return ""
        holder = function if name == "error" else self._constructor(function)
        if holder is None or not holder.annotation("error").startswith("type["):
            return ""
        given = [holder.default("error")]
        calls = self.sources.calls[holder.owner] if name == "_error" else self.sources.calls_of(holder)
        given += [holder.bound(p.node).get("error") for p in calls if isinstance(p.node, ast.Call)]
        return " or ".join(sorted({v.id for v in given if isinstance(v, ast.Name) and v.id in CLASSES}))

    def _constructor(self, function: Function) -> Function | None:
        own = [f for f in self.sources.functions[function.module] if f.owner == function.owner]
        return next((f for f in own if f.node.name == "__init__"), None)

    def templates(self, node: ast.expr | None, place: Place) -> list[Template]:
        """What an expression for a message may be."""
        if node is None:
            return []
        if isinstance(node, ast.Constant):
            return [(str(node.value),)]
        if isinstance(node, ast.JoinedStr):
            return self._joined([self._value(part, place) for part in node.values])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([self.templates(node.left, place), self.templates(node.right, place)])
        if isinstance(node, ast.IfExp):
            return self.templates(node.body, place) + self.templates(node.orelse, place)
        if isinstance(node, ast.Call) and (helper := self.sources.function(place.module, called(node))):
            return self._returned(helper)
        if isinstance(node, ast.Name):
            return self._named(node, place)
        return [(node,)]

    def _joined(self, parts: list[list[Template]]) -> list[Template]:
        return [tuple(itertools.chain(*choice)) for choice in itertools.product(*parts)]

    def _value(self, part: ast.expr, place: Place) -> list[Template]:
        if not isinstance(part, ast.FormattedValue):
            return self.templates(part, place)
        if isinstance(part.value, ast.Call) and (
            helper := self.sources.function(place.module, called(part.value))
        ):
            returned = self._returned(helper)
            if returned and all(_num_letters(template) >= SENTENCE for template in returned):
                return returned
        return self._named(part.value, place) if isinstance(part.value, ast.Name) else [(part.value,)]

    def _returned(self, helper: Function) -> list[Template]:
        """What a helper may return; nothing while that is being found already."""
        if helper in self._entered:
            return []
        self._entered.append(helper)
        inside = Place(helper.node, helper, helper.module)
        returns = [node.value for node in ast.walk(helper.node) if isinstance(node, ast.Return)]
        found = [template for value in returns for template in self.templates(value, inside)]
        self._entered.pop()
        return found

    def _named(self, node: ast.Name, place: Place) -> list[Template]:
        """A variable: a constant of the module, or what the function has put into it, if that is text."""
        if (constant := self.sources.constant(place.module, node.id)) is not None:
            return [(constant,)]
        if place.function is None or node.id in place.function.parameters:
            return [(node,)]
        values = [
            child.value
            for child in ast.walk(place.function.node)
            if isinstance(child, ast.Assign) and node.id in [ast.unparse(t) for t in child.targets]
        ]
        choices = [choice for value in values for choice in _choices(value)]
        if not choices or not all(is_text(value) or isinstance(value, ast.JoinedStr) for value in choices):
            return [(node,)]
        return [template for value in choices for template in self.templates(value, place)]

    def expanded(self, template: Template, place: Place, depth: int) -> Iterator[tuple[Place, Template]]:
        """A template, or what the callers of its function make of it where they give it words."""
        function = place.function
        holes = {p.id for p in template if isinstance(p, ast.Name)}
        holes &= set(function.parameters) if function else set()
        if function is None or not holes or depth == 0:
            yield place, template
            return
        found = [
            text
            for call in self.sources.calls_of(function)
            for text in self._from_call(template, call, function, depth)
        ]
        yield from found or [(place, template)]

    def _from_call(
        self, template: Template, call: Place, function: Function, depth: int
    ) -> list[tuple[Place, Template]]:
        """What a call makes of a template; nothing if it gives no words, itself or from its own callers."""
        assert isinstance(call.node, ast.Call)
        holes = {piece.id for piece in template if isinstance(piece, ast.Name)}
        given = {name: value for name, value in function.bound(call.node).items() if name in holes}
        telling = [given[name] for name in _inner_holes(template) if name in given]
        passed = (
            set(call.function.parameters)
            if call.function and call.function.owner == function.owner
            else set()
        )
        phrased = any(_is_phrase(value) for value in telling)
        if not phrased and not any(isinstance(value, ast.Name) and value.id in passed for value in telling):
            return []
        filled = self._filled(template, given, call)
        texts = [text for option in filled for text in self.expanded(option, call, depth - 1)]
        return texts if phrased or any(place is not call for place, _ in texts) else []

    def _filled(self, template: Template, given: dict[str, ast.expr], call: Place) -> list[Template]:
        """The template with a call's words in its holes; other values stay as their names."""
        parts: list[list[Template]] = []
        for piece in template:
            value = given.get(piece.id) if isinstance(piece, ast.Name) else None
            if value is None:
                parts.append([(piece,)])
            elif isinstance(value, ast.Constant) and value.value is None:
                parts.append([("None",)])
            else:
                parts.append(self.templates(value, call))
        return self._joined(parts)


def _num_letters(template: Template) -> int:
    return sum(letter.isalpha() for piece in template if isinstance(piece, str) for letter in piece)


def _choices(value: ast.expr) -> list[ast.expr]:
    return [*_choices(value.body), *_choices(value.orelse)] if isinstance(value, ast.IfExp) else [value]


def _inner_holes(template: Template) -> list[str]:
    """The variables of a template, without that at its beginning, which says where."""
    pieces = template if len(template) == 1 else template[1:]
    return [piece.id for piece in pieces if isinstance(piece, ast.Name)]


def _is_phrase(value: ast.expr) -> bool:
    """Whether a caller's value is a part of a sentence, not a name in it."""
    return any(
        isinstance(choice, ast.JoinedStr) or (isinstance(choice, ast.Constant) and " " in str(choice.value))
        for choice in _choices(value)
    )


def rendered(template: Template) -> str:
    """The skeleton in one line."""
    text = "".join(piece if isinstance(piece, str) else _hole(piece) for piece in template)
    return " ".join(text.split())


def _hole(node: ast.expr) -> str:
    text = ast.unparse(node).removeprefix("self.").lstrip("_")
    return f"{{{text}}}" if isinstance(node, ast.Name | ast.Attribute) and "." not in text[1:] else "…"
