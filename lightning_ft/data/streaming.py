"""Texts larger than the memory or the disk: read, tokenised and batched as training goes."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import IterableDataset as TorchIterable

from lightning_ft.core.counter_random import random_key
from lightning_ft.data.chunks import RowCutter
from lightning_ft.data.encoding import EncodedRows, Padding
from lightning_ft.data.loader import overfits, training_position
from lightning_ft.data.masking import Labeller
from lightning_ft.data.sampler import MEGABATCH, LengthBucketSampler
from lightning_ft.data.sources import load_hub, text_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from lightning.pytorch import Trainer

_POOL = 20  # batches that are cut out of the stream at once: enough to bucket them, and soon there
_DOCUMENTS = 200  # tokenised in one call
_TEXT = (".jsonl", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow")


def open_stream(source: str | Dataset | IterableDataset, column: str, shards: int = 1) -> IterableDataset:
    """A stream of rows.

    Args:
        source: A file, or a pattern such as ``"corpus/*.jsonl.gz"`` for several, of the kinds that `read_source` reads;
            a ``hub://`` address, see there; a ``datasets.IterableDataset``; or a ``datasets.Dataset``.
        column: The column to read.
        shards: Into how many parts a ``datasets.Dataset`` is divided. Another source has as many as it has files.

    Raises:
        FileNotFoundError: No such file.
        TypeError: A source of another type.
        ValueError: An ending that is not read, or files of different kinds.
    """
    from datasets import Dataset, IterableDataset, load_dataset

    if isinstance(source, IterableDataset):
        return source
    if isinstance(source, Dataset):
        return source.to_iterable_dataset(num_shards=max(1, min(shards, len(source))))
    if not isinstance(source, str | Path):
        raise TypeError(
            "a stream must be a path, a hub:// address, a datasets.IterableDataset or a datasets.Dataset, got "
            f"{type(source).__name__}" + (": choose one split of it" if hasattr(source, "keys") else "")
        )
    if str(source).startswith("hub://"):
        return load_hub(str(source), streaming=True)
    if not (files := sorted(glob.glob(str(source), recursive=True))):
        raise FileNotFoundError(f"{source} does not exist (from {Path.cwd()})")
    ending = _ending(files[0])
    for file in files:
        if (other := _ending(file)) != ending:
            raise ValueError(
                f"{source} is files of different kinds, {files[0]} ({ending}) and {file} ({other}): give a pattern "
                "that matches one kind"
            )
    if ending in _TEXT:
        return IterableDataset.from_generator(_rows, gen_kwargs={"files": files, "column": column})
    return load_dataset(ending[1:], data_files={"train": files}, split="train", streaming=True)


def _ending(file: str) -> str:
    """How a file ends, without ``.gz``, which texts alone may have.

    Raises:
        ValueError: It is none that is read.
    """
    packed = file.endswith(".gz")
    ending = Path(file.removesuffix(".gz")).suffix
    if ending not in (_TEXT if packed else (*_TEXT, *_TABLES)):
        whole = f"{ending}.gz" if packed else ending or "a file without an ending"
        kinds = ", ".join((*_TEXT, *(f"{text}.gz" for text in _TEXT), *_TABLES))
        raise ValueError(f"{file}: cannot stream {whole}; it can be {kinds}")
    return ending


def _rows(files: Sequence[str], column: str) -> Iterator[dict[str, str]]:
    for file in files:
        for line, (text,) in text_rows(Path(file), [column]):
            yield {column: _checked(text, column, f"{file}, line {line}: ")}


def _checked(text: Any, column: str, place: str = "") -> str:
    if not isinstance(text, str):
        raise ValueError(f"{place}column {column!r} holds {text!r}: give a text, or remove the row")
    return text


class StreamedBatches(TorchIterable[dict[str, Any]]):
    """Batches of a stream of texts, without end: after the last text the first ones come again, in another order.

    Endless, because processes that hold unequal parts would else wait for one another for ever. The order, and what
    the labels are drawn from, is a function of the seed, the epoch, the round, the process and its workers. Each
    process reads its own part of the stream, and each worker its own shards of that.

    Args:
        stream: The texts.
        column: Column of the text.
        cutter: Makes what cuts texts into rows.
        label: Gives a batch its labels; a row's key is its running number.
        padding: How to fill up.
        batch_size: Rows of a batch.
        bucket: Batch rows of similar length.
        seed: Seed of the order.
        shuffle_buffer: Texts that are drawn from at random.
        rank: This process.
        num_replicas: Number of processes.
        name: What to call the stream in messages.
    """

    def __init__(
        self,
        stream: IterableDataset,
        column: str,
        cutter: Callable[[], RowCutter],
        label: Labeller,
        padding: Padding,
        *,
        batch_size: int,
        bucket: bool = True,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        rank: int = 0,
        num_replicas: int = 1,
        name: str = "the stream",
    ) -> None:
        self.stream = stream
        self.column = column
        self.cutter = cutter
        self.label = label
        self.padding = padding
        self.batch_size = batch_size
        self.bucket = bucket
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.rank = rank
        self.num_replicas = num_replicas
        self.name = name
        self.epoch = 0

    @property
    def shards(self) -> int:
        """Parts of the stream that the workers of one process can share."""
        shards = int(self.stream.num_shards)
        return shards // self.num_replicas if shards % self.num_replicas == 0 else shards

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, mine = (1, 0) if worker is None else (worker.num_workers, worker.id)
        node, nodes = self.rank * workers + mine, self.num_replicas * workers
        for turn in itertools.count():
            draw = random_key(self.epoch, turn)
            rows = 0
            for pool in self._pools(draw):
                order = LengthBucketSampler(
                    pool.lengths,
                    self.batch_size,
                    seed=random_key(self.seed, draw, node, rows),
                    megabatch=MEGABATCH if self.bucket else 1,
                )
                for positions in order:
                    batch = pool[positions]
                    # No two processes or workers have a number in common.
                    batch["row"] = (rows + torch.tensor(positions)) * nodes + node
                    yield self.label(batch, batch["row"], draw)
                rows += len(pool)
            if not rows:
                raise ValueError(
                    f"{self.name}: process {self.rank}, worker {mine} found no text in column {self.column!r}: give "
                    "more texts, or fewer processes and workers"
                )

    def _pools(self, draw: int) -> Iterator[EncodedRows]:
        """Rows of some batches each, and at the end the rest."""
        import pyarrow as pa
        from datasets import Dataset

        cutter = self.cutter()
        tables: list[pa.Table] = []
        for texts, last in _with_last(_grouped(self._texts(draw), _DOCUMENTS)):
            tables.append(cutter(texts, range(len(texts)), last=last))
            rows = sum(map(len, tables))
            if rows >= _POOL * self.batch_size or (last and rows):
                table = pa.concat_tables(tables).combine_chunks()
                tables = []
                yield EncodedRows(
                    Dataset(table.select([name for name in table.column_names if name != "row"])), self.padding
                )

    def _texts(self, draw: int) -> Iterator[str]:
        import pyarrow as pa
        from datasets.distributed import split_dataset_by_node
        from datasets.exceptions import DatasetsError

        stream = split_dataset_by_node(self.stream, self.rank, self.num_replicas)
        if self.shuffle_buffer > 1:
            # All processes and workers shuffle alike, and then each takes its part.
            stream = stream.shuffle(seed=random_key(self.seed, draw) % 2**32, buffer_size=self.shuffle_buffer)
        read = 0
        try:
            for row in stream:
                if self.column not in row:
                    raise ValueError(f"no column {self.column!r}; there are: {', '.join(map(repr, row))}")
                if not isinstance(text := row[self.column], str):
                    raise ValueError(
                        f"column {self.column!r} holds {text!r}, which is no text: correct or remove the row"
                    )
                yield text
                read += 1
        except (DatasetsError, pa.ArrowException, OSError, EOFError, ValueError) as error:
            raise ValueError(f"{self.name}: cannot be read after {read} texts: {error}") from error


class StreamLoader(DataLoader[Any]):
    """Loads :class:`StreamedBatches`, and finds again where training stood.

    The position is the trainer's own count of batches, as for `ResumableDataLoader`. To get there the stream is read,
    tokenised and thrown away from the beginning of the epoch: exact for every source, and as slow as reading.

    Args:
        dataset: The batches.
        trainer: The trainer whose progress is the position.
        num_workers: Worker processes, which tokenise; 0 does it in this process.
        pin_memory: Copy batches into page-locked memory, for CUDA.

    Raises:
        ValueError: There are more workers than parts of the stream.
    """

    def __init__(
        self,
        dataset: StreamedBatches,
        *,
        trainer: Trainer | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if num_workers > max(dataset.shards, 1):
            raise ValueError(
                f"num_workers={num_workers}, but {dataset.name} has {dataset.shards} part(s) for them to share: take "
                "fewer workers, or split it into more files"
            )
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, see `ResumableDataLoader`
        )
        self.stream = dataset
        self.trainer = trainer

    def check_trainer(self, *, validates: bool) -> None:
        """Refuse a trainer under which a stream cannot do its work.

        Args:
            validates: Whether there is validation data.

        Raises:
            ValueError: Training has no number of steps, validation would never come, or batches are overfitted.
        """
        trainer: Any = self.trainer
        if trainer is None or trainer.state.fn != "fit":
            return
        if overfits(trainer):
            raise ValueError("Trainer(overfit_batches=...) needs rows that can be counted: set streaming=False")
        # A whole number counts batches (1 is one batch), a fraction is of what has no end.
        endless = isinstance(trainer.limit_train_batches, float)
        if endless and trainer.max_steps < 0:
            raise ValueError(
                "a stream has no end, and neither has the training: set Trainer(max_steps=...), which also the "
                "learning rate's warm-up and decay are measured by"
            )
        if endless and validates and isinstance(trainer.val_check_interval, float):
            raise ValueError(
                "a stream's epoch has no end, and validation would never come: set Trainer(val_check_interval=500), "
                "in batches, or Trainer(limit_train_batches=...)"
            )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names a private class
        epoch, batch = (0, 0) if self.trainer is None else self._position()
        self.stream.epoch = epoch
        self.generator.manual_seed(self.stream.seed + epoch)
        yield from itertools.islice(super().__iter__(), batch, None)

    def state_dict(self) -> dict[str, int | str]:
        """The position (epoch and batch to train on next) and what the batches depend on.

        Raises:
            RuntimeError: The loader was built without a trainer.
        """
        epoch, batch = self._position()
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def load_state_dict(self, state_dict: Mapping[str, int | str]) -> None:
        """Check that the saved position means the same batches here.

        Raises:
            ValueError: The position lies inside an epoch, and the batches are not the ones of the saved run.
        """
        now = self._identity()
        changed = {name: (state_dict.get(name), value) for name, value in now.items() if state_dict.get(name) != value}
        if changed and state_dict["batch"]:
            raise ValueError(
                f"the checkpoint stands at batch {state_dict['batch']} of a stream with other settings; saved and "
                f"present: {changed}. Restore them, or start from the weights alone"
            )

    def _identity(self) -> dict[str, int | str]:
        stream = self.stream
        return {
            "source": stream.name,
            "column": stream.column,
            **stream.cutter().identity(),
            "batch_size": stream.batch_size,
            "bucket": int(stream.bucket),
            "seed": stream.seed,
            "shuffle_buffer": stream.shuffle_buffer,
            "num_replicas": stream.num_replicas,
            "num_workers": self.num_workers,
            "shards": int(stream.stream.num_shards),
        }

    def _position(self) -> tuple[int, int]:
        if self.trainer is None:
            raise RuntimeError("StreamLoader(trainer=None) does not know how far training is: pass trainer=...")
        return training_position(self.trainer, float("inf"))


def _grouped(items: Iterator[str], size: int) -> Iterator[list[str]]:
    while group := list(itertools.islice(items, size)):
        yield group


def _with_last(items: Iterator[list[str]]) -> Iterator[tuple[list[str], bool]]:
    """Each item, and whether it is the last."""
    before: list[list[str]] = []
    for item in items:
        if before:
            yield before.pop(), False
        before.append(item)
    if before:
        yield before.pop(), True
