"""Several tasks in one training: batches of one task each, mixed in proportion and alike on every process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import override

from lightning_ft.core.report import Report
from lightning_ft.data.base import TextData
from lightning_ft.data.curriculum import CurriculumSampler, StepClock
from lightning_ft.data.loader import ResumableDataLoader, overfits
from lightning_ft.data.sampler import LengthBucketSampler, Positions

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def mixing_shares(sizes: Sequence[int], *, temperature: float = 1.0, cap: int | None = None) -> Tensor:
    """The share of the training batches that each task gets, ``(tasks,)``: pᵢ ∝ min(nᵢ, K)^(1/T).

    Args:
        sizes: nᵢ, training rows of each task.
        temperature: T; 1 mixes in proportion to size, larger values more evenly.
        cap: K, above which size does not count; None for no cap.

    Example:
        >>> mixing_shares([100, 300]).tolist(), mixing_shares([100, 900], temperature=2).tolist()
        ([0.25, 0.75], [0.25, 0.75])

    Reference:
        Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, 3.5.2.
    """
    weights = torch.tensor([float(min(n, cap or n)) for n in sizes], dtype=torch.float64) ** (1 / temperature)
    return weights / weights.sum()


class MultiTaskData(LightningDataModule):
    """The data of several tasks, for :class:`~lightning_ft.modules.MultiTask`: one data module for each.

    A training batch is one of a task's own, with the task's name under ``task``. An epoch has as many batches as the
    tasks' own epochs together; the tasks share them as :func:`mixing_shares` says, each with one at least, spread
    evenly, so that windows of accumulated batches mix tasks. Each task goes through its own epochs one after another.
    The order is a function of (seed, epoch), the same on all processes, and training resumes at any batch.

    Validation, test and prediction take one task after another, each with a loader of its own; tasks without such rows
    are left out. An interrupted prediction begins anew.

    Args:
        tasks: Name of each task to its data. A name is part of the names of metrics.
        temperature: T of :func:`mixing_shares`.
        cap: K of :func:`mixing_shares`.
        seed: Seed of the order of the tasks; each task's rows are drawn with the seed of its own data.

    Raises:
        ValueError: No task, tasks with different tokenizers, or a number out of range; later, data that is at fault,
            with its task, file and line.

    Example:
        >>> from datasets import Dataset
        >>> from lightning_ft.data import ClassificationData
        >>> rows = Dataset.from_dict({"text": ["fine", "dull"], "label": ["pos", "neg"]})
        >>> data = MultiTaskData({"mood": ClassificationData("bert-base-uncased", train=rows)}, temperature=2.0)
        >>> list(data.tasks)
        ['mood']
    """

    def __init__(
        self, tasks: dict[str, TextData], *, temperature: float = 1.0, cap: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks must name one task or more, got none")
        names = {task: data.tokenizer_name for task, data in tasks.items()}
        if len(set(names.values())) > 1:
            raise ValueError(f"tasks share one model, so they need one tokenizer, got {names}")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0: 1 for shares in proportion to size")
        if cap is not None and cap < 1:
            raise ValueError(f"cap={cap} must be 1 row or more, or None")
        self.tasks = dict(tasks)
        self.temperature = temperature
        self.cap = cap
        self.seed = seed
        self._train_loader: ResumableDataLoader | None = None
        self._restored: dict[str, int] = {}

    # ---- Lightning's hooks

    @override
    def prepare_data(self) -> None:
        self._each(self._attached(), lambda data: data.prepare_data())

    @override
    def setup(self, stage: str | None = None) -> None:
        self._each(self._attached(), lambda data: data.setup(stage))

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the tasks in turn, resumable.

        Raises:
            ValueError: A task streams its rows, or ``Trainer(overfit_batches=...)``.
        """
        if overfits(self.trainer):
            raise ValueError("Trainer(overfit_batches=...) would mix rows of several tasks in a batch: use one task")
        loaders = self._each(self._attached(), lambda data: data.train_dataloader())
        samplers: dict[str, LengthBucketSampler] = {}
        for task, loader in loaders.items():
            if not isinstance(loader, ResumableDataLoader):
                raise ValueError(f"task {task!r} reads a stream, which has no length to mix it by: give it a file")
            assert isinstance(loader.sampler, LengthBucketSampler)
            samplers[task] = loader.sampler
        loader = ResumableDataLoader(
            _TaskRows(loaders),
            TaskSampler(samplers, temperature=self.temperature, cap=self.cap, seed=self.seed, trainer=self.trainer),
            trainer=self.trainer,
            num_workers=max(data.num_workers for data in self.tasks.values()),
            pin_memory=any(each.pin_memory for each in loaders.values()),
        )
        if self._restored:
            loader.load_state_dict(self._restored)
            self._restored = {}
        self._train_loader = loader
        return loader

    @override
    def state_dict(self) -> dict[str, int]:
        """What fixes the order of the training batches, and the position in it."""
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Have the training loader refuse other batches than those of the saved run."""
        self._restored = dict(state_dict)

    @override
    def val_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each task with validation rows."""
        return self._loaders("val", lambda data: data.val_dataloader())

    @override
    def test_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each task with test rows."""
        return self._loaders("test", lambda data: data.test_dataloader())

    @override
    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each task with rows to predict."""
        return self._loaders("predict", lambda data: data.predict_dataloader())

    def describe(self) -> Report:
        """What was set up: each task's share of the training batches, its rows, lengths and padding.

        Raises:
            RuntimeError: Before ``setup``.
        """
        reports = self._each(self._attached(), lambda data: data.describe())
        facts: dict[str, Any] = {"temperature": self.temperature, "cap": self.cap}
        if all(self._has(data, "train") for data in self.tasks.values()):
            sizes = [len(data.need("train")) for data in self.tasks.values()]
            shares = mixing_shares(sizes, temperature=self.temperature, cap=self.cap).tolist()
            facts["shares"] = {task: round(share, 4) for task, share in zip(self.tasks, shares, strict=True)}
        rows = [{"task": task, **row} for task, report in reports.items() for row in report.rows]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        return Report("Data", facts, [{name: row.get(name) for name in columns} for row in rows])

    # ---- parts

    def _attached(self) -> dict[str, TextData]:
        """The tasks' data, which ask for the trainer as if it were theirs."""
        for data in self.tasks.values():
            data.trainer = self.trainer
        return self.tasks

    def _each(self, tasks: Mapping[str, TextData], what: Callable[[TextData], Any]) -> dict[str, Any]:
        results = {}
        for task, data in tasks.items():
            with _faults_of(task):
                results[task] = what(data)
        return results

    def _has(self, data: TextData, split: str) -> bool:
        return data.sources[data.home(split)] is not None

    def _loaders(self, split: str, load: Callable[[TextData], Any]) -> list[DataLoader[Any]]:
        there = {task: data for task, data in self._attached().items() if self._has(data, split)}
        fits = self.trainer is not None and self.trainer.state.fn == "fit"
        if not there and not fits:
            raise ValueError(f"{split} rows are needed, and none of the tasks {list(self.tasks)} was given any")
        loaders = self._each(there, load)
        for task, loader in loaders.items():
            loader.collate_fn = _Named(task, loader.collate_fn)
        return list(loaders.values())


@contextmanager
def _faults_of(task: str) -> Iterator[None]:
    """Say in errors which task's data are at fault."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # Not the error's own type: some want other arguments than a message.
        kinds = (FileNotFoundError, OSError, TypeError, RuntimeError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        raise kind(f"task {task!r}: {error}") from error


class TaskSampler(LengthBucketSampler):
    """Yields batches of several samplers, one after another, in a mixed order.

    Args:
        samplers: The training sampler of each task.
        temperature: T of :func:`mixing_shares`.
        cap: K of :func:`mixing_shares`.
        seed: Seed of the order of the tasks.
        trainer: Tells how many batches make an optimiser step, for tasks with a curriculum: they count those of the
            training, to which the other tasks' batches add.
    """

    def __init__(
        self,
        samplers: Mapping[str, LengthBucketSampler],
        *,
        temperature: float,
        cap: int | None,
        seed: int,
        trainer: Trainer | None = None,
    ) -> None:
        self.samplers = dict(samplers)
        sizes = [len(sampler.lengths) for sampler in self.samplers.values()]
        total = sum(len(sampler) for sampler in self.samplers.values())
        self.counts = _apportion(mixing_shares(sizes, temperature=temperature, cap=cap).tolist(), total)
        super().__init__(torch.cat([sampler.lengths for sampler in self.samplers.values()]), 1, seed=seed)
        self._inner = list(self.samplers.values())
        self._places: dict[int, tuple[int, list[int]]] = {}  # of tasks with a curriculum: an epoch, their batches in it
        clock = StepClock(total, trainer)
        for number, sampler in enumerate(self._inner):
            if isinstance(sampler, CurriculumSampler):
                sampler.keep_time(clock, partial(self._place, number))

    @override
    def __len__(self) -> int:
        return sum(self.counts)

    @override
    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = self._resume or (self.epoch, 0)
        self._resume = None
        yield from self._epoch()[first if epoch == self.epoch else 0 :]

    @override
    def identity(self) -> dict[str, int]:
        counts = {f"{task}/batches": n for task, n in zip(self.samplers, self.counts, strict=True)}
        parts = [(task, sampler.identity()) for task, sampler in self.samplers.items()]
        own = {f"{task}/{name}": value for task, identity in parts for name, value in identity.items()}
        return {"seed": self.seed, **counts, **own}

    def order(self) -> list[int]:
        """The number of the task of each batch of the present epoch.

        Each task's batches are spread evenly, each at a random place in its share of the epoch: between two of a task
        there are never many more of others than its share demands.
        """
        return self._order(self.epoch)

    def _order(self, epoch: int) -> list[int]:
        draw = random.Random(f"{self.seed} {epoch} tasks").random
        places = [((j + draw()) / n, task) for task, n in enumerate(self.counts) for j in range(n)]
        return [task for _, task in sorted(places)]

    def _place(self, task: int, epoch: int, batch: int) -> tuple[int, int]:
        """The epoch here, and the batch in it, that a batch of an epoch of a task's own is."""
        number = epoch * len(self._inner[task]) + batch
        here, nth = divmod(number, self.counts[task])
        if self._places.get(task, (-1,))[0] != here:  # asked for one after another
            self._places[task] = here, [place for place, other in enumerate(self._order(here)) if other == task]
        return here, self._places[task][1][nth]

    def _epoch(self) -> list[TaskPositions]:
        parts = [
            (task, self._own(sampler, n)) for (task, sampler), n in zip(self.samplers.items(), self.counts, strict=True)
        ]
        return [TaskPositions(next(parts[number][1]), parts[number][0]) for number in self.order()]

    def _own(self, sampler: LengthBucketSampler, count: int) -> Iterator[list[int]]:
        """The batches of a task in the present epoch; it goes on in its own epochs where it stopped in the last one."""
        first, batches = self.epoch * count, len(sampler)
        for epoch in range(first // batches, (first + count - 1) // batches + 1):
            begin, end = max(first - epoch * batches, 0), min(first + count - epoch * batches, batches)
            sampler.resume_at(epoch, begin)
            yield from islice(sampler, end - begin)


class TaskPositions(Positions):
    """Positions of the rows of a batch in the data of a task.

    Args:
        positions: The positions.
        task: The task's name.
    """

    def __init__(self, positions: list[int], task: str) -> None:
        super().__init__(positions, getattr(positions, "epoch", 0))
        self.task = task


class _TaskRows(TorchDataset[dict[str, Any]]):
    """The training rows of several tasks; indexed with `TaskPositions`."""

    def __init__(self, loaders: Mapping[str, DataLoader[Any]]) -> None:
        self.rows: dict[str, Any] = {task: loader.dataset for task, loader in loaders.items()}
        self.collate = {task: _Named(task, loader.collate_fn) for task, loader in loaders.items()}

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    def __getitem__(self, positions: TaskPositions) -> dict[str, Any]:
        return self.collate[positions.task](self.rows[positions.task][positions])


class _Named:
    """Adds a task's name to batches; a class, since loader workers may have to pickle it."""

    def __init__(self, task: str, collate: Callable[[Any], Any]) -> None:
        self.task = task
        self.collate = collate

    def __call__(self, rows: Any) -> dict[str, Any]:
        return {**self.collate(rows), "task": self.task}


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers with a given sum in proportion to shares, none of them 0: by largest remainders."""
    counts = [int(share * total) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * total)
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for i in [i for i, count in enumerate(counts) if not count]:
        counts[i] += 1
        counts[counts.index(max(counts))] -= 1
    return counts
