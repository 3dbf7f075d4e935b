"""Methods as plain functions on names, tensors, parameters and models."""

from lightning_ft.functional.adapter_fusion import add_fusion
from lightning_ft.functional.adapter_layers import BottleneckConfig
from lightning_ft.functional.alterations import load_altered
from lightning_ft.functional.answer_spans import best_spans
from lightning_ft.functional.attention_heads import find_heads
from lightning_ft.functional.averaging import average, interpolate
from lightning_ft.functional.bit_fit import bit_fit
from lightning_ft.functional.bottleneck import add_adapters, use_adapters
from lightning_ft.functional.calibration import calibrate, calibration_bias
from lightning_ft.functional.delta import decode_delta, encode_delta
from lightning_ft.functional.delta_checkpoint import restore_delta, save_base
from lightning_ft.functional.drift import distances
from lightning_ft.functional.expected_best import expected_best, expected_best_band
from lightning_ft.functional.fgm import fgm, pgd
from lightning_ft.functional.fisher import FisherEstimate, fisher_diagonal, merge_ranks
from lightning_ft.functional.free_lb import free_lb
from lightning_ft.functional.gradual_unfreezing import explicit_stages, unfreezing_phases
from lightning_ft.functional.head_importance import head_importance, prune_heads
from lightning_ft.functional.label_scoring import label_log_likelihoods, label_token_ids
from lightning_ft.functional.layer_removal import layers_to_drop, remove_layers
from lightning_ft.functional.learning_rates import (
    decay_groups,
    depth_multipliers,
    explicit_multipliers,
    slanted_triangular,
    warmup_then,
)
from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.functional.linear_probe import linear_probe
from lightning_ft.functional.masked_weights import bake, sparsity
from lightning_ft.functional.memory import predict_memory
from lightning_ft.functional.mixout import mixout
from lightning_ft.functional.packing import keeps_documents_apart, move_padding
from lightning_ft.functional.passes import perturbed_loss
from lightning_ft.functional.peft_adapters import combine_adapters, use_adapter
from lightning_ft.functional.peft_merge import merge
from lightning_ft.functional.perturbation import symmetric_kl
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings
from lightning_ft.functional.plot_drift import plot_drift
from lightning_ft.functional.plot_interpolation import plot_interpolation
from lightning_ft.functional.plot_timeline import plot_timeline
from lightning_ft.functional.quantise import dequantise, quantise
from lightning_ft.functional.r3f import r3f
from lightning_ft.functional.r_drop import r_drop
from lightning_ft.functional.reinit import reinit_layers
from lightning_ft.functional.sequence_score import log_likelihood, pseudo_log_likelihood
from lightning_ft.functional.share_body import share_body
from lightning_ft.functional.smart import Ascent, smart
from lightning_ft.functional.snapshots import cyclic_cosine, ensemble_probabilities, mean_answer
from lightning_ft.functional.span_corruption import span_corruption
from lightning_ft.functional.sparse_delta import load_sparse_delta, save_sparse_delta
from lightning_ft.functional.temporal_ensembling import PredictionAverages, ramp_up
from lightning_ft.functional.variance_split import variance_split
from lightning_ft.functional.verbaliser import label_scores
from lightning_ft.functional.walsh_hadamard import walsh_hadamard
from lightning_ft.functional.wise_ft import interpolate_weights

__all__ = [
    "expected_best",
    "expected_best_band",
    "variance_split",
    "fgm",
    "pgd",
    "free_lb",
    "perturbed_loss",
    "symmetric_kl",
    "PerturbedEmbeddings",
    "r3f",
    "r_drop",
    "Ascent",
    "smart",
    "load_altered",
    "find_heads",
    "bit_fit",
    "add_adapters",
    "use_adapters",
    "BottleneckConfig",
    "add_fusion",
    "head_importance",
    "prune_heads",
    "bake",
    "sparsity",
    "predict_memory",
    "combine_adapters",
    "use_adapter",
    "merge",
    "quantise",
    "dequantise",
    "save_sparse_delta",
    "load_sparse_delta",
    "walsh_hadamard",
    "restore_delta",
    "save_base",
    "decode_delta",
    "encode_delta",
    "plot_interpolation",
    "interpolate_weights",
    "plot_drift",
    "distances",
    "mixout",
    "share_body",
    "PredictionAverages",
    "ramp_up",
    "cyclic_cosine",
    "ensemble_probabilities",
    "mean_answer",
    "average",
    "interpolate",
    "FisherEstimate",
    "Likelihood",
    "best_spans",
    "calibrate",
    "calibration_bias",
    "decay_groups",
    "depth_multipliers",
    "explicit_multipliers",
    "explicit_stages",
    "fisher_diagonal",
    "keeps_documents_apart",
    "label_log_likelihoods",
    "label_scores",
    "label_token_ids",
    "layers_to_drop",
    "linear_probe",
    "log_likelihood",
    "merge_ranks",
    "move_padding",
    "plot_timeline",
    "pseudo_log_likelihood",
    "reinit_layers",
    "remove_layers",
    "slanted_triangular",
    "span_corruption",
    "unfreezing_phases",
    "warmup_then",
]
