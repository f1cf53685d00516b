"""Losses on the teacher's complete distribution: divergences, labels, hidden states, and the chunked head."""

from pmetal_distill.labels import IGNORE_INDEX
from pmetal_distill.losses.chunked_head import HeadOptions, LossParts, head_loss, head_rows
from pmetal_distill.losses.divergences import LOSS_NAMES, Divergence
from pmetal_distill.losses.functional import (
    divergence_loss,
    forward_kl,
    hard_cross_entropy,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    soft_cross_entropy,
    total_variation,
)
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.losses.hidden import HiddenAligner, HiddenStateLoss, layer_pairs
from pmetal_distill.losses.job import TokenRows
from pmetal_distill.losses.named import JensenShannonLoss, KLDivergenceLoss, NamedLoss, SoftCrossEntropyLoss
from pmetal_distill.losses.taid import TaidSchedule, TaidState

__all__ = [
    "IGNORE_INDEX",
    "LOSS_NAMES",
    "Divergence",
    "HeadOptions",
    "HeadParts",
    "HiddenAligner",
    "HiddenStateLoss",
    "JensenShannonLoss",
    "KLDivergenceLoss",
    "LossParts",
    "NamedLoss",
    "SoftCrossEntropyLoss",
    "TaidSchedule",
    "TaidState",
    "TokenRows",
    "divergence_loss",
    "forward_kl",
    "hard_cross_entropy",
    "head_loss",
    "head_rows",
    "jensen_shannon",
    "layer_pairs",
    "reverse_kl",
    "skewed_kl",
    "soft_cross_entropy",
    "total_variation",
]
