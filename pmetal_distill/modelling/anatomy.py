"""Takes an mlx-lm model apart into body and head without knowing its class. Costs five to nine short passes.

mlx-lm's language models have the form `out = self.model(inputs, cache); return head(out)`. Here the module
that holds the blocks is found by looking for the blocks; the body is run by calling the model with that
module under a tap (the head that follows is never evaluated, MLX being lazy); the head is run by calling
the model with that module replaced by one that returns given states. So soft-caps, scales and all else that
a class does come along. Every claim is checked against the model's plain call, to within what `evidence`
measures, and what fails is left out with a note.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from pmetal_distill.modelling.documents import Window, document_caches
from pmetal_distill.modelling.evidence import FAILURES, Caches, Evidence, Packed, Probe, vocabulary
from pmetal_distill.modelling.heads import LinearHead, find_linear_head
from pmetal_distill.modelling.stand_ins import Given, Path, Tap, at, path_to_blocks, replaced, states_of
from schemas.errors import ModelError

Packing = Literal["batch", "rows", "none"]

_KV_CACHES = ("KVCache", "RotatingKVCache", "ConcatenateKVCache", "ChunkedKVCache")
_STATES = ("ArraysCache", "MambaCache")

_NO_SPLIT = (
    "the head cannot be split off: the model's full call is used, which is slower and holds the logits of a "
    "whole batch, and hidden states are not available"
)
_NO_MATRIX = (
    "the head is not a matrix that could be found: the model's own head is called, for a student on a whole "
    "batch, which is slower"
)
_NO_BLOCKS = "the outputs of the blocks cannot be had: hidden-state losses are not available"
_NO_PACKING = "several documents in one sequence cannot be kept apart ({}): use one document per sequence"
_POSITIONS = "it counts positions from the beginning of a sequence, not of a document"
_OWN_MASK = "its attention makes a mask of its own"
_WAYS: tuple[Packing, ...] = ("batch", "rows")
_OTHER_CALL = (
    "mlx_lm computes something else with a cache, as in generating, than without, as in training; the latter "
    "is taken"
)


@dataclass(frozen=True, slots=True)
class CacheKind:
    """One entry of the model's own cache list: the class's name, its window if any, and caches inside it."""

    name: str
    max_size: int | None
    parts: tuple["CacheKind", ...] = ()

    @property
    def window(self) -> Window:
        """As `document_caches` takes it."""
        return tuple(part.window for part in self.parts) if self.parts else self.max_size

    @property
    def names(self) -> frozenset[str]:
        """Its class's, or those inside."""
        return frozenset().union(*(part.names for part in self.parts)) or frozenset([self.name])


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """What was found and verified.

    Attributes:
        body: path from the model to the module that gives the final hidden states; None if the model cannot
            be split, so that only its full call is left.
        blocks: path from the body to the list of blocks; None if their outputs cannot be had.
        head: the head as a matrix, or None.
        packing: how several documents in a sequence are kept apart: one mask for the batch, one sequence at a
            time, or not at all.
        windows: per cache of the model, its window.
        needs_caches: whether layers share keys and values through caches, so that without one the model would
            be another than the one that generates text.
        num_layers, hidden_size, vocab_size: sizes; `hidden_size` is 0 if the model cannot be split.
        notes: what the user should know.
    """

    body: Path | None
    blocks: Path | None
    head: LinearHead | None
    packing: Packing
    windows: tuple[Window, ...]
    needs_caches: bool
    num_layers: int
    hidden_size: int
    vocab_size: int
    notes: tuple[str, ...]


def run_body(
    model: nn.Module,
    body: Path,
    blocks: Path | None,
    token_ids: mx.array,
    caches: list[Any] | None,
    layers: Sequence[int],
) -> tuple[mx.array, dict[int, mx.array]]:
    """Final hidden states, and the outputs of the blocks in `layers`."""
    module, taps = at(model, body), {}
    if layers and blocks is not None:
        stack = list(at(module, blocks))
        taps = {index: Tap(stack[index]) for index in layers}
        module = replaced(module, blocks, [taps.get(index, block) for index, block in enumerate(stack)])
    tap = Tap(module)
    owner = at(model, body[:-1])
    replaced(owner, body[-1:], tap)(token_ids, cache=caches)
    return states_of(tap.output), {index: states_of(block.output) for index, block in taps.items()}


def run_head(model: nn.Module, body: Path, hidden: mx.array) -> mx.array:
    """Hidden states [..., d] -> logits [..., V], by the model's own head."""
    states = hidden.reshape(1, -1, hidden.shape[-1])
    owner = at(model, body[:-1])
    stand_in = Given(at(model, body), states)
    logits = states_of(replaced(owner, body[-1:], stand_in)(mx.zeros(states.shape[:2], mx.int32), cache=None))
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """A model and how it is called.

    Attributes:
        model: of mlx-lm.
        windows: of its caches.
        caches: what it is called with.
    """

    model: nn.Module
    windows: tuple[Window, ...]
    caches: Caches

    def __call__(self, token_ids: mx.array) -> mx.array:
        logits: mx.array = self.model(token_ids, cache=self.caches())
        mx.eval(logits)
        return logits

    def with_stand_ins(self) -> "_Subject":
        """The same with caches that keep nothing but what layers share."""
        return _Subject(self.model, self.windows, lambda: document_caches(None, self.windows))


def examine(
    model: nn.Module,
    kinds: Sequence[CacheKind],
    config: dict[str, Any],
    *,
    source: str,
    caches: Caches = lambda: None,
) -> Anatomy:
    """Finds body, blocks, head and packing of a model, and verifies each on a few tokens.

    Args:
        model: of mlx-lm.
        kinds: of its caches.
        config: its configuration.
        source: what messages call it.
        caches: makes those that it generates text with.

    Raises:
        ModelError: it is not causal.
    """
    probe = Probe.below(vocabulary(config))
    tokens = probe.alone
    subject = _Subject(model, tuple(kind.window for kind in kinds), lambda: None)
    logits = subject(tokens)
    evidence = Evidence.of(model, probe, logits, subject.caches)
    if not evidence.causal and not _drops_out(model):
        raise _not_causal(source, evidence)
    packing, why_not = _find_packing(subject, kinds, probe, evidence)
    called: _Subject | None = subject
    if packing == "none":
        called = _as_generating(subject, caches, tokens, logits, evidence.tolerance)
    if called is not None and called is not subject:
        subject = called
        logits = subject(tokens)
        evidence = Evidence.of(model, probe, logits, subject.caches)
        packing, why_not = _find_packing(subject, kinds, probe, evidence)
    body, blocks, hidden = _find_body(subject, tokens, logits, evidence.tolerance)
    head = None if body is None else _find_head(model, body, hidden, config, evidence.roundoff)
    notes = [
        *([_OTHER_CALL] if called is None else []),
        *([_NO_SPLIT] if body is None else []),
        *([_NO_MATRIX] if body is not None and head is None else []),
        *([_NO_BLOCKS] if body is not None and blocks is None else []),
        *([_NO_PACKING.format(why_not)] if packing == "none" else []),
    ]
    return Anatomy(
        body,
        blocks,
        head,
        packing,
        subject.windows,
        needs_caches=called is not None and subject.caches() is not None,
        num_layers=len(model.layers),
        hidden_size=0 if body is None else hidden.shape[-1],
        vocab_size=logits.shape[-1],
        notes=tuple(notes),
    )


def _drops_out(model: nn.Module) -> bool:
    """Whether outputs are random, so that nothing can be said of them."""
    return any(isinstance(m, nn.Dropout) and m.training and m._p_1 < 1 for m in model.modules())


def _not_causal(source: str, evidence: Evidence) -> ModelError:
    return ModelError(
        f"{source}: an output must not depend on later tokens, found that they change it by "
        f"{evidence.drift:.1%} (rounding would by at most {evidence.largest_residual:.1%}); "
        "give a causal language model, not an encoder"
    )


def _agree(found: mx.array, expected: mx.array, tolerance: float) -> bool:
    """Whether two sets of rows [..., n] differ by little, in the mean square, against their spread."""
    if found.shape != expected.shape:
        return False
    rows = expected.astype(mx.float32)
    spread = mx.square(rows - rows.mean(axis=-1, keepdims=True)).sum()
    return bool(mx.square(found.astype(mx.float32) - rows).sum() <= tolerance**2 * spread)


def _attempt(check: Callable[[], bool]) -> bool:
    """Whether a check holds; a model that does not take the call fails it in one of many ways."""
    try:
        return check()
    except FAILURES:
        return False


def _as_generating(
    subject: _Subject, caches: Caches, tokens: mx.array, logits: mx.array, tolerance: float
) -> _Subject | None:
    """The subject, or with stand-ins, whichever gives what the model gives with caches; None if neither.

    `logits` are those of the subject. A model that does not take its own caches is left as it is.
    """
    try:
        expected = subject.model(tokens, cache=caches())
        mx.eval(expected)
    except FAILURES:
        return subject
    if _agree(logits, expected, tolerance):
        return subject
    stand_ins = subject.with_stand_ins()
    return stand_ins if _attempt(lambda: _agree(stand_ins(tokens), expected, tolerance)) else None


def _find_body(
    subject: _Subject, tokens: mx.array, logits: mx.array, tolerance: float
) -> tuple[Path | None, Path | None, mx.array]:
    """Paths to the body and from it to the blocks, and its states; (None, None, `logits`) without a body."""
    model = subject.model
    holder = path_to_blocks(model) or ()
    for end in range(len(holder) - 1, 0, -1):
        body = holder[:end]
        for blocks in (holder[end:], None) if isinstance(at(model, body), nn.Module) else ():
            states = _split(subject, body, blocks, tokens, logits, tolerance)
            if states is not None:
                return body, blocks, states
    return None, None, logits


def _split(
    subject: _Subject, body: Path, blocks: Path | None, tokens: mx.array, logits: mx.array, tolerance: float
) -> mx.array | None:
    """The states of this body, if the head gives the logits of them, all at once and a few at a time."""
    model = subject.model
    try:
        layers = (0, len(model.layers) - 1)
        states, found = run_body(model, body, blocks, tokens, subject.caches(), layers)
        some = run_head(model, body, states[0, 1:4])
        if states.shape == logits.shape and _agree(states, logits, tolerance):
            return None  # the head is inside
        whole = run_head(model, body, states)
        fits = _agree(whole, logits, tolerance) and _agree(some, logits[0, 1:4], tolerance)
    except FAILURES:
        return None
    return states if fits and all(block.ndim == 3 for block in found.values()) else None


def _find_head(
    model: nn.Module, body: Path, hidden: mx.array, config: dict[str, Any], roundoff: float
) -> LinearHead | None:
    def logits_of(states: mx.array) -> mx.array:
        return run_head(model, body, states)

    states = hidden.reshape(-1, hidden.shape[-1])
    return find_linear_head(model, logits_of, states, config=config, roundoff=roundoff)


def _find_packing(
    subject: _Subject, kinds: Sequence[CacheKind], probe: Probe, evidence: Evidence
) -> tuple[Packing, str]:
    """How packed documents give what each of them gives alone, whatever shares their sequence; or why not."""
    names = frozenset().union(*(kind.names for kind in kinds))
    if states := names & frozenset(_STATES):
        return "none", f"layers carry a state from token to token, {', '.join(sorted(states))}"
    if unknown := names - frozenset(_KV_CACHES):
        return "none", f"its caches are of a kind of their own, {', '.join(sorted(unknown))}"
    found: list[Packed] = []
    for packing in _WAYS:

        def keeps_apart(packing: Packing = packing) -> bool:
            logits = run_packed(subject.model, probe, subject.windows, packing)
            found.append(evidence.packed(logits))
            return evidence.keeps_apart(found[-1])

        if _attempt(keeps_apart):
            return packing, ""
    if not found:
        return "none", "it does not take a mask in the place of its own"
    apart = min(packed.leak for packed in found) <= evidence.largest_leak
    return "none", _POSITIONS if apart else _OWN_MASK


def run_packed(model: nn.Module, probe: Probe, windows: Sequence[Window], packing: Packing) -> mx.array:
    """Logits [3, 12, V] of the probe's rows, each document kept apart in this way."""
    if packing == "batch":
        logits: mx.array = model(probe.rows, cache=document_caches(probe.documents, windows))
        return logits
    rows = zip(probe.rows, probe.documents, strict=True)
    return mx.concatenate(
        [model(ids[None], cache=document_caches(documents, windows)) for ids, documents in rows]
    )
