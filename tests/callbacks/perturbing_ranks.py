"""Two processes that train with perturbation methods: :func:`run`, for ``tests.ranks``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from lightning_ft.callbacks.free_lb import FreeLB
from lightning_ft.callbacks.pgd import PGD
from lightning_ft.callbacks.r3f import R3F
from lightning_ft.callbacks.r_drop import RDrop
from lightning_ft.callbacks.smart import SMART
from tests.ddp_worker import Module
from tests.ranks import RANKS
from tests.strangers import FILTERED, weights

# Without noise, which would not be the same for one process: what is drawn belongs to a rank.
METHODS: dict[str, Callable[[], Callback]] = {
    "r3f": lambda: R3F(1.0, 0.0, dropout="shared"),
    "r-drop": lambda: RDrop(2.0),
    "smart": lambda: SMART(0.0, 2.0, betas=(0.5, 0.9), switch="3 steps"),
    "free-lb": lambda: FreeLB(0.5, 3, magnitude=0.0),
    "pgd": lambda: PGD(0.5, steps=2),
}


def train(name: str, **options: Any) -> dict[str, torch.Tensor]:
    trainer = FILTERED.fit(
        METHODS[name](), module=Module(), max_epochs=1, limit_val_batches=0, use_distributed_sampler=False, **options
    )
    return weights(trainer.lightning_module)


def run() -> dict[str, Any]:
    results = {}
    for name in METHODS:
        strategy = DDPStrategy(process_group_backend="gloo", static_graph=name == "free-lb")
        results[name] = train(name, strategy=strategy, devices=RANKS, accelerator="cpu")
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
    results["free-lb/2"] = train("free-lb", strategy=strategy, devices=RANKS, accumulate_grad_batches=2)
    return results
