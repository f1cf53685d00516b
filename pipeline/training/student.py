"""The student of a run: does it fit the cache?"""

from typing import TYPE_CHECKING

from schemas.errors import IncompatibleError

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.reader import LogitCache


def check_student(student: "LoadedModel", cache: "LogitCache") -> None:
    """Refuses a student that numbers tokens differently than the cache.

    Raises:
        IncompatibleError: another tokenizer, or too few rows in the embedding.
    """
    from pmetal_distill.models import compare_tokenizers, load_tokenizer

    cached = load_tokenizer(cache.tokenizer_path)
    if differences := compare_tokenizers(cached, student.tokenizer):
        raise IncompatibleError(
            f"{student.source}: must have the tokenizer that the cache was made with, found differences: "
            f"{'; '.join(differences[:5])}; take a student of the teacher's family"
        )
    needed = len(cached)
    if student.vocab_size < needed:
        raise IncompatibleError(
            f"{student.source}: must have room for the {needed} cached token ids, found a vocabulary of "
            f"{student.vocab_size}; take a student with a larger embedding"
        )
