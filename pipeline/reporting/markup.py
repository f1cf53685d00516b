"""A tree of elements that becomes HTML or SVG text. All text and all attribute values are escaped.

    tag("p", "a < b ", tag("b", name), class_="lead").render()

`Raw` alone is written as it stands; it is for the style sheets and scripts of this package, never for data.
"""

import html
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

VOID = frozenset({"br", "hr", "meta"})
# What neither XML 1.0 nor HTML allows in text: control characters, lone surrogates, two non-characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Raw:
    """Text of this package, written without escaping."""

    text: str


@dataclass(frozen=True, slots=True)
class Element:
    """An element; `tag` makes it."""

    name: str
    children: tuple[Any, ...]
    attributes: dict[str, str]

    def render(self) -> str:
        """The element as text that is HTML, and for SVG elements also XML."""
        given = "".join(f' {name}="{escape(value)}"' for name, value in self.attributes.items())
        if self.name in VOID:
            return f"<{self.name}{given}>"
        return f"<{self.name}{given}>{''.join(map(_text, self.children))}</{self.name}>"


def tag(name: str, /, *children: Any, **attributes: Any) -> Element:
    """An element.

    Args:
        name: of the element.
        *children: elements, text, numbers, iterables of these; None is left out.
        **attributes: None and False are left out, True is an empty value; `class_` is `class`, `data_tip` is
            `data-tip`.
    """
    kept = {
        key.rstrip("_").replace("_", "-"): "" if value is True else str(value)
        for key, value in attributes.items()
        if value is not None and value is not False
    }
    return Element(name, children, kept)


def escape(text: str) -> str:
    """Text in which nothing is markup, fit for content and for attribute values."""
    return html.escape(_FORBIDDEN.sub(_REPLACEMENT, text), quote=True)


def data_block(name: str, value: Any) -> Element:
    """JSON for the page's script, which finds it by its id; browsers do not run it.

    No `<` is left in it, so that no text can end the block.
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return tag("script", Raw(text), type="application/json", id=name)


def _text(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Element):
        return child.render()
    if isinstance(child, Raw):
        return child.text
    if isinstance(child, Iterable) and not isinstance(child, str):
        return "".join(map(_text, child))
    return escape(str(child))
