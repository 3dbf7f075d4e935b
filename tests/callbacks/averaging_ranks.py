"""Two processes that average weights, whole (DDP) and sharded (FSDP2): :func:`run`, for ``tests.ranks``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_ft.callbacks.checkpoint_average import CheckpointAverage
from lightning_ft.callbacks.ema import EMA
from tests.ranks import RANKS
from tests.sharded_worker import SHARDINGS, HeadFirst, SaveAt, model_parallel, whole
from tests.strangers import BATCH, FILTERED

MAKES: dict[str, Callable[[], Callback]] = {
    "ema": partial(EMA, 0.7),
    "checkpoint-average": CheckpointAverage,
    "last": partial(CheckpointAverage, 2),
}


class Validated(HeadFirst):
    """Validates, so that the mean is put in and taken out."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def on_validation_epoch_end(self) -> None:
        """Logs nothing: the base's score differs between the ranks."""

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train_dataloader().dataset, BATCH)


def train(sharding: str | None, *callbacks: Callback, **options: Any) -> dict[str, Tensor]:
    shard, strategy = SHARDINGS[sharding] if sharding else (lambda module: None, lambda: "auto")
    defaults = {"strategy": strategy(), "devices": RANKS if sharding else 1, "max_epochs": 3}
    module = Validated(shard, partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    settings = {**defaults, "use_distributed_sampler": False, "val_check_interval": 2, "num_sanity_val_steps": 0}
    return whole(FILTERED.fit(*callbacks, module=module, **{**settings, **options}))


def single(name: str) -> dict[str, Tensor]:
    return train(None, MAKES[name]())


class SaveAfter(Callback):
    """A checkpoint when the module holds its mean."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def run() -> dict[str, Any]:
    folder = [tempfile.mkdtemp()]
    results: dict[str, Any] = {}
    for name, make in MAKES.items():
        results[f"ddp/{name}"] = train("ddp", make(), strategy=_ddp())
        torch.distributed.broadcast_object_list(folder)
        middle, end = str(Path(folder[0]) / f"{name}.ckpt"), str(Path(folder[0]) / f"{name}-end.ckpt")
        results[f"fsdp2/{name}"] = train("fsdp2-whole", make(), SaveAt(8, middle), SaveAfter(end))
        results[f"resumed/{name}"] = train("fsdp2-whole", make(), strategy=model_parallel(), ckpt_path=middle)
        results[f"saved/{name}"] = dict(torch.load(end, weights_only=True)["state_dict"])
    return results


def _ddp() -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(process_group_backend="gloo")
