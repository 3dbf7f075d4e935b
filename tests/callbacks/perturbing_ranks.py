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
from lightning_ft.functional.perturbed_embeddings import PerturbedEmbeddings
from tests.ddp_worker import Module
from tests.ranks import RANKS
from tests.sharded_worker import HeadFirst, fsdp2, fsdp2_whole, lightnings_fsdp1, model_parallel
from tests.strangers import FILTERED

# Without noise, which would not be the same for one process: what is drawn belongs to a rank.
METHODS: dict[str, Callable[[], Callback]] = {
    "r3f": lambda: R3F(1.0, 0.0, dropout="shared"),
    "r-drop": lambda: RDrop(2.0),
    "smart": lambda: SMART(0.0, 2.0, betas=(0.5, 0.9), switch="3 steps"),
    "free-lb": lambda: FreeLB(0.5, 3, magnitude=0.0),
    "pgd": lambda: PGD(0.5, steps=2),
}
SHARDED = ("r3f", "free-lb", "pgd")


class Whole(Callback):
    """The whole weights at the end, and whether the model is seen to be sharded."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.sharded = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        words = PerturbedEmbeddings(pl_module)
        self.sharded = words.sharded
        words.remove()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in pl_module.parameters())
        self.weights = [p.detach().clone() for p in whole]


def train(name: str, module: Any, *, sharded: bool = False, **options: Any) -> list[torch.Tensor]:
    whole = Whole()
    quiet = {"limit_val_batches": 0, "use_distributed_sampler": False, "max_epochs": 1}
    FILTERED.fit(METHODS[name](), whole, module=module, **quiet, **options)
    assert whole.sharded == sharded
    return whole.weights


def refused(name: str) -> str:
    try:
        train(name, HeadFirst(), strategy=lightnings_fsdp1(), devices=RANKS, accelerator="cpu")
    except ValueError as error:
        return str(error)
    return ""


def run() -> dict[str, Any]:
    both: dict[str, Any] = {"devices": RANKS, "accelerator": "cpu"}
    results: dict[str, Any] = {}
    for name in METHODS:
        strategy = DDPStrategy(process_group_backend="gloo", static_graph=name == "free-lb")
        results[f"{name}/ddp"] = train(name, Module(), strategy=strategy, **both)
    strategy = DDPStrategy(process_group_backend="gloo")
    results["free-lb/accumulated"] = train("free-lb", Module(), strategy=strategy, accumulate_grad_batches=2, **both)
    for name in SHARDED:
        results[f"{name}/fsdp2"] = train(name, HeadFirst(fsdp2), sharded=True, strategy=model_parallel(), **both)
    results["free-lb/fsdp2-whole"] = train(
        "free-lb", HeadFirst(fsdp2_whole), sharded=True, strategy=model_parallel(), **both
    )
    results["fsdp1"] = refused("free-lb")
    return results
