"""Batches of rows of similar length: the same on every machine, resumable, and equal over processes."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

MEGABATCH = 100


class Positions(list[int]):
    """Positions of the rows of a batch, and the epoch that it belongs to: it reaches the data set in its workers.

    Args:
        positions: Positions in the data set.
        epoch: The epoch, from 0.
    """

    def __init__(self, positions: Iterable[int], epoch: int) -> None:
        super().__init__(positions)
        self.epoch = epoch


# A DistributedSampler, because that is what makes Lightning leave a sampler in place under DDP (it wraps every other
# kind) and call `set_epoch` on it.
class LengthBucketSampler(DistributedSampler[list[int]]):
    """Yields lists of row numbers (:class:`Positions`), each one batch of rows of similar length.

    For ``DataLoader(dataset, sampler=sampler, batch_size=None)``: the dataset is indexed with a whole batch.

    Training (``shuffle=True``): the order is a function of ``(seed, epoch)`` alone. Rows are permuted, cut into
    megabatches, sorted by length inside each (ties stay shuffled), cut into global batches of
    ``batch_size * num_replicas`` rows, and the batches are shuffled; the costliest one comes first, so that too small a
    memory shows at once. Rank ``r`` takes every ``num_replicas``-th row of each global batch: the ranks' rows are
    alike in length, and together they are the batch that one process with the global batch size would take. Only the
    last global batch may be short; its rows are repeated as far as needed to give every rank the same number.

    Evaluation (``shuffle=False``): every row once, longest first, in batches of nearly equal size. Every rank gets the
    same number of batches, none of them empty, since DDP broadcasts buffers in each forward. The one price: with
    ``batch_size=1`` and rows that do not divide by the ranks, a batch holds two rows.

    Args:
        lengths: Length of each row in tokens, ``(rows,)``.
        batch_size: Rows of a batch on one rank.
        shuffle: Training order if true, evaluation order if false.
        seed: Seed of the training order.
        num_replicas: Number of processes.
        rank: This process.
        megabatch: Global batches that are sorted together. More waste less padding and mix rows less; 1 gives plain
            random batches. Padding on SST-2 (batch 32), per real token: 0.03 at 100, 0.05 at 50, 0.12 at 20, 2.0 at 1.

    Raises:
        ValueError: No rows, fewer rows than ranks in evaluation, or a size below 1.

    Example:
        >>> sampler = LengthBucketSampler([5, 9, 1, 7], batch_size=2, shuffle=False)
        >>> list(sampler)
        [[1, 3], [0, 2]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        megabatch: int = MEGABATCH,
    ) -> None:
        for name, value in {"batch_size": batch_size, "megabatch": megabatch, "num_replicas": num_replicas}.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if len(lengths) < (1 if shuffle else num_replicas):
            raise ValueError(
                f"{len(lengths)} rows cannot be split over {num_replicas} processes without repeating any: "
                "use fewer devices or more rows"
            )
        super().__init__(
            cast("Dataset[Any]", lengths), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed
        )
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self.batch_size = batch_size
        self.megabatch = megabatch
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch on one rank, also when an epoch is resumed in its middle."""
        rows = len(self.lengths)
        batches = -(-rows // (self.batch_size * self.num_replicas))
        return batches if self.shuffle else min(batches, rows // self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, so that the resumed position is spent on the first batch drawn: a DataLoader with workers makes
        # two iterators and draws from the second.
        epoch, batch = self._resume or (self.epoch, 0)
        self._resume = None
        first = batch if epoch == self.epoch else 0
        yield from [Positions(part, self.epoch) for part in self._batches()[first:]]

    def resume_at(self, epoch: int, batch: int) -> None:
        """Set the epoch, and let its first iteration (only) begin at a batch.

        Args:
            epoch: Epoch to iterate, from 0. Set at once, for workers that iterate before ``set_epoch`` is called.
            batch: First batch to yield, from 0; from ``len(self)`` on, the epoch begins at its start.

        Raises:
            ValueError: A negative position.
        """
        if epoch < 0 or batch < 0:
            raise ValueError(f"epoch and batch must be 0 or more, got {epoch} and {batch}")
        self.set_epoch(epoch)
        self._resume = (epoch, batch if batch < len(self) else 0)

    def identity(self) -> dict[str, int]:
        """What fixes the order of batches, as plain integers: equal identities give equal epochs."""
        return {
            "rows": len(self.lengths),
            "lengths": zlib.crc32(self.lengths.numpy().tobytes()),
            "global_batch": self.batch_size * self.num_replicas,
            "megabatch": self.megabatch,
            "seed": self.seed,
        }

    def _batches(self) -> list[list[int]]:
        if not self.shuffle:
            order = torch.sort(self.lengths, descending=True, stable=True).indices
            return [part.tolist() for part in order[self.rank :: self.num_replicas].tensor_split(len(self))]

        width = self.batch_size * self.num_replicas
        # Not `seed + epoch`: seed 0 in epoch 1 must not be seed 1 in epoch 0.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(32))
        rows = torch.randperm(len(self.lengths), generator=generator)
        bucket = torch.arange(len(rows)) // (self.megabatch * width)
        rows = rows[torch.argsort(bucket * (self.lengths.max() + 1) - self.lengths[rows], stable=True)]

        batches = list(torch.split(rows, width))
        order = torch.randperm(len(batches), generator=generator)
        cost = self.lengths[rows[::width]] * torch.tensor([len(batch) for batch in batches])
        first = int(cost[order].argmax())
        order[[0, first]] = order[[first, 0]]

        last = batches[-1]
        even = -(-len(last) // self.num_replicas) * self.num_replicas
        batches[-1] = last[torch.arange(even) % len(last)]
        return [batches[i][self.rank :: self.num_replicas].tolist() for i in order.tolist()]


def padding_waste(lengths: Sequence[int] | Tensor, batches: Sequence[Sequence[int]]) -> float:
    """Padding tokens over real tokens, when each batch is padded to its longest row.

    Args:
        lengths: Length of each row in tokens, ``(rows,)``.
        batches: Row numbers of each batch.

    Example:
        >>> padding_waste([1, 3, 4], [[0, 1], [2]])
        0.25
    """
    parts = [torch.as_tensor(lengths)[torch.as_tensor(batch)] for batch in batches]
    real = sum(int(part.sum()) for part in parts)
    return sum(int(part.max()) * len(part) for part in parts) / real - 1
