"""Nothing that comes from data can become markup."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from pipeline.reporting.markup import Raw, data_block, tag


class Parsed(HTMLParser):
    """Tags, attributes and text of a page, as a browser's parser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


ANY_TEXT = st.text() | st.sampled_from(
    ["<script>x()</script>", '" onload="x()', "'>\"<b>", "&lt;", "<!--", "]]>", "\x00\x1b[2J", "\ud800"]
)


@given(ANY_TEXT)
def test_text_and_attributes_stay_what_they_are(text: str) -> None:
    page = Parsed(tag("p", text, title=text, data_tip="plain").render())
    assert [name for name, _ in page.tags] == ["p"]
    assert page.tags[0][1].keys() == {"title", "data-tip"}
    assert "".join(page.text).replace("\r", "") == page.tags[0][1]["title"].replace("\r", "")  # type: ignore[union-attr]


@given(ANY_TEXT)
def test_what_is_rendered_is_also_xml(text: str) -> None:
    root = ElementTree.fromstring(tag("g", tag("text", text), id=text).render())
    assert root[0].tag == "text"


def test_text_that_is_allowed_comes_through() -> None:
    text = "naïve 東京 🙂 a\tb\nc < d & e"
    assert ElementTree.fromstring(tag("p", text).render()).text == text


@given(st.recursive(ANY_TEXT, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner)))
def test_a_data_block_cannot_be_ended_by_its_data(value: object) -> None:
    text = data_block("d", value).render()
    body = text.removeprefix('<script type="application/json" id="d">').removesuffix("</script>")
    assert "<" not in body
    assert json.loads(body) == value


def test_attributes_and_children() -> None:
    made = tag("p", "a", None, [tag("br"), 1.5], class_="x", hidden=True, title=None, lang=False).render()
    assert made == '<p class="x" hidden="">a<br>1.5</p>'


def test_only_raw_text_is_not_escaped() -> None:
    assert tag("style", Raw("a > b {}"), " > ").render() == "<style>a > b {} &gt; </style>"
