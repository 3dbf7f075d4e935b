"""The Fisher information of a trained module over its data, in whatever way its trainer runs."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_ft.core.fisher import Fisher, Variant
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.report import Report
from lightning_ft.functional.fisher import FisherEstimate, merge_ranks
from lightning_ft.modules import TransformerModule

Split = Literal["train", "val"]
_STAGES = {"train": "fit", "val": "validate"}


def fisher_of_task(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule,
    out: str | os.PathLike[str],
    *,
    ckpt_path: str | os.PathLike[str] | None = None,
    variant: Variant = "exact",
    limit: int | None = 1000,
    split: Split = "train",
    previous: str | os.PathLike[str] | None = None,
    gamma: float = 1.0,
    head: bool = False,
) -> Report:
    """Compute F over the data of a task, as an evaluation of ``trainer`` does: on its devices, with its progress bar.

    Processes share the data as the data module's samplers do, and their means are weighted by their examples; a sampler
    may repeat a row or two to give all the same number. The file is written once, at the end, by the first process.

    Args:
        trainer: Runs it. Its callbacks see an evaluation.
        model: The module, of which ``ckpt_path`` holds the trained weights.
        datamodule: The old task's data.
        out: The file to write or replace.
        ckpt_path: The checkpoint.
        variant: See :func:`~lightning_ft.functional.fisher_diagonal`.
        limit: Number of examples, over all processes; None for all. Of ``val`` the batches are spread over its rows.
        split: ``"train"`` (in training's order) or ``"val"``.
        previous: A file of earlier tasks, to which this one is added (online EWC).
        gamma: What earlier tasks are multiplied by, in [0, 1].
        head: Whether the head is among the parameters: a new task has another one.

    Returns:
        A table of the layer groups.

    Raises:
        ValueError: There is no data, or nothing to weigh; earlier tasks are of another variant or other parameters.
    """
    if datamodule is None:
        raise ValueError("the Fisher information is one of data: give data: in the configuration, the old task's")
    earlier = None if previous is None else Fisher.load(previous)
    if earlier is not None:
        # What cannot be merged is refused before the work, not after it.
        earlier.merge(Fisher(earlier.tensors, 0, variant), gamma)
    if ckpt_path is None and isinstance(model, TransformerModule) and not model.head_is_pretrained:
        rank_zero_warn(
            "without --ckpt_path the Fisher information is that of a model with a new head, which knows nothing of the "
            "task: name the checkpoint of the old task's training"
        )
    run = _FisherPass(model, datamodule, Path(out), variant=variant, limit=limit, split=split, head=head)
    run.earlier, run.gamma = earlier, gamma
    with warnings.catch_warnings():
        # Of training data: the order is of no account here.
        warnings.filterwarnings("ignore", message=".*sampler has shuffling enabled")
        trainer.validate(run, ckpt_path=None if ckpt_path is None else os.fspath(ckpt_path), verbose=False)
    return run.report()


class _FisherPass(LightningModule):
    """Takes the module's place in an evaluation, and for each of its batches adds to the estimate."""

    def __init__(
        self,
        target: LightningModule,
        data: LightningDataModule,
        out: Path,
        *,
        variant: Variant,
        limit: int | None,
        split: Split,
        head: bool,
    ) -> None:
        super().__init__()
        if split not in _STAGES:
            raise ValueError(f"split={split!r} must be one of {', '.join(_STAGES)}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} must be 1 or more: it is a number of examples")
        self.target = target
        self.data = data
        self.out = out
        self.variant: Variant = variant
        self.limit = limit
        self.split: Split = split
        self.head = head
        self.earlier: Fisher | None = None
        self.gamma = 1.0
        self.fisher: Fisher | None = None
        self._estimate: FisherEstimate | None = None
        self._every = 1

    # ---- what the trainer asks of a module is the target's

    @override
    def prepare_data(self) -> None:
        self.data.trainer = None  # so that it prepares all splits, and not those of a validation
        self.data.prepare_data()
        self.target.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer
        self.data.setup(_STAGES[self.split])
        self.target.setup(_STAGES[self.split])

    @override
    def configure_model(self) -> None:
        self.target.configure_model()

    @override
    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.target.load_state_dict(*args, **options)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.target.on_load_checkpoint(checkpoint)

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.target.on_before_batch_transfer(batch, dataloader_idx)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self.target.transfer_batch_to_device(batch, device, dataloader_idx)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.target.on_after_batch_transfer(batch, dataloader_idx)

    @override
    def val_dataloader(self) -> Any:
        loader = self.data.train_dataloader() if self.split == "train" else self.data.val_dataloader()
        needed, there = _batches(loader, self._share())
        if needed < there and self.split == "train":
            self.trainer.limit_val_batches = needed
        elif needed < there:  # evaluation has the longest rows first: a few from everywhere
            self._every = there // needed
        return loader

    # ---- the pass

    def _share(self) -> int | None:
        """How many examples this process takes of those wanted."""
        if self.limit is None:
            return None
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        return max(1, self.limit // processes + (rank < self.limit % processes))

    @override
    def on_validation_start(self) -> None:
        groups = LayerGroups.of(self.target)
        names = [
            name
            for group in groups
            for name, parameter in groups.named_parameters(group)
            if parameter.requires_grad and (self.head or group != "head")
        ]
        self._estimate = FisherEstimate(
            self.target,
            self.variant,
            parameters=names,
            limit=self._share(),
            generator=torch.Generator().manual_seed(self.trainer.global_rank),
        )

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert self._estimate is not None
        if batch_idx % self._every == 0 and not self._estimate.done:
            self._estimate.add(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        assert self._estimate is not None
        fisher = merge_ranks(self._estimate.result())
        if fisher.examples == 0:
            raise ValueError(f"the {self.split} split gave no example")
        self.fisher = fisher if self.earlier is None else self.earlier.merge(fisher, self.gamma)
        # Here, since processes that were spawned do not come back.
        if self.trainer.is_global_zero:
            self.fisher.save(self.out)

    def report(self) -> Report:
        assert self._estimate is not None
        assert self.fisher is not None
        tensors, total = self.fisher.tensors, self.fisher.trace()
        groups = LayerGroups.of(self.target)
        rows = []
        for group in groups:
            own = [tensors[name] for name, _ in groups.named_parameters(group) if name in tensors]
            trace = Fisher(dict(enumerate(own)), 0, self.variant).trace()  # type: ignore[arg-type]
            rows.append(
                {
                    "group": group,
                    "parameters": sum(tensor.numel() for tensor in own),
                    "trace": trace,
                    "share %": round(100 * trace / total, 1) if total else 0.0,
                    "max": max((float(tensor.max()) for tensor in own if tensor.numel()), default=0.0),
                }
            )
        why = self._estimate.why_not
        facts = {
            "variant": self.variant,
            "examples": self.fisher.examples,
            "trace": total,
            "mean": total / max(1, sum(tensor.numel() for tensor in tensors.values())),
            "batches": "whole" if self._estimate.vectorised else f"one example at a time ({why or 'as they came'})",
            **({"earlier tasks times": self.gamma} if self.earlier is not None else {}),
            "file": os.fspath(self.out),
            "MB": round(self.out.stat().st_size / 1e6, 1) if self.out.exists() else None,
        }
        return Report("Fisher information", facts, rows)


def _batches(loader: Any, examples: int | None) -> tuple[int, int]:
    """How many batches of a loader hold so many examples, and how many it has; two zeros where there is no telling."""
    if examples is None or not isinstance(loader, DataLoader):
        return 0, 0
    try:
        rows, there = len(loader.dataset), len(loader)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return 0, 0
    if isinstance(loader.sampler, DistributedSampler):  # else the trainer is yet to share it out
        rows //= loader.sampler.num_replicas
    return math.ceil(examples / max(1, rows // max(1, there))), there
