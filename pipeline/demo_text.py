"""English text that is there without a network, for demonstrations and tests of drift.

- `python-docs`: the topics of `pydoc_data`, the language reference of CPython; 380 kB with Python 3.11.
- `licences`: the licences of the packages that this one needs: legal English, parts of which most models know
  by heart; 100 kB, less where NumPy's wheel bundles no Fortran runtime (no GPL).
- `numpy-docs`: the docstrings in NumPy's sources: numerical mathematics, tables and examples; 1.1 MB.

No longer paragraph of a text stands in two of its documents, so a split by document does not leak. Costs a
second or two (parsing NumPy's sources).
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipeline.data.documents import Document
from schemas.errors import DataError

LICENCES_OF = (
    "pyarrow",
    "numpy",
    "mlx",
    "mlx-lm",
    "transformers",
    "tokenizers",
    "safetensors",
    "sentencepiece",
    "protobuf",
    "huggingface-hub",
    "typing-extensions",
    "regex",
    "tqdm",
    "click",
    "rich",
    "pygments",
    "pyyaml",
    "jinja2",
    "packaging",
    "filelock",
    "fsspec",
    "zstandard",
)
LEAST_DOCUMENT_CHARS = 200
LEAST_DOCSTRING_CHARS = 600
# A paragraph is a repetition when more than half of its runs of five words were seen before.
SHINGLE_WORDS = 5
LEAST_PARAGRAPH_WORDS = 8
_NUMPY_SKIPPED = {"tests", "f2py", "testing", "typing", "_typing", "distutils"}
_LICENCE_FILE = re.compile(r"licen[cs]e|notice|copying", re.IGNORECASE)
_RULE = re.compile(r"^[ \t]*[-=]{4,}[ \t]*$", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*\n\s*?(?=[ \t]*\S)")


def demo_documents(name: str = "python-docs") -> tuple[Document, ...]:
    """The documents of one of `TEXTS`, in a fixed order.

    Raises:
        DataError: no such text, or its package is not installed.
    """
    if name not in TEXTS:
        raise DataError(f"text: must be one of {', '.join(TEXTS)}, found '{name}'; choose one of them")
    return TEXTS[name]()


def pydoc_topics() -> tuple[Document, ...]:
    """One document a topic of Python's documentation; sources are `pydoc_data.topics/NAME`.

    Some topics are made of others (`specialnames`, `compound`); a paragraph stays only in the shortest.
    """
    from pydoc_data.topics import topics

    shortest_first = sorted(topics, key=lambda name: (len(topics[name]), name))
    kept = _unrepeated((name, topics[name]) for name in shortest_first)
    return _documents("pydoc_data.topics", kept)


def licence_texts() -> tuple[Document, ...]:
    """One document a licence, of those of `LICENCES_OF` installed; sources are `licences/PACKAGE/N`."""
    return _documents("licences", _unrepeated(_licence_sections()))


def numpy_docstrings() -> tuple[Document, ...]:
    """One document a docstring of NumPy; sources are `numpy/PATH/LINE`."""
    return _documents("numpy", _unrepeated(_docstrings("numpy")))


TEXTS: dict[str, Callable[[], tuple[Document, ...]]] = {
    "python-docs": pydoc_topics,
    "licences": licence_texts,
    "numpy-docs": numpy_docstrings,
}


def _documents(source: str, texts: Iterable[tuple[str, str]]) -> tuple[Document, ...]:
    documents = [
        Document(kind="text", source=f"{source}/{name}", text=text)
        for name, text in texts
        if len(text) >= LEAST_DOCUMENT_CHARS
    ]
    if not documents:
        raise DataError(f"{source}: must hold text, found none; install the package with its sources")
    return tuple(sorted(documents, key=lambda document: document.source))


def _unrepeated(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Drops the paragraphs that an earlier text holds, word for word or nearly."""
    seen: set[tuple[str, ...]] = set()
    for name, text in texts:
        kept = []
        here: set[tuple[str, ...]] = set()
        for paragraph in _BLANK.split(text.strip("\n")):
            shingles = _shingles(paragraph)
            if 2 * len(shingles & seen) <= len(shingles):
                kept.append(paragraph)
            here |= shingles
        seen |= here
        yield name, "\n\n".join(kept)


def _shingles(paragraph: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", paragraph.lower())
    if len(words) < LEAST_PARAGRAPH_WORDS:
        return set()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def _licence_sections() -> Iterator[tuple[str, str]]:
    for package in LICENCES_OF:
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        number = 0
        for file in sorted(files, key=str):
            if _LICENCE_FILE.search(file.name) and file.suffix not in (".py", ".pyc"):
                for section in _RULE.split(file.read_text(encoding="utf-8")):
                    yield f"{package}/{number:03d}", section
                    number += 1


def _docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Long string constants of the package's sources that read as English."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    root = Path(spec.origin).parent
    for file in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if _NUMPY_SKIPPED.isdisjoint(relative.parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_prose(node.value):
                    yield f"{relative.as_posix()}/{node.lineno}", inspect.cleandoc(node.value)


def _is_prose(text: str) -> bool:
    return len(text) >= LEAST_DOCSTRING_CHARS and " the " in text
