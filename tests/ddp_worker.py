"""One of two processes that train with DDP on a CPU: ``python -m tests.ddp_worker RANK STORE OUT SCENARIO...``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.callbacks import L2SP, DiscriminativeLR, GradualUnfreezing, _freezing, _trainer
from tests.strangers import BATCH, FILTERED, Filtered, dataset, weights

RANKS = 2


class Module(Filtered):
    """No dropout and plain SGD, so that two processes must do what one does with the batches of both."""

    def __init__(self) -> None:
        super().__init__(dropout=0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        tokens, labels = dataset().tensors
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(TensorDataset(tokens[rank::world], labels[rank::world]), BATCH // world)


class Trace(Callback):
    """All weights after each batch, and the number of tensors that trained in it."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.trainable: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))
        self.trainable.append(sum(p.requires_grad for p in pl_module.parameters()))


# Name to callbacks, options of the Trainer and options of DDPStrategy.
SCENARIOS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "epochs": (lambda: [GradualUnfreezing("1 epoch")], {"max_epochs": 5}, {}),
    "steps": (lambda: [GradualUnfreezing("2 steps")], {}, {}),
    "accumulation": (lambda: [GradualUnfreezing("0.5 epochs")], {"accumulate_grad_batches": 2, "max_epochs": 3}, {}),
    "find-unused": (lambda: [GradualUnfreezing("2 steps")], {}, {"find_unused_parameters": True}),
    "bucket-view": (lambda: [GradualUnfreezing("2 steps")], {}, {"gradient_as_bucket_view": True}),
    "all-three": (
        lambda: [DiscriminativeLR(0.5), GradualUnfreezing("2 steps"), L2SP(0.5, head_strength=0.1)],
        {"gradient_clip_val": 1.0},
        {},
    ),
    "all-three-decoupled": (
        lambda: [L2SP(0.5, "decoupled", head_strength=0.1), GradualUnfreezing("2 steps"), DiscriminativeLR(0.5)],
        {"accumulate_grad_batches": 2, "max_epochs": 3},
        {"find_unused_parameters": True},
    ),
}
REFUSED = {"static-graph": (lambda: [GradualUnfreezing("2 steps")], {}, {"static_graph": True})}
MUTANT = {"not-wrapped-anew": SCENARIOS["steps"]}
"""The same as "steps" while ``rewrap_ddp`` works at the first freeze only."""


def train(scenario: tuple[Any, dict[str, Any], dict[str, Any]], **single: Any) -> dict[str, Any]:
    callbacks, options, ddp = scenario
    strategy = {"strategy": DDPStrategy(process_group_backend="gloo", **ddp), "devices": RANKS, **single}
    trace = Trace()
    try:
        trainer = FILTERED.fit(
            *callbacks(),
            trace,
            module=Module(),
            limit_val_batches=0,
            use_distributed_sampler=False,
            **{**strategy, **options},
        )
    except ValueError as error:
        return {"error": str(error)}
    return {"trace": trace.weights, "trainable": trace.trainable, "weights": weights(trainer.lightning_module)}


def main(rank: str, port: str, out: str) -> None:
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ.update(settings, LOCAL_RANK=rank, RANK=rank)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified in DDP constructor")
    torch.set_num_threads(1)
    results = {name: train(scenario) for name, scenario in {**SCENARIOS, **REFUSED}.items()}

    calls: list[Any] = []
    _freezing.rewrap_ddp = lambda trainer: calls or calls.append(_trainer.rewrap_ddp(trainer))
    results |= {name: train(scenario) for name, scenario in MUTANT.items()}
    torch.save(results, Path(out) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
