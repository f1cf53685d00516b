"""Text whose tokens are coloured by a number; what was predicted there shows under pointer or focus."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting.markup import Element, data_block, tag
from pipeline.reporting.numbers import percent, short
from pipeline.reporting.pieces import plain, visible

LEVELS = 9
_LEAST = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that might have come: its name, its probability, whether it did come."""

    name: str
    probability: float
    same: bool


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the text with what was predicted in its place.

    Attributes:
        text: its piece of the text.
        value: the number that colours it; None where nothing was predicted.
        lists: who predicted -> the likeliest tokens, best first.
        remark: a few words more.
    """

    text: str
    value: float | None = None
    lists: Sequence[tuple[str, Sequence[Choice]]] = ()
    remark: str = ""


@dataclass(frozen=True, slots=True)
class TextPage:
    """Coloured text.

    Attributes:
        name: its id in the page.
        quantity, unit: what colours the tokens.
        texts: a heading and a run of tokens, each.
        most: value of the strongest colour and above.
    """

    name: str
    quantity: str
    unit: str
    texts: Sequence[tuple[str, Sequence[Token]]]
    most: float

    @staticmethod
    def of(
        name: str, quantity: str, unit: str, texts: Sequence[tuple[str, Sequence[Token]]]
    ) -> "TextPage | None":
        """The page, scaled so that a fiftieth of the tokens have the strongest colour; None without any."""
        values = sorted(token.value for _, text in texts for token in text if token.value is not None)
        if not values:
            return None
        most = max(_LEAST, round(2 * values[int(0.98 * (len(values) - 1))]) / 2)
        return TextPage(name, quantity, unit, texts, most)

    def element(self) -> Element:
        """The key, the texts, and the data behind them."""
        tips: list[dict[str, object]] = []
        first = True
        paragraphs = []
        for heading, text in self.texts:
            spans = []
            for token in text:
                spans.append(self._span(token, tips, first=first))
                first = first and token.value is None
            paragraphs.append(tag("div", tag("h3", heading), tag("p", spans, class_="text")))
        return tag(
            "div",
            self._key(),
            tag("div", paragraphs, class_="texts", data_block=self.name),
            data_block(self.name, tips),
            class_="card",
        )

    def _key(self) -> Element:
        swatches = [tag("span", class_=f"v{level}") for level in range(1, LEVELS + 1)]
        return tag(
            "p",
            f"{self.quantity}: 0 ",
            tag("b", swatches),
            f" {short(self.most)} {self.unit} and more",
            class_="key",
        )

    def _span(self, token: Token, tips: list[dict[str, object]], *, first: bool) -> Element:
        text = [_piece(token.text)]
        if token.value is None:
            return tag("span", text, class_="off")
        level = min(LEVELS, round(LEVELS * max(0.0, token.value) / self.most))
        tips.append(self._tip(token))
        return tag(
            "span",
            text,
            class_=f"t v{level}" if level else "t",
            data_i=len(tips) - 1,
            tabindex=0 if first else -1,
        )

    def _tip(self, token: Token) -> dict[str, object]:
        value = f"{self.quantity} {token.value or 0.0:.2f} {self.unit}"
        heading = f"{visible(token.text) or '(part of a character)'} · {value}"
        lists = [
            [name, [[c.name, round(c.probability, 4), c.same] for c in choices]]
            for name, choices in token.lists
        ]
        return {"heading": heading + (f" · {token.remark}" if token.remark else ""), "lists": lists}


def _piece(text: str) -> list[str | Element]:
    """The text; line breaks are also shown, and a token without text of its own is a dot."""
    if not text:
        return [tag("span", "·", class_="dim")]
    parts: list[str | Element] = []
    for number, line in enumerate(plain(text).split("\n")):
        if number:
            parts += [tag("span", "↵", class_="dim"), "\n"]
        parts.append(line)
    return parts


def chance(probability: float) -> str:
    """A probability in words for a remark."""
    return percent(probability) if probability >= 1e-3 else "less than 0.1 %"
