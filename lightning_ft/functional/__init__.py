"""Methods as plain functions on names, tensors, parameters and models."""

from lightning_ft.functional.answer_spans import best_spans
from lightning_ft.functional.calibration import calibrate, calibration_bias
from lightning_ft.functional.gradual_unfreezing import unfreezing_phases
from lightning_ft.functional.label_scoring import label_log_likelihoods, label_token_ids
from lightning_ft.functional.learning_rates import decay_groups, depth_multipliers, warmup_then
from lightning_ft.functional.packing import keeps_documents_apart, move_padding
from lightning_ft.functional.sequence_score import log_likelihood, pseudo_log_likelihood
from lightning_ft.functional.span_corruption import span_corruption
from lightning_ft.functional.verbaliser import label_scores

__all__ = [
    "best_spans",
    "calibrate",
    "calibration_bias",
    "decay_groups",
    "depth_multipliers",
    "keeps_documents_apart",
    "label_log_likelihoods",
    "label_scores",
    "label_token_ids",
    "log_likelihood",
    "move_padding",
    "pseudo_log_likelihood",
    "span_corruption",
    "unfreezing_phases",
    "warmup_then",
]
