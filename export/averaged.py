"""Whether the weights of a checkpoint are the mean that a callback promised."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

AVERAGING = ("EMA", "CheckpointAverage")


def averaged(source: str | os.PathLike[str] | nn.Module) -> str | None:
    """What a checkpoint's weights are a mean of, by the state of its callbacks; None where nothing was averaged.

    ``EMA`` writes its mean into every checkpoint. ``CheckpointAverage`` does so from the end of training on, and in
    earlier ones the weights are those that train: then the answer says so.

    Args:
        source: A checkpoint's file; of all else nothing is known.
    """
    if isinstance(source, nn.Module) or not Path(source).is_file():
        return None
    from lightning_ft.modules.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(source)
    if "averaging_state" in checkpoint:  # Lightning's WeightAveraging
        return "WeightAveraging"
    for key, state in checkpoint.get("callbacks", {}).items():
        name = key.partition("{")[0]
        if name in AVERAGING and _began(state):
            holds = state["mean"] is not None and _equal(state["mean"], checkpoint["state_dict"])
            return name if holds else f"no: written before {name} put its mean in; take the checkpoint of the end"
    return None


def _began(state: Mapping[str, Any]) -> bool:
    return state.get("mean") is not None or bool(state.get("window"))


def _equal(mean: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    return all(name in weights and torch.equal(value.to(weights[name]), weights[name]) for name, value in mean.items())
