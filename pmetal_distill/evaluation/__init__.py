"""How close a student is to its teacher: a live one, logits beside logits, or what a cache holds of it."""

from pmetal_distill.evaluation.comparison import Comparison, compare_hidden
from pmetal_distill.evaluation.targets import Question, target_rows

__all__ = ["Comparison", "Question", "compare_hidden", "target_rows"]
