"""What each of two DDP processes does with DiffPruning and IntrinsicDimension."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_ft.callbacks.diff_pruning import DiffPruning
from lightning_ft.callbacks.intrinsic_dimension import IntrinsicDimension
from lightning_ft.functional.diff_pruning import sparse_offsets
from tests.ddp_worker import Module
from tests.ranks import RANKS
from tests.strangers import FILTERED

MAKES: dict[str, Callable[[], Callback]] = {
    "diff-pruning": partial(DiffPruning, 0.05, relaxed="6 steps", penalty=1e-3, seed=5),
    "intrinsic-dimension": partial(IntrinsicDimension, 100, seed=5),
}


class Trace(Callback):
    """All that trains after each batch, and the weight that the first block read in it."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.read: list[Tensor] = []

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.read.append(module.encoder.layers[0].linear1.weight.detach().clone())

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        chosen = [p.detach().flatten() for n, p in module.named_parameters() if not n.endswith("original")]
        self.parameters.append(torch.cat(chosen).nan_to_num(posinf=100, neginf=-100))


def train(name: str, **single: Any) -> dict[str, Any]:
    trace = Trace()
    strategy = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": RANKS, **single}
    # A rate at which a step of gates and values shows in what the next one reads.
    settings = {"limit_val_batches": 0, "use_distributed_sampler": False, "max_epochs": 2, **strategy}
    module = FILTERED.fit(MAKES[name](), trace, module=Module(), **settings).lightning_module
    kept = [int((offset.delta != 0).sum()) for offset in sparse_offsets(module)]
    return {"parameters": trace.parameters, "read": trace.read, "kept": kept}


def run() -> dict[str, Any]:
    return {name: train(name) for name in MAKES}
