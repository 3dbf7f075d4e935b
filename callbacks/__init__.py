"""Callbacks for any Lightning project; none of them needs a module of ours."""

from lightning_ft.callbacks.activation_checkpointing import ActivationCheckpointing
from lightning_ft.callbacks.adapter_fusion import AdapterFusion
from lightning_ft.callbacks.bias_correction import BiasCorrection
from lightning_ft.callbacks.bit_fit import BitFit
from lightning_ft.callbacks.bottleneck_adapters import BottleneckAdapters
from lightning_ft.callbacks.checkpoint_average import CheckpointAverage
from lightning_ft.callbacks.diff_pruning import DiffPruning
from lightning_ft.callbacks.discriminative_lr import DiscriminativeLR
from lightning_ft.callbacks.drift_report import DriftReport
from lightning_ft.callbacks.eight_bit_optimizer import EightBitOptimizer
from lightning_ft.callbacks.ema import EMA
from lightning_ft.callbacks.ewc import EWC
from lightning_ft.callbacks.exact_resume import ExactResume
from lightning_ft.callbacks.fgm import FGM
from lightning_ft.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_ft.callbacks.free_lb import FreeLB
from lightning_ft.callbacks.freeze import Freeze
from lightning_ft.callbacks.frozen_prefix_cache import FrozenPrefixCache
from lightning_ft.callbacks.gradual_unfreezing import GradualUnfreezing
from lightning_ft.callbacks.head_importance import HeadImportance
from lightning_ft.callbacks.intrinsic_dimension import IntrinsicDimension
from lightning_ft.callbacks.l2_sp import L2SP
from lightning_ft.callbacks.layer_drop import LayerDrop
from lightning_ft.callbacks.layer_reinit import LayerReinit
from lightning_ft.callbacks.layer_removal import LayerRemoval
from lightning_ft.callbacks.layer_timeline import LayerTimeline
from lightning_ft.callbacks.lp_ft import LPFT
from lightning_ft.callbacks.memory_report import MemoryReport
from lightning_ft.callbacks.mixout import Mixout
from lightning_ft.callbacks.movement_pruning import MovementPruning
from lightning_ft.callbacks.neftune import NEFTune
from lightning_ft.callbacks.peft import PEFT
from lightning_ft.callbacks.pgd import PGD
from lightning_ft.callbacks.precision_check import PrecisionCheck
from lightning_ft.callbacks.r3f import R3F
from lightning_ft.callbacks.r_drop import RDrop
from lightning_ft.callbacks.rec_adam import RecAdam
from lightning_ft.callbacks.seed_pruning import SeedPruning
from lightning_ft.callbacks.smart import SMART
from lightning_ft.callbacks.snapshot_ensemble import SnapshotEnsemble
from lightning_ft.callbacks.stability_monitor import StabilityMonitor
from lightning_ft.callbacks.temporal_ensembling import TemporalEnsembling
from lightning_ft.callbacks.training_mode_check import TrainingModeCheck
from lightning_ft.callbacks.wise_ft import WiSEFT
from lightning_ft.callbacks.write_predictions import WritePredictions

__all__ = [
    "SeedPruning",
    "FGM",
    "FreeLB",
    "NEFTune",
    "PGD",
    "R3F",
    "RDrop",
    "SMART",
    "ActivationCheckpointing",
    "AdapterFusion",
    "BitFit",
    "BottleneckAdapters",
    "DiffPruning",
    "EightBitOptimizer",
    "HeadImportance",
    "IntrinsicDimension",
    "LayerDrop",
    "MemoryReport",
    "MovementPruning",
    "PEFT",
    "PrecisionCheck",
    "WiSEFT",
    "ForgettingMonitor",
    "DriftReport",
    "TemporalEnsembling",
    "SnapshotEnsemble",
    "EMA",
    "CheckpointAverage",
    "EWC",
    "L2SP",
    "LPFT",
    "DiscriminativeLR",
    "ExactResume",
    "Freeze",
    "FrozenPrefixCache",
    "GradualUnfreezing",
    "LayerReinit",
    "LayerRemoval",
    "LayerTimeline",
    "Mixout",
    "RecAdam",
    "BiasCorrection",
    "StabilityMonitor",
    "TrainingModeCheck",
    "WritePredictions",
]
