"""What all data modules share: splits, tokenizer, loaders, resuming, the table at the end."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import override

from lightning_ft.core.report import Report
from lightning_ft.data.curriculum import Curriculum, CurriculumSampler, rarity, read_difficulty
from lightning_ft.data.encoding import EncodedRows, Padding, whole_batch
from lightning_ft.data.loader import ResumableDataLoader, overfits
from lightning_ft.data.sampler import MEGABATCH, LengthBucketSampler, padding_waste
from lightning_ft.data.sources import Source, read_source
from lightning_ft.data.windows import source_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.data.streaming import StreamLoader

_SPLITS = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}


class Rows(Protocol):
    """What a data module batches: indexed with a list of positions, it gives a whole batch."""

    lengths: Tensor
    """Tokens of each position, ``(rows,)``: what batches are formed by."""
    rows: Tensor
    """The number in the source of the row at each position, ``(rows,)``."""

    def __len__(self) -> int: ...
    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]: ...


class TextData(LightningDataModule):
    """Rows of text; tokenised once, batched by length, resumable. Data modules of tasks derive from it.

    They override :meth:`columns` and :meth:`encode`, and :meth:`facts` and :meth:`strata` where there is something to
    say. Training may stop and resume at any batch. Validation and test see every row once, longest first, on any number
    of processes; prediction keeps the source's order.

    Args:
        tokenizer: Folder or hub name, as for ``AutoTokenizer``.
        sources: A file, a ``hub://`` address or a ``datasets.Dataset`` for each of train, val, test and predict, or
            None, see :func:`read_source`.
        max_length: Tokens kept of a row.
        batch_size: Rows of a training batch on one process.
        eval_batch_size: Rows of another batch; by default ``batch_size``.
        bucket: Batch rows of similar length in training. If false, batches are drawn at random.
        seed: Seed of the training order and of ``val_fraction``.
        num_workers: Worker processes of each loader. Few are needed: a batch is two array operations.
        val_fraction: Without ``val``, the share of ``train`` that becomes it.
        pad_to_multiple_of: Round the width of batches up to a multiple of it (8 suits tensor cores).
        id: Column that names each row; it stands beside the row's number in predictions.
        trust_remote_code: Whether the tokenizer may run code from the hub.
        curriculum: Train on easy rows first, see `Curriculum`.

    Raises:
        ValueError: Arguments that contradict each other; later, data that is at fault, with its file and line.
    """

    def __init__(
        self,
        tokenizer: str,
        sources: dict[str, str | Dataset | None],
        *,
        max_length: int,
        batch_size: int,
        eval_batch_size: int | None,
        bucket: bool,
        seed: int,
        num_workers: int,
        val_fraction: float | None,
        pad_to_multiple_of: int,
        id: str | None,
        trust_remote_code: bool,
        curriculum: Curriculum | None = None,
    ) -> None:
        super().__init__()
        if val_fraction is not None and (sources["val"] is not None or sources["train"] is None):
            raise ValueError("val_fraction splits train where there is no val: give train and val_fraction, or val")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        sizes = {"max_length": max_length, "batch_size": batch_size, "pad_to_multiple_of": pad_to_multiple_of}
        for name, size in {**sizes, "eval_batch_size": eval_batch_size}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be 1 or more")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must be 0 (this process loads) or more")
        self.tokenizer_name = tokenizer
        self.sources = sources
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.bucket = bucket
        self.seed = seed
        self.split_seed = seed
        """Of ``val_fraction``: runs that are compared must be judged on the same rows, in whatever order they train."""
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.pad_to_multiple_of = pad_to_multiple_of
        self.id = id
        self.trust_remote_code = trust_remote_code
        self.curriculum = curriculum
        self._read: dict[str, Source] = {}
        self._rows: dict[str, Rows] = {}
        self._is_set_up = False
        self._train_loader: ResumableDataLoader | StreamLoader | None = None
        self._restored: dict[str, Any] = {}
        self._predicted: set[int] = set()

    # ---- what a task decides

    @abstractmethod
    def columns(self, split: str) -> list[str]:
        """The columns that a split ("train", "val", "test", "predict") is read for; ``id`` is added to predict's."""

    @abstractmethod
    def encode(self, split: str) -> Rows:
        """The rows of a split, from :meth:`source`, :attr:`tokenizer`, :attr:`padding` and :meth:`part`."""

    def prepare(self, split: str) -> None:
        """Tokenise a split onto the disk, where other processes find it. By default :meth:`encode` does it all."""
        self.encode(split)

    def facts(self) -> dict[str, Any]:
        """What :meth:`describe` says of the data beside their sizes."""
        return {}

    def strata(self) -> Tensor | None:
        """A class number for each row of train, ``(rows,)``, to split ``val_fraction`` of each class; None for none."""
        return None

    # ---- what a task can use

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=self.trust_remote_code)

    @property
    def padding(self) -> Padding:
        """How rows become rectangles."""
        return Padding.of(self.tokenizer, self.pad_to_multiple_of)

    def home(self, split: str) -> str:
        """Which source holds a split's rows: train's, for a validation set that is a fraction of it."""
        return "train" if split == "val" and self.val_fraction is not None else split

    def source_name(self, split: str) -> str:
        """What to call a split's source in messages."""
        return str(self.sources[split]) if isinstance(self.sources[split], str) else f"{split} (the given Dataset)"

    def source(self, split: str) -> Source:
        """The table of a split's source, read once."""
        split = self.home(split)
        if split not in self._read:
            given = self.sources[split]
            assert given is not None
            columns = self.columns(split)
            by_curriculum = None if self.curriculum is None else self.curriculum.column
            extra = {"predict": self.id, "train": by_curriculum}.get(split)
            if extra is not None and extra not in columns:
                columns = [*columns, extra]
            self._read[split] = read_source(given, columns, name=self.source_name(split))
        return self._read[split]

    def part(self, split: str) -> Tensor | None:
        """Source rows of a split where ``val_fraction`` divides them, else None for all."""
        if self.val_fraction is None or split not in ("train", "val"):
            return None
        rows = torch.randperm(len(self.source("train")), generator=torch.Generator().manual_seed(self.split_seed))
        if (classes := self.strata()) is not None:
            rows = rows[torch.argsort(classes[rows], stable=True)]
        # Every (1 / fraction)-th row: in rows sorted by class that is each class in proportion.
        steps = torch.floor(torch.arange(len(rows) + 1, dtype=torch.float64) * self.val_fraction)
        chosen = steps.diff() > 0
        if not 0 < int(chosen.sum()) < len(rows):
            raise ValueError(
                f"val_fraction={self.val_fraction} of {len(rows)} rows leaves no row to train or validate on"
            )
        return rows[chosen if split == "val" else ~chosen].sort().values

    # ---- Lightning's hooks

    @override
    def prepare_data(self) -> None:
        """Read and tokenise, so that other processes find the tokens on the disk."""
        stage = None if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value
        for split in self._splits(stage):
            self.prepare(split)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Make the rows of a stage ("fit", "validate", "test", "predict"; None for all that were given)."""
        for split in self._splits(stage):
            self._rows[split] = self.encode(split)
        self._is_set_up = True  # a stream is not among the rows

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of similar length in a shuffled order, resumable."""
        rows = self.need("train")
        if overfits(self.trainer):
            return self._plain_loader(rows, self.batch_size)
        loader = ResumableDataLoader(
            rows,
            self.sampler(rows, train=True),
            trainer=self.trainer,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
        )
        if self._restored:
            loader.load_state_dict(self._restored)
            self._restored = {}
        self._train_loader = loader
        return loader

    @override
    def state_dict(self) -> dict[str, Any]:
        """What fixes the order of the training batches, and the position in it."""
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the training loader refuse other batches than those of the saved run."""
        self._restored = dict(state_dict)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Every validation row once; in a fit without such rows no loader, at which Lightning warns and goes on."""
        fits = self.trainer is not None and self.trainer.state.fn == "fit"
        return [] if fits and "val" not in self._rows else self._eval_loader(self.need("val"))

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Every test row once."""
        return self._eval_loader(self.need("test"))

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Rows in the order of their source, without those that :meth:`skip_predicted` named."""
        rows: Any = self.need("predict")
        if self.id is not None:
            rows = _Named(rows, self.source("predict").table[self.id].to_pylist())
        if self._predicted:
            done = torch.isin(rows.rows, torch.tensor(sorted(self._predicted)))
            # A row for each process to predict again: Lightning starts no prediction over no batch, which would leave
            # the file unwritten, and shares out no fewer rows than processes.
            done[-(1 if self.trainer is None else self.trainer.world_size) :] = False
            rows = Subset(rows, torch.nonzero(~done).flatten().tolist())
        return self._plain_loader(rows, self.eval_batch_size)

    # ---- an interrupted prediction goes on: see WritePredictions

    def prediction_identity(self) -> str:
        """Changes when anything does that the model is given to predict, or the rows' names."""
        rows = self.need("predict")
        digest = hashlib.blake2b(digest_size=16)
        # What batches hold, and not what made it: no setting can be forgotten. Not the loader's own batches, whose
        # size may change; a thousand rows take about a millisecond.
        for positions in torch.split(torch.arange(len(rows)), 256):
            _digest(rows[positions.tolist()], digest)
        if self.id is not None:
            _digest(self.source("predict").table[self.id].to_pylist(), digest)
        return digest.hexdigest()

    def skip_predicted(self, rows: Collection[int]) -> None:
        """Leave out rows of the source, by their numbers, in the next :meth:`predict_dataloader`."""
        self._predicted = set(rows)

    def describe(self) -> Report:
        """What was set up: rows, labels, lengths in tokens, and the padding of an epoch over its real tokens.

        Raises:
            RuntimeError: Before ``setup``.
        """
        if not self._is_set_up:
            raise RuntimeError("there is nothing to describe before setup(): call it first")
        facts = {**self.facts(), "max_length": self.max_length}
        return Report("Data", facts, [self._summary(split, rows) for split, rows in self._rows.items()])

    # ---- parts

    def _splits(self, stage: str | None) -> list[str]:
        return [split for split in _SPLITS[stage] if self.sources[self.home(split)] is not None]

    def need(self, split: str) -> Any:
        """The rows of a split.

        Raises:
            ValueError: They were not given, or ``setup`` was not called.
        """
        if split not in self._rows:
            given = self.sources[self.home(split)] is not None
            raise ValueError(f"{split} rows are needed: " + ("call setup() first" if given else f"give {split}=..."))
        return self._rows[split]

    def sampler(self, rows: Rows, *, train: bool = False) -> LengthBucketSampler:
        """The batches of a set."""
        options: dict[str, Any] = {
            "seed": self.seed,
            "num_replicas": 1 if self.trainer is None else self.trainer.world_size,
            "rank": 0 if self.trainer is None else self.trainer.global_rank,
            "megabatch": MEGABATCH if self.bucket else 1,
        }
        if not train or self.curriculum is None:
            return LengthBucketSampler(
                rows.lengths, self.batch_size if train else self.eval_batch_size, shuffle=train, **options
            )
        classes = self.strata()
        return CurriculumSampler(
            rows.lengths,
            self.batch_size,
            difficulty=self._difficulty(rows, self.curriculum),
            curriculum=self.curriculum,
            classes=None if classes is None else classes[_source_numbers(rows)],
            trainer=self.trainer,
            **options,
        )

    def rarity(self, rows: Rows) -> Tensor:
        """−Σ log p of the tokens of training rows, ``(rows,)``: a curriculum's difficulty."""
        if not isinstance(rows, EncodedRows):
            raise ValueError(f'{type(self).__name__} has no difficulty "rarity": use "length", or a column of numbers')
        return rarity(rows.tokens.data["input_ids"].take(rows.rows.numpy()))

    def _difficulty(self, rows: Rows, curriculum: Curriculum) -> Tensor:
        if curriculum.column is not None:
            return read_difficulty(self.source("train"), curriculum.column)[_source_numbers(rows)]
        return rows.lengths if curriculum.difficulty == "length" else self.rarity(rows)

    def _eval_loader(self, rows: Any) -> DataLoader[Any]:
        if overfits(self.trainer):
            return self._plain_loader(rows, self.eval_batch_size)
        return DataLoader(
            rows,
            sampler=self.sampler(rows),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
        )

    def _plain_loader(self, rows: Any, batch_size: int) -> DataLoader[Any]:
        # Lightning rebuilds the loaders of `predict` and `overfit_batches` with samplers that give single rows.
        return DataLoader(
            rows,
            batch_size=batch_size,
            collate_fn=whole_batch,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
        )

    @property
    def _pin_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _summary(self, split: str, rows: Rows) -> dict[str, Any]:
        if split == "predict":
            batches = [part.tolist() for part in torch.split(torch.arange(len(rows)), self.eval_batch_size)]
        else:
            batches = list(self.sampler(rows, train=split == "train"))
        truncated = getattr(rows, "truncated", None)
        return {
            "split": split,
            "rows": len(rows),
            "mean tokens": rows.lengths.double().mean().item(),
            "max tokens": int(rows.lengths.max()),
            "truncated": None if truncated is None else truncated.double().mean().item(),
            "padding": padding_waste(rows.lengths, batches),
        }


def _source_numbers(rows: Rows) -> Tensor:
    """The number in the source of the row at each position, ``(rows,)``, also where positions are windows."""
    if isinstance(rows, EncodedRows) and "row" in rows.tokens.column_names:
        return source_rows(rows.tokens)[rows.rows]
    return rows.rows


def _digest(value: Any, digest: hashlib.blake2b) -> None:
    """Add a batch, or a part of one, to a digest."""
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(repr(name).encode())
            _digest(value[name], digest)
    else:
        digest.update(repr(value).encode())


class _Named(TorchDataset[dict[str, Any]]):
    """Rows whose batches hold, beside their numbers, their names."""

    def __init__(self, rows: Any, names: Sequence[Any]) -> None:
        self.inner = rows
        self.rows = rows.rows
        self.names = names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        batch = dict(self.inner[positions])
        return {**batch, "id": [self.names[row] for row in batch["row"].tolist()]}

    __getitems__ = __getitem__
