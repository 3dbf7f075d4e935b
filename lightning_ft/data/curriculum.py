"""Easy rows first: training batches drawn from a pool that grows with the model's competence."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ft.core.schedule import Duration
from lightning_ft.data.sampler import LengthBucketSampler, Positions
from lightning_ft.data.sources import Source, first_true, is_text, parse_number

if TYPE_CHECKING:
    import pyarrow as pa
    from lightning.pytorch import Trainer


def competence(t: float, *, duration: float, start: float = 0.01, power: float = 2.0) -> float:
    """The share of the rows, from the easiest on, that a model may be trained on after ``t`` optimiser steps.

    c(t) = min(1, (t·(1 − c₀ᵖ) / T + c₀ᵖ)^(1/p)): c₀ at the start, 1 from T on; with p = 2 the pool grows ever more
    slowly, so that new rows come in at a steady rate in relation to those already there.

    Args:
        t: Optimiser steps done.
        duration: T, the steps after which all rows are in use.
        start: c₀, in (0, 1].
        power: p; 1 grows linearly.

    Example:
        >>> [round(competence(t, duration=100), 4) for t in (0, 25, 50, 100)]
        [0.01, 0.5001, 0.7071, 1.0]

    Reference:
        Platanios et al. 2019, Competence-based Curriculum Learning for Neural Machine Translation.
    """
    if t <= 0:
        return start
    if t >= duration:
        return 1.0
    floor = start**power
    return float(min(1.0, (t * (1 - floor) / duration + floor) ** (1 / power)))


@dataclass(frozen=True)
class Curriculum:
    """Which rows are easy, and how fast harder ones join them: see `competence`.

    Args:
        difficulty: ``"length"`` (tokens of a row); ``"rarity"`` (−Σ log p of its tokens, with p their frequencies in
            the training rows); or the name of a column of numbers, larger for harder.
        until: When all rows are in use: ``"500 steps"`` (optimiser steps), ``"1 epoch"`` (as many steps as an epoch
            has), or a fraction of training (0.3). Authors suggest the steps after which training without a curriculum
            reaches 90 % of its final score.
        start: Share of the rows at the first step.
        power: 2 for the usual square root, 1 for linear growth.

    Raises:
        ValueError: A number out of range.

    Example:
        >>> Curriculum("rarity", until="2 epochs")
        Curriculum(difficulty='rarity', until='2 epochs', start=0.01, power=2.0)
    """

    difficulty: str = "length"
    until: str | float = "1 epoch"
    start: float = 0.01
    power: float = 2.0

    def __post_init__(self) -> None:
        Duration.parse(self.until, "until")
        if not 0 < self.start <= 1:
            raise ValueError(f"start={self.start} must be a share of the rows in (0, 1], such as 0.01")
        if not self.power > 0:
            raise ValueError(f"power={self.power} must be above 0: 2 for a square root, 1 for linear growth")

    @property
    def column(self) -> str | None:
        """The column that tells the difficulty, where it is not computed."""
        return None if self.difficulty in ("length", "rarity") else self.difficulty


class StepClock:
    """Optimiser steps of a training, told from its batches.

    Args:
        batches: Batches of an epoch.
        trainer: Tells how many batches make an optimiser step and how long training is; without one a batch is a step,
            and training has no end.
    """

    def __init__(self, batches: int, trainer: Trainer | None = None) -> None:
        limit: int | float = 1.0 if trainer is None else trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        epochs, steps = (None, -1) if trainer is None else (trainer.max_epochs, trainer.max_steps)
        self.accumulate = 1 if trainer is None else trainer.accumulate_grad_batches
        self.steps_per_epoch = -(-batches // self.accumulate)
        by_epochs = math.inf if epochs is None or epochs < 0 else epochs * self.steps_per_epoch
        self.total_steps = min(by_epochs, math.inf if steps < 0 else steps)

    def steps_before(self, epoch: int, batch: int) -> int:
        """Optimiser steps before a batch of an epoch."""
        return epoch * self.steps_per_epoch + batch // self.accumulate


class CurriculumSampler(LengthBucketSampler):
    """Yields batches drawn from the easiest rows, whose share grows as :func:`competence` says.

    Each global batch is drawn uniformly, without repetition, from the rows whose rank by difficulty within their class
    lies below c(t) times the class's rows: the classes keep their proportions, and each is there from the start. There
    are never fewer rows to draw from than a global batch has. t is the optimiser steps before the batch; an epoch has
    as many batches as without a curriculum. Once c has reached 1, an epoch is that of `LengthBucketSampler`: every row
    once, batched by length; until then, rows of a batch differ in length.

    A batch is a function of (seed, epoch, number of the batch): a resumed run draws the same ones, loader workers may
    run ahead, and each rank takes its rows of the same global batch.

    Args:
        lengths: Length of each row in tokens, ``(rows,)``.
        batch_size: Rows of a batch on one rank.
        difficulty: Of each row, larger for harder: ``(rows,)``.
        curriculum: How fast the pool grows.
        classes: Class number of each row, ``(rows,)``; None for no classes.
        trainer: Tells how many batches make an optimiser step and how long training is; without one a batch is a step.
        **options: Those of `LengthBucketSampler`.

    Raises:
        ValueError: A difficulty that is not finite, or ``until`` is a fraction of a training that has no end.
    """

    def __init__(
        self,
        lengths: Tensor,
        batch_size: int,
        *,
        difficulty: Tensor,
        curriculum: Curriculum,
        classes: Tensor | None = None,
        trainer: Trainer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(lengths, batch_size, shuffle=True, **options)
        if len(difficulty) != len(lengths) or not bool(torch.isfinite(difficulty.double()).all()):
            raise ValueError(f"difficulty must be {len(lengths)} finite numbers, one for each row")
        self.curriculum = curriculum
        self._order, self._shares = _entrances(difficulty, classes)
        self.keep_time(StepClock(len(self), trainer))

    def keep_time(self, clock: StepClock, place: Callable[[int, int], tuple[int, int]] | None = None) -> None:
        """Count optimiser steps by a clock: that of a training in which these batches are some of many.

        Args:
            clock: The clock.
            place: The training's epoch and the batch in it, given the epoch and the batch here; the same by default.

        Raises:
            ValueError: ``until`` is a fraction of a training that has no end.
        """
        until = Duration.parse(self.curriculum.until, "until")
        if until.unit == "fraction" and math.isinf(clock.total_steps):
            raise ValueError(
                f"until={self.curriculum.until!r} is a fraction of a training that has no end: set "
                'Trainer(max_epochs=...) or Trainer(max_steps=...), or write "500 steps" or "1 epoch"'
            )
        self.clock, self._place = clock, place
        self.duration = until.steps(steps_per_epoch=clock.steps_per_epoch, total_steps=clock.total_steps)

    def competence_at(self, batch: int) -> float:
        """c before a batch of the present epoch."""
        t = self.clock.steps_before(*(self._place or _same)(self.epoch, batch))
        return competence(t, duration=self.duration, start=self.curriculum.start, power=self.curriculum.power)

    def pool(self, batch: int) -> Tensor:
        """The rows that a batch of the present epoch is drawn from, easiest first, ``(pool,)``."""
        return self._order[: self._pool_size(batch)]

    @override
    def identity(self) -> dict[str, int]:
        settings = (self.duration, self.curriculum.start, self.curriculum.power, self.clock.accumulate)
        content = self._order.numpy().tobytes() + self._shares.numpy().tobytes()
        return {**super().identity(), "curriculum": zlib.crc32(repr(settings).encode(), zlib.crc32(content))}

    @override
    def __iter__(self) -> Iterator[list[int]]:
        if self.competence_at(0) >= 1:
            yield from super().__iter__()
            return
        # Drawn one by one: a batch needs no other of its epoch.
        epoch, first = self._resume or (self.epoch, 0)
        self._resume = None
        for batch in range(first if epoch == self.epoch else 0, len(self)):
            yield Positions(self._draw(batch), self.epoch)

    def _draw(self, batch: int) -> list[int]:
        size = min(self.batch_size * self.num_replicas, len(self._order))
        # Not torch's generator: a sample costs it a permutation of the whole pool.
        chosen = random.Random(f"{self.seed} {self.epoch} {batch}").sample(range(self._pool_size(batch)), size)
        rows = self._order[chosen]
        rows = rows[torch.argsort(self.lengths[rows], descending=True, stable=True)]
        even = -(-size // self.num_replicas) * self.num_replicas
        return rows[torch.arange(even) % size][self.rank :: self.num_replicas].tolist()

    def _pool_size(self, batch: int) -> int:
        share = torch.tensor(self.competence_at(batch), dtype=torch.float64)
        least = min(self.batch_size * self.num_replicas, len(self._order))
        return max(int(torch.searchsorted(self._shares, share)), least)


def _same(epoch: int, batch: int) -> tuple[int, int]:
    return epoch, batch


def _entrances(difficulty: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows in the order in which they enter the pool, and the competence above which each is in it."""
    classes = torch.zeros(len(difficulty), dtype=torch.int64) if classes is None else classes
    rows = torch.argsort(difficulty, stable=True)
    rows = rows[torch.argsort(classes[rows], stable=True)]
    counts = torch.unique_consecutive(classes[rows], return_counts=True)[1]
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    # The r-th row of a class of n is one of its ⌈c·n⌉ easiest where r < c·n.
    shares = (torch.arange(len(rows)) - first).double() / counts.repeat_interleave(counts)
    order = torch.argsort(shares, stable=True)
    return rows[order], shares[order]


def rarity(lists: pa.ChunkedArray) -> Tensor:
    """−Σ log p of each row's tokens, with p their frequencies in all rows, ``(rows,)``.

    Args:
        lists: Rows of token numbers.

    Example:
        >>> import pyarrow as pa
        >>> rarity(pa.chunked_array([[[5, 5, 5], [5], [], [9, 9]]]))  # p(5) = 2/3, p(9) = 1/3
        tensor([1.2164, 0.4055, 0.0000, 2.1972], dtype=torch.float64)
    """
    import pyarrow.compute as pc

    tokens = torch.tensor(pc.list_flatten(lists).to_numpy()).long()
    lengths = torch.tensor(pc.list_value_length(lists).to_numpy()).long()
    counts = torch.bincount(tokens).double()
    surprise = -torch.log(counts / len(tokens))[tokens]
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, row, surprise)


def read_difficulty(source: Source, column: str) -> Tensor:
    """A column of numbers, or strings of them, ``(rows,)``.

    Raises:
        TypeError: The column holds something else.
        ValueError: A null, or a number that is not finite.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = source.table[column].combine_chunks()
    kind = values.type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise TypeError(
            f"{source.where(0)}: column {column!r} must hold numbers to be a difficulty, got {values[0].as_py()!r} "
            f"({kind})"
        )
    numbers = [parse_number(text) for text in values.to_pylist()] if is_text(kind) else values.cast(pa.float64())
    numbers = pa.array(numbers, pa.float64())
    bad = pc.invert(pc.fill_null(pc.is_finite(numbers), False))
    if (row := first_true(bad)) is not None:
        raise ValueError(
            f"{source.where(row)}: column {column!r} holds {values[row].as_py()!r}: a difficulty is a finite number"
        )
    return torch.tensor(numbers.to_numpy())
