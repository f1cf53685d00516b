"""Attention that does not cross documents, for any mlx-lm attention model. Costs a boolean mask [B, L, L].

mlx-lm's models ask their key-value cache for the attention mask (`make_mask`). `DocumentCache` stands in
for the cache of one layer: it keeps nothing, and answers with a mask that is causal, within the layer's
window, and within one document. Positions are not restarted, which changes nothing where only their
differences count (rope).
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

Window: TypeAlias = "int | tuple[Window, ...] | None"
"""Of the real cache of a layer: the tokens that it sees, None for all; one each for a layer with several."""


class DocumentMask:
    """Masks of one batch, one per window size, shared by all layers.

    Args:
        documents: integers [B, L]; tokens attend to earlier tokens with the same number. Or [L] for one
            sequence, which gives masks [L, L] without batch and head dimensions. None: every sequence is one
            document.
    """

    def __init__(self, documents: mx.array | None) -> None:
        self._documents = documents
        self._masks: dict[int | None, mx.array] = {}

    def mask(self, length: int, window: int | None) -> mx.array:
        """True where a query (row) may see a key (column): bool [L, L] or [B, 1, L, L]."""
        if window not in self._masks:
            self._masks[window] = self._build(length, window)
        return self._masks[window]

    def _build(self, length: int, window: int | None) -> mx.array:
        rows, columns = mx.arange(length)[:, None], mx.arange(length)[None]
        mask = columns <= rows
        if window is not None:
            mask = mask & (rows < columns + window)
        if self._documents is None:
            return mask
        same = self._documents[..., :, None] == self._documents[..., None, :]
        return (same & mask) if same.ndim == 2 else (same & mask)[:, None]


class DocumentCache:
    """Stands in for the empty key-value cache of one layer, for one call.

    Args:
        mask: shared by the layers of a call.
        max_size: the window that the real cache would impose where the model names none.
    """

    offset = 0
    start_position = 0

    def __init__(self, mask: DocumentMask, max_size: int | None = None) -> None:
        self._mask, self._max_size = mask, max_size
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The mask for `length` new tokens; an array whatever `return_array` says."""
        return self._mask.mask(length, window_size or self._max_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values so far: the given ones."""
        self.keys, self.values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The same for a later layer that shares them."""
        if self.keys is None or self.values is None:
            raise ValueError("no layer has made keys and values yet")
        return self.keys, self.values

    def maybe_trim_front(self) -> None:
        """Forgets what is out of reach, of which there is nothing yet."""


def document_caches(documents: mx.array | None, windows: Sequence[Window]) -> list[Any]:
    """One stand-in per cache of the model; a tuple of them for a layer with several."""
    mask = DocumentMask(documents)

    def stand_in(window: Window) -> Any:
        return tuple(map(stand_in, window)) if isinstance(window, tuple) else DocumentCache(mask, window)

    return [stand_in(window) for window in windows]


def documents_apart(documents: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows with one document each, for models that cannot keep them apart in one.

    Args:
        documents: integers [B, L]; negative is padding.

    Returns:
        for each of the D documents, where its tokens are among the B L [D, longest], 0 after its end; and for
        each token where it is among the D longest [B, L], 0 for padding.
    """
    rows = [np.flatnonzero(row == number) for row in documents for number in np.unique(row[row >= 0])]
    starts = [i * len(row) for i, row in enumerate(documents) for _ in np.unique(row[row >= 0])]
    longest = max(map(len, rows), default=1)
    places = np.zeros((max(len(rows), 1), longest), np.int32)
    back = np.zeros(documents.size, np.int32)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        places[index, : len(row)] = row + start
        back[row + start] = index * longest + np.arange(len(row))
    return places, back.reshape(documents.shape)


def fits_windows(length: int, windows: Sequence[Window]) -> bool:
    """Whether no window is shorter than a sequence."""
    return all(
        fits_windows(length, window) if isinstance(window, tuple) else window is None or length <= window
        for window in windows
    )


def holds_one_document(documents: np.ndarray[Any, Any]) -> bool:
    """Whether each row [B, L] is one document, up to padding (negative numbers) after it."""
    padding = documents < 0
    padding_is_last = not bool((padding[:, :-1] & ~padding[:, 1:]).any())
    same = (documents == documents[:, :1]) | padding
    return padding_is_last and bool(same.all()) and not bool(padding[:, 0].any())
