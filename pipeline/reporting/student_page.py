"""The section of a run's report with text coloured by divergence; says why where it cannot be drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.reporting.page import Section
from pipeline.reporting.text_page import TextPage
from schemas.errors import PmetalError

if TYPE_CHECKING:
    from pmetal_distill.offline.reader import LogitCache

TITLE = "Where the student differs"


def student_section(run: Path, cache: str | None, settings: Mapping[str, Any]) -> Section:
    """Teacher and student on a page of text from the run's cache, held-out text if there is any."""
    if cache is None:
        return Section("student", TITLE, skipped=_no_cache(settings))
    try:
        return _section(run, cache, settings)
    except PmetalError as error:
        return Section("student", TITLE, skipped=str(error))


def _no_cache(settings: Mapping[str, Any]) -> str:
    if settings.get("cache"):
        return f"the run's cache is not at {settings['cache']} any more, nor beside the run"
    return "the run had no cache but a live teacher"


def _section(run: Path, place: str, settings: Mapping[str, Any]) -> Section:
    from pipeline.eval_subject import load_subject
    from pipeline.reporting.agreement import compare_texts
    from pipeline.training.student import check_student
    from pmetal_distill.models import load_tokenizer
    from pmetal_distill.offline.reader import LogitCache

    cache = LogitCache(place, allow_partial=True)
    student = load_subject(str(run))
    check_student(student, cache)
    numbers, held_out = _sequences(cache, settings)
    texts = compare_texts(cache, student, load_tokenizer(cache.tokenizer_path), numbers)
    page = TextPage.of("tokens", "divergence", "nats", texts)
    if page is None:
        return Section("student", TITLE, skipped="no token of the chosen sequences has a target")
    return Section("student", TITLE, _lead(cache, held_out=held_out), extra=[page.element()])


def _lead(cache: "LogitCache", *, held_out: bool) -> list[str]:
    kind = "held-out sequences" if held_out else "sequences"
    caution = "" if held_out else " The run held none out: the student was trained on this text."
    measure = {
        "sketch": "",
        "bucket": " The cache knows the mass of the tail only, so this is a lower bound.",
        "none": " The cache has no tail, so the teacher is its head, renormalised.",
    }[cache.spec.tail]
    return [
        "The stronger the colour and the line below a token, the further apart teacher and student were "
        "about what would come there. Point at a token, tap it, or walk with the arrow keys to see what both "
        "expected.",
        f"KL(teacher ‖ student), T = 1, {kind} of the cache.{caution}{measure}",
    ]


def _sequences(cache: "LogitCache", settings: Mapping[str, Any]) -> tuple[Any, bool]:
    """Held-out sequences of the run if it had any, else all."""
    from pipeline.training.holdout import Holdout

    share, seed = settings.get("val_share", 0.0), settings.get("seed", 0)
    if not isinstance(share, int | float) or not isinstance(seed, int) or not share:
        return cache.numbers, False
    split = Holdout.of(cache.numbers, share=float(share), seed=seed, text=cache.text)
    return split.held_out, True
