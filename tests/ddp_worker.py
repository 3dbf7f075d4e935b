"""One of two processes that train with DDP on a CPU: ``python -m tests.ddp_worker RANK STORE OUT SCENARIO...``."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.callbacks import EWC, L2SP, DiscriminativeLR, GradualUnfreezing, _freezing, _trainer
from lightning_ft.core.phases import Phase
from lightning_ft.core.plateau import Plateau
from tests.fisher_file import fisher_file
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


class Scored(Module):
    """Logs a value after each validation: on rank 0 it gets worse, so that phases end, on rank 1 it gets better."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log("score", self.trainer.fit_loop.total_batch_idx * (-1.0 if self.trainer.global_rank else 1.0))


class OldTask(LightningDataModule):
    """Two batches, of which each process takes one."""

    def train_dataloader(self) -> Any:
        return DataLoader(torch.utils.data.Subset(dataset(), range(2 * BATCH)), BATCH)


class Trace(Callback):
    """All weights after each batch, and the number of tensors that trained in it."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.trainable: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))
        self.trainable.append(sum(p.requires_grad for p in pl_module.parameters()))


def metric(**arguments: Any) -> GradualUnfreezing:
    return GradualUnfreezing(Plateau("score", reload_best=arguments.pop("reload_best", False)), **arguments)


def phases() -> list[Phase]:
    return [
        Phase("head"),
        Phase("top:1", "2 steps", 0.5),
        Phase("blocks", "1 epoch", 2.0, "3 steps"),
        Phase("all", 0.75),
    ]


Scenario = tuple[Any, dict[str, Any], dict[str, Any]]
TWICE = {"limit_val_batches": 1, "val_check_interval": 3, "num_sanity_val_steps": 0}
"""Two validations an epoch."""
# Name to callbacks, options of the Trainer and options of DDPStrategy.
SCENARIOS: dict[str, Scenario] = {
    "epochs": (lambda: [GradualUnfreezing("1 epoch")], {"max_epochs": 5}, {}),
    "steps": (lambda: [GradualUnfreezing("2 steps")], {}, {}),
    "accumulation": (lambda: [GradualUnfreezing("0.5 epochs")], {"accumulate_grad_batches": 2, "max_epochs": 3}, {}),
    "find-unused": (lambda: [GradualUnfreezing("2 steps")], {}, {"find_unused_parameters": True}),
    "find-unused-epochs": (lambda: [GradualUnfreezing("1 epoch")], {"max_epochs": 5}, {"find_unused_parameters": True}),
    "find-unused-metric": (lambda: [metric()], {**TWICE, "max_epochs": 5}, {"find_unused_parameters": True}),
    "bucket-view": (lambda: [GradualUnfreezing("2 steps")], {}, {"gradient_as_bucket_view": True}),
    "all-four": (
        lambda: [
            DiscriminativeLR(0.5),
            GradualUnfreezing("2 steps"),
            L2SP(0.5, head_strength=0.1),
            EWC(0.5, OldTask(), variant="empirical", examples=8),
        ],
        {"gradient_clip_val": 1.0},
        {},
    ),
    "all-four-decoupled": (
        lambda: [
            L2SP(0.5, "decoupled", head_strength=0.1),
            EWC(0.5, fisher_file(), mode="decoupled"),
            GradualUnfreezing("2 steps"),
            DiscriminativeLR(0.5),
        ],
        {"accumulate_grad_batches": 2, "max_epochs": 3},
        {"find_unused_parameters": True},
    ),
    "metric": (lambda: [metric()], {**TWICE, "max_epochs": 5}, {}),
    "metric-best": (lambda: [metric(reload_best=True)], {**TWICE, "max_epochs": 5}, {}),
    "phases": (lambda: [DiscriminativeLR(0.5), GradualUnfreezing(phases=phases())], {}, {}),
    "chain-thaw": (lambda: [GradualUnfreezing("2 steps", previous="freeze")], {}, {}),
    "chain-thaw-metric": (lambda: [metric(previous="freeze")], {**TWICE, "max_epochs": 6}, {}),
    "norms": (lambda: [GradualUnfreezing("2 steps", norms="always")], {}, {"find_unused_parameters": True}),
}
REFUSED: dict[str, Scenario] = {
    "static-graph": (lambda: [GradualUnfreezing("2 steps")], {}, {"static_graph": True}),
    "missing-metric": (lambda: [GradualUnfreezing(Plateau("accuracy"))], TWICE, {}),
}
NOT_WRAPPED: dict[str, Scenario] = {"not-wrapped-anew": SCENARIOS["steps"]}
"""The same as "steps" while ``rewrap_ddp`` works at the first freeze only."""
UNCHECKED: dict[str, Scenario] = {"not-wrapped-anew-unchecked": SCENARIOS["steps"]}
"""The same once more without the comparison of the ranks."""


def train(scenario: Scenario, **single: Any) -> dict[str, Any]:
    callbacks, options, ddp = scenario
    strategy = {"strategy": DDPStrategy(process_group_backend="gloo", **ddp), "devices": RANKS, **single}
    trace = Trace()
    result: dict[str, Any] = {"trace": trace.weights, "trainable": trace.trainable}
    module = Scored() if "limit_val_batches" in options else Module()
    folder = tempfile.mkdtemp()
    settings = {"limit_val_batches": 0, "use_distributed_sampler": False, "default_root_dir": folder, **strategy}
    settings |= options
    try:
        trainer = FILTERED.fit(*callbacks(), trace, module=module, **settings)
    except (ValueError, RuntimeError) as error:
        return {**result, "error": str(error)}
    return {**result, "weights": weights(trainer.lightning_module)}


def main(rank: str, port: str, out: str) -> None:
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ.update(settings, LOCAL_RANK=rank, RANK=rank)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True")
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified in DDP constructor")
    torch.set_num_threads(1)
    results = {name: train(scenario) for name, scenario in {**SCENARIOS, **REFUSED}.items()}

    calls: list[Any] = []
    _freezing.rewrap_ddp = lambda trainer: calls or calls.append(_trainer.rewrap_ddp(trainer))
    results |= {name: train(scenario) for name, scenario in NOT_WRAPPED.items()}
    calls.clear()
    _freezing.check_ranks = lambda *args: None
    results |= {name: train(scenario) for name, scenario in UNCHECKED.items()}
    torch.save(results, Path(out) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
