"""How close a student is to its teacher: a live one, logits beside logits, or what a cache holds of it."""

from pmetal_distill.evaluation.comparison import Comparison, compare_hidden
from pmetal_distill.evaluation.reliability import Reliability
from pmetal_distill.evaluation.scores import TokenScores, score_logits
from pmetal_distill.evaluation.sums import document_positions
from pmetal_distill.evaluation.targets import Question, target_rows

__all__ = [
    "Comparison",
    "Question",
    "Reliability",
    "TokenScores",
    "compare_hidden",
    "document_positions",
    "score_logits",
    "target_rows",
]
