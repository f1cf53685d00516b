"""Students: a teacher with fewer layers or narrower ones, or a fresh model. Costs one write of the weights.

A student keeps the teacher's tokenizer and vocabulary, so cached ids mean the same to both.
"""

from pmetal_distill.students.fresh import fresh_student, shared_rows
from pmetal_distill.students.importance import block_influence, influential_layers, neuron_importance
from pmetal_distill.students.layers import evenly_spaced, fitting_layers, prune_layers
from pmetal_distill.students.making import init_student
from pmetal_distill.students.pruned import PrunedModel
from pmetal_distill.students.width import largest, mlp_width, prune_mlp

__all__ = [
    "PrunedModel",
    "block_influence",
    "evenly_spaced",
    "fitting_layers",
    "fresh_student",
    "influential_layers",
    "init_student",
    "largest",
    "mlp_width",
    "neuron_importance",
    "prune_layers",
    "prune_mlp",
    "shared_rows",
]
