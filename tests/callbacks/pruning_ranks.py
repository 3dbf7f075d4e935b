"""Two processes that prune: :func:`run` and :func:`run_sharded`, for ``tests.ranks``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_ft.callbacks.head_importance import HeadImportance
from lightning_ft.callbacks.layer_drop import LayerDrop
from lightning_ft.callbacks.movement_pruning import MovementPruning
from tests import sharded_worker
from tests.ranks import RANKS
from tests.sharded_worker import SHARDINGS, whole
from tests.strangers import BATCH, FILTERED, ROWS, Filtered, dataset

MAKES: dict[str, Callable[[], list[Callback]]] = {
    "hard": lambda: [MovementPruning(0.3, warmup=0)],
    "global": lambda: [MovementPruning(0.3, scope="global")],
    "soft": lambda: [MovementPruning(0.2, "soft", penalty=4.0)],
    "layer-drop": lambda: [LayerDrop(0.5, seed=3)],
}


class Halves(Filtered):
    """Each rank has every second row of each global batch; without dropout, and with gradients that can be summed."""

    def __init__(self) -> None:
        super().__init__(dropout=0)

    def train_dataloader(self) -> Any:
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        rows = [i for i in range(ROWS) if i % ranks == rank]
        return DataLoader(Subset(dataset(), rows), BATCH // ranks)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])


class Trace(Callback):
    """All weights and masks, after each batch."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.states.append(torch.cat([t.detach().flatten().double() for t in pl_module.state_dict().values()]))


def train(name: str, **options: Any) -> list[Tensor]:
    trace = Trace()
    settings = {"strategy": "auto", "devices": 1, "use_distributed_sampler": False, "accumulate_grad_batches": 2}
    FILTERED.fit(*MAKES[name](), trace, module=Halves(), **{**settings, **options})
    return trace.states


def run() -> dict[str, list[Tensor]]:
    def strategy() -> DDPStrategy:
        return DDPStrategy(process_group_backend="gloo")

    return {name: train(name, strategy=strategy(), devices=RANKS) for name in MAKES}


def train_sharded(sharding: str | None) -> dict[str, Tensor]:
    """LayerDrop on a sharded model; whole weights at the end."""
    shard, strategy = SHARDINGS[sharding] if sharding else (lambda module: None, lambda: "auto")
    settings = {"strategy": strategy(), "devices": RANKS if sharding else 1, "use_distributed_sampler": False}
    module = sharded_worker.HeadFirst(shard)
    return whole(FILTERED.fit(LayerDrop(0.5, seed=3), module=module, **settings, limit_val_batches=0))


def refused(*callbacks: Callback) -> str:
    shard, strategy = SHARDINGS["fsdp2"]
    try:
        FILTERED.fit(
            *callbacks, module=sharded_worker.HeadFirst(shard), strategy=strategy(), devices=RANKS, max_steps=1
        )
    except ValueError as error:
        return str(error)
    return ""


def run_sharded() -> dict[str, Any]:
    results: dict[str, Any] = {name: train_sharded(name) for name in SHARDINGS}
    return results | {"movement": refused(MovementPruning()), "heads": refused(HeadImportance())}
