"""Several rows in one sequence: which ones, in what order, and the batch that they make."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import override

from lightning_ft.data.encoding import EncodedRows, fill
from lightning_ft.data.sampler import LengthBucketSampler


class PackSampler(LengthBucketSampler):
    """Yields lists of packs, each one batch; a pack is a list of row numbers that together fill one sequence.

    For ``DataLoader(PackedRows(…), sampler=sampler, batch_size=None)``, in training. The order is a function of
    ``(seed, epoch)`` alone. Which lengths share a pack is decided once, best fit from the longest to the shortest, so
    that every epoch has as many batches; each epoch shuffles which of the rows of a length goes where, and the packs.
    For that, lengths within 1/128 of the capacity count as the same. Rank ``r`` takes every ``num_replicas``-th pack of
    a global batch; packs of the last one are repeated as far as needed to give every rank the same number.

    Args:
        lengths: Length of each row in tokens, ``(rows,)``.
        batch_size: Packs of a batch on one rank.
        capacity: Tokens of a pack, at most.
        seed: Seed of the order.
        num_replicas: Number of processes.
        rank: This process.

    Raises:
        ValueError: A row longer than the capacity, no rows, or a size below 1.

    Example:
        >>> sampler = PackSampler([5, 9, 1, 7], batch_size=2, capacity=10)
        >>> sampler.packs, len(sampler), sorted(sorted(pack) for batch in sampler for pack in batch)
        (3, 2, [[0], [1, 2], [3]])

    Reference:
        Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination": packs of a histogram of lengths.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        batch_size: int,
        capacity: int,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(lengths, batch_size, seed=seed, num_replicas=num_replicas, rank=rank)
        if (longest := int(self.lengths.max())) > capacity:
            raise ValueError(f"a row of {longest} tokens does not fit into packs of {capacity}: cut it, or raise them")
        self.capacity = capacity
        grain = max(1, capacity // 128)
        self._sizes = (-(-self.lengths // grain) * grain).clamp(max=capacity)
        self._pack_of = torch.tensor(_best_fit(self._sizes.sort(descending=True).values.tolist(), capacity))
        self.packs = int(self._pack_of.max()) + 1

    @override
    def __len__(self) -> int:
        return -(-self.packs // (self.batch_size * self.num_replicas))

    @override
    def identity(self) -> dict[str, int]:
        known = super().identity()
        del known["megabatch"]
        return {**known, "capacity": self.capacity, "packs": self.packs}

    @override
    def _batches(self) -> list[list[list[int]]]:  # type: ignore[override]  # its rows are packs
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(32))
        rows = torch.randperm(len(self.lengths), generator=generator)
        # Stable: rows of one length stay shuffled, and the i-th longest goes into the i-th place.
        rows = rows[self._sizes[rows].argsort(descending=True, stable=True)]
        pack_of = torch.randperm(self.packs, generator=generator)[self._pack_of]
        parts = torch.split(rows[pack_of.argsort(stable=True)], torch.bincount(pack_of).tolist())
        packs = [part.tolist() for part in parts]

        width = self.batch_size * self.num_replicas
        batches = [packs[first : first + width] for first in range(0, len(packs), width)]
        last = batches[-1]
        even = -(-len(last) // self.num_replicas) * self.num_replicas
        batches[-1] = [last[i % len(last)] for i in range(even)]
        return [batch[self.rank :: self.num_replicas] for batch in batches]


def _best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """The pack of each row: of those that have the room, the one with the least. Lengths from long to short."""
    chosen, count = [], 0
    rooms: list[int] = []
    packs: dict[int, list[int]] = {}
    for length in lengths:
        place = bisect_left(rooms, length)
        if place == len(rooms):
            pack, room, count = count, capacity, count + 1
        else:
            room = rooms[place]
            pack = packs[room].pop()
            if not packs[room]:
                del rooms[place]
        left = room - length
        if not packs.setdefault(left, []):
            insort(rooms, left)
        packs[left].append(pack)
        chosen.append(pack)
    return chosen


class PackedRows(TorchDataset[dict[str, Any]]):
    """Rows of tokens; a list of packs of positions gives one batch, a pack to a sequence.

    Args:
        documents: The rows; their table has ``input_ids`` and ``labels``.
    """

    def __init__(self, documents: EncodedRows) -> None:
        self.documents = documents
        self.rows = documents.rows
        self.lengths = documents.lengths
        self._padding = replace(documents.padding, left=False)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, packs: Sequence[Sequence[int] | int]) -> dict[str, Any]:
        """A batch of tensors.

        Args:
            packs: For each sequence the positions in the set of its rows; a number alone is a pack of one row.

        Returns:
            ``input_ids``, ``labels`` (-100 at the padding and at the first token of each row, which nothing comes
            before) and ``position_ids`` (from 0 in each row, and in the padding), ``(packs, width)`` each; ``row``, the
            rows' numbers in the source, pack by pack, ``(rows,)``. There is no ``attention_mask``: the positions say
            where rows begin.
        """
        inside = [[pack] if isinstance(pack, int) else list(pack) for pack in packs]
        positions = torch.tensor([position for pack in inside for position in pack])
        rows, lengths = self.rows[positions], self.lengths[positions]
        ends = lengths.cumsum(0)
        pack_ends = ends[torch.tensor([len(pack) for pack in inside]).cumsum(0) - 1]
        totals = pack_ends.diff(prepend=torch.zeros(1, dtype=torch.int64))

        mask = self._padding.mask(totals)
        since = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
        places = (torch.arange(mask.shape[1]) - totals[:, None]).masked_scatter_(mask, since)
        table = self.documents.tokens[rows.tolist()]
        ids, labels = (
            fill(table[name].combine_chunks(), mask, self._padding.of_column(name)) for name in ("input_ids", "labels")
        )
        return {
            "input_ids": ids,
            "labels": labels.masked_fill_(places == 0, -100),
            "position_ids": places,
            "row": rows,
        }

    # A DataLoader that batches by itself calls this one, and hands the result to `collate_fn`.
    __getitems__ = __getitem__
