"""The training batches once more, read from the data set behind the trainer's loader, whose position stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

Path = tuple[Any, ...]


def column_paths(batch: Any, columns: Mapping[str, Tensor]) -> dict[str, Path] | None:
    """Where in a batch the tensors lie that a model was called with, found by identity; None if not all are in it."""
    places = {id(tensor): path for path, tensor in _tensors(batch)}
    paths = {name: places.get(id(column)) for name, column in columns.items()}
    return None if None in paths.values() else {name: path for name, path in paths.items() if path is not None}


def training_batches(trainer: Trainer) -> Iterator[Any] | None:
    """Every row of the training set in the order of the set, in batches as the training step gets them.

    The data set is read by a second loader, without shuffling. None where this cannot be done: an iterable data set,
    several loaders, or training that is limited to part of an epoch.
    """
    leaves = tree_leaves(trainer.train_dataloader)
    if len(leaves) != 1 or not isinstance(leaves[0], DataLoader) or isinstance(leaves[0].dataset, IterableDataset):
        return None
    loader: DataLoader[Any] = leaves[0]
    if trainer.num_training_batches < len(loader):
        return None
    return _read(trainer, loader)


def column(batch: Any, path: Path) -> Tensor:
    """The tensor at a path."""
    for step in path:
        batch = batch[step]
    assert isinstance(batch, Tensor)
    return batch


def _read(trainer: Trainer, loader: DataLoader[Any]) -> Iterator[Any]:
    rows = range(len(loader.dataset))  # type: ignore[arg-type]  # not an IterableDataset
    size = loader.batch_size or getattr(loader.sampler, "batch_size", None) or 32
    batches: Any = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    # Without a batch sampler the data set is indexed with what the sampler gives: rows, or whole batches of them.
    whole = loader.batch_sampler is None and hasattr(loader.sampler, "batch_size")
    order: dict[str, Any] = {"batch_size": None, "sampler": batches if whole else rows}
    again: DataLoader[Any] = DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        multiprocessing_context=loader.multiprocessing_context,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),
        **({"batch_sampler": batches} if loader.batch_sampler else order),
    )
    for batch in again:
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def _tensors(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from _tensors(batch[key], (*path, key))
    elif isinstance(batch, (tuple, list)):
        for i, part in enumerate(batch):
            yield from _tensors(part, (*path, i))
