"""What perturbation methods refuse, and what they read off a model."""

from __future__ import annotations

import math
from typing import get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.core.sharding import is_piece
from lightning_ft.functional.r3f import Dropout
from lightning_ft.functional.snapshots import Answer

STANDS_IN = "_lightning_ft_perturbs"
"""The attribute by which a stand-in for a training step names who put it there."""


def answer_of(module: nn.Module, answer: Answer | None) -> Answer | None:
    """What the logits mean: as given, else several labels at once where a transformers configuration says so."""
    configs = (getattr(child, "config", None) for child in module.modules())
    several = any(getattr(c, "problem_type", None) == "multi_label_classification" for c in configs)
    return "multi_label" if answer is None and several else answer


def check(answer: Answer | None = None, dropout: str = "shared", **at_least_zero: float) -> None:
    """Refuse bad arguments.

    Raises:
        ValueError: One is out of range.
    """
    if answer not in (None, *get_args(Answer)):
        raise ValueError(f"answer={answer!r} must be one of {', '.join(get_args(Answer))}, or None")
    if dropout not in get_args(Dropout):
        raise ValueError(f'dropout={dropout!r} must be "independent" or "shared"')
    for argument, value in at_least_zero.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{argument}={value!r} must be a number, 0 or more")


def refuse(trainer: Trainer, module: LightningModule, callback: Callback) -> None:
    """Refuse what a repeated or perturbed step does not go with.

    Raises:
        ValueError: DeepSpeed; FSDP1, which several passes in one forward leave with wrong gradients; a compiled
            training step; a cache of the frozen prefix; another perturbation; a callback whose own term would be
            counted in each pass.
    """
    name = type(callback).__name__
    refuse_deepspeed(trainer, callback)
    if any(is_piece(parameter) for parameter in module.parameters()):
        raise ValueError(
            f"{name} does not run under FullyShardedDataParallel (FSDP1), where a gradient taken inside the forward "
            "pass makes those of the weights wrong: use FSDP2, that is Trainer(strategy=ModelParallelStrategy()) and "
            "fully_shard in configure_model, or DDP"
        )
    refuse_prefix_cache(trainer, callback)
    if getattr(module, "_compiler_ctx", None) is not None:
        raise ValueError(
            f"{name} calls training_step several times, and torch.compile({type(module).__name__}) has compiled it: "
            "compile the model inside instead"
        )
    step = vars(module).get("training_step")
    earlier = getattr(step, STANDS_IN, None)
    if earlier is not None and earlier.module is None:
        return
    if earlier is not None:
        raise ValueError(
            f"{name} beside another perturbation method: use one of them at a time (NEFTune goes with all)"
        )
    if step is not None:
        raise ValueError(
            f"{name} would call what another callback has put in the place of training_step several times: list {name} "
            "before it in callbacks=[...]"
        )


def refuse_prefix_cache(trainer: Trainer, callback: Callback) -> None:
    """Refuse a cache that answers in the place of the embeddings.

    Raises:
        ValueError: There is one.
    """
    if any(type(other).__name__ == "FrozenPrefixCache" for other in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            f"{type(callback).__name__} perturbs the embedded tokens, which FrozenPrefixCache does not compute again: "
            "leave one of them out"
        )
