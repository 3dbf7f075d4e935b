"""The Fisher information of an old task's data, computed when a fit starts and kept for when it is resumed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device, rank_zero_info

from lightning_ft.core.anchor import Anchor
from lightning_ft.core.fisher import Fisher, Variant
from lightning_ft.core.undisturbed import same_randomness
from lightning_ft.functional.fisher import FisherEstimate, merge_ranks


def fisher_of_old_task(
    trainer: Trainer,
    module: LightningModule,
    data: Any,
    anchor: Anchor,
    names: Sequence[str],
    file: str | None,
    *,
    variant: Variant,
    examples: int,
) -> tuple[Fisher, str]:
    """F of ``data`` at the weights that the fit starts from. Call on all processes, in ``on_fit_start``.

    Args:
        trainer: The trainer.
        module: The module, whose head is the old task's.
        data: The old task's LightningDataModule.
        anchor: The weights that the fit starts from.
        names: Of which parameters.
        file: Where an interrupted run wrote it.
        variant: Whose labels.
        examples: How many examples, over all processes.

    Returns:
        F, and the file that it is in.

    Raises:
        FileNotFoundError: The interrupted run's file is gone.
        ValueError: The parameters are sharded; the data have no example.
    """
    if file is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"{file}, the Fisher information of the interrupted run, is gone, and the weights to compute it anew "
                "have moved on: put it back, or pass a file, EWC(fisher=...), that lightning-ft fisher wrote"
            )
        return Fisher.load(file), file
    if any(hasattr(tensor, "placements") for tensor in anchor.tensors.values()):
        raise ValueError(
            "fisher is data, and the parameters are sharded over processes, of which none sees the gradients of one "
            "example: compute a file beforehand on one device, lightning-ft fisher --config OLD.yaml --out FILE, and "
            "pass it, EWC(fisher=FILE)"
        )
    rank_zero_info(f"EWC: computing the {variant} Fisher information of {examples} examples of {type(data).__name__}")
    estimate = FisherEstimate(module, variant, parameters=names, limit=-(-examples // trainer.world_size))
    # Processes may differ by a batch: none waits for another before the end. A loader draws a seed when it begins.
    with same_randomness():
        for batch in islice(_batches(trainer, data), trainer.global_rank, None, trainer.world_size):
            if estimate.done:
                break
            estimate.add(move_data_to_device(batch, module.device))
    fisher = merge_ranks(estimate.result())
    if fisher.examples == 0:
        raise ValueError(f"fisher={type(data).__name__}(...) gave no training batch: there is no old task to remember")
    name = f"{variant}-{examples}-{anchor.fingerprint()['sum_of_squares'].hex()}.safetensors"
    path = Path(trainer.default_root_dir) / "fisher" / name
    if trainer.is_global_zero:
        fisher.save(path)
    return fisher, str(path)


def _batches(trainer: Trainer, data: Any) -> Iterable[Any]:
    """The old task's training batches, all of them on each process: they know nothing of this trainer."""
    data.trainer = None
    if trainer.local_rank == 0:
        data.prepare_data()
    trainer.strategy.barrier()
    data.setup("fit")
    batches: Iterable[Any] = data.train_dataloader()
    return batches
