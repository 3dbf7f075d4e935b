"""Data for classification and regression of texts and text pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ft.core.report import Report
from lightning_ft.data.encoding import EncodedRows, Padding, tokenize, whole_batch
from lightning_ft.data.labels import Problem, encode_labels, infer_labels, read_labels
from lightning_ft.data.loader import ResumableDataLoader, overfits
from lightning_ft.data.sampler import MEGABATCH, LengthBucketSampler, padding_waste
from lightning_ft.data.sources import Source, read_source

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SPLITS = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}


class ClassificationData(LightningDataModule):
    """Texts, or pairs of texts, with labels; tokenised once, batched by length, resumable.

    A batch is a dictionary of ``input_ids``, ``attention_mask``, ``token_type_ids`` (where the tokenizer makes them),
    ``labels`` and ``row``, the row's number in its source, from 0. Labels are 64-bit class numbers ``(batch,)``,
    32-bit rows of 0 and 1 ``(batch, num_labels)`` for multi_label, or 32-bit numbers ``(batch,)`` for regression.
    Training may stop and resume at any batch. Validation and test see every row once, longest first, on any number of
    processes; prediction keeps the source's order and needs no labels.

    Args:
        tokenizer: Folder or hub name, as for ``AutoTokenizer``. One without a pad token pads with its
            end-of-sequence token (see `Padding.of`).
        train: Training rows: a file, a ``hub://`` address or a ``datasets.Dataset``, see `read_source`.
        val: Validation rows.
        test: Test rows.
        predict: Rows to predict.
        text: Column of the text. An empty text is a text, unless the tokenizer makes no token of it.
        text_pair: Column of the second text, if rows are pairs.
        label: Column of the label, see `read_labels`.
        problem: What labels are.
        labels: Their names, in the order of the class numbers; by default those of a ``datasets.ClassLabel`` column, or
            else those in ``train``, sorted.
        max_length: Tokens kept of a row; of a pair, the longer text is cut first.
        batch_size: Rows of a training batch on one process.
        eval_batch_size: Rows of another batch; by default ``batch_size``.
        bucket: Batch rows of similar length in training. If false, batches are drawn at random.
        seed: Seed of the training order and of ``val_fraction``.
        num_workers: Worker processes of each loader. Few are needed: a batch is two array operations.
        val_fraction: Without ``val``, the share of ``train`` that becomes it; each class in proportion.
        pad_to_multiple_of: Round the width of batches up to a multiple of it (8 suits tensor cores).
        trust_remote_code: Whether the tokenizer may run code from the hub.

    Raises:
        ValueError: Arguments that contradict each other; later, data that is at fault, with its file and line.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"text": ["fine", "dull"], "label": ["pos", "neg"]})
        >>> ClassificationData("bert-base-uncased", train=rows).labels
        ['neg', 'pos']
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        problem: Problem = "single_label",
        labels: Sequence[str] | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        bucket: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        val_fraction: float | None = None,
        pad_to_multiple_of: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if problem not in get_args(Problem):
            raise ValueError(f"problem must be one of {get_args(Problem)}, got {problem!r}")
        if len({text, text_pair, label}) < 3:
            raise ValueError(
                f"text, text_pair and label must be different columns, got {text!r}, {text_pair!r}, {label!r}"
            )
        if labels is not None and problem == "regression":
            raise ValueError("labels name classes, and regression has none: leave labels out")
        if labels is not None and len(set(labels)) < len(labels):
            raise ValueError(f"labels must differ, got {list(labels)}")
        if val_fraction is not None and (val is not None or train is None):
            raise ValueError("val_fraction splits train where there is no val: give train and val_fraction, or val")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.tokenizer_name = tokenizer
        self.sources = {"train": train, "val": val, "test": test, "predict": predict}
        self.columns = [text] if text_pair is None else [text, text_pair]
        self.label = label
        self.problem = problem
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.bucket = bucket
        self.seed = seed
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.pad_to_multiple_of = pad_to_multiple_of
        self.trust_remote_code = trust_remote_code
        self._given_labels = None if labels is None else [str(name) for name in labels]
        self._read: dict[str, Source] = {}
        self._tokens: dict[str, Dataset] = {}
        self._rows: dict[str, EncodedRows] = {}
        self._train_loader: ResumableDataLoader | None = None
        self._restored: dict[str, int] = {}

    # ---- before setup: cheap, no tokenizer is loaded

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of their numbers; none for regression. Reads the training rows.

        Raises:
            ValueError: Neither ``labels`` nor ``train`` was given, or there are fewer than two classes to choose from.
        """
        return self._labels

    @property
    def num_labels(self) -> int:
        """Outputs that a model needs: one for each class, one for regression."""
        return len(self.labels) or 1

    @cached_property
    def _labels(self) -> list[str]:
        if self.problem == "regression":
            return []
        names = self._given_labels
        if names is None:
            if self.sources["train"] is None:
                raise ValueError("the labels are not known: give labels=..., or train to take them from")
            train = self._source("train")
            names = list(train.class_names.get(self.label) or infer_labels(self._label_column("train")))
        if len(names) < (2 if self.problem == "single_label" else 1):
            raise ValueError(
                f"{self.problem} needs {'two or more labels' if self.problem == 'single_label' else 'a label'}, "
                f"got {names}: give labels=..., or correct column {self.label!r} of {self._name('train')}"
            )
        return names

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=self.trust_remote_code)

    # ---- Lightning's hooks

    @override
    def prepare_data(self) -> None:
        """Read and tokenise, so that other processes find the tokens on the disk."""
        stage = None if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value
        for split in self._splits(stage):
            self._tokenized(split)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Make the rows of a stage ("fit", "validate", "test", "predict"; None for all that were given)."""
        padding = Padding.of(self.tokenizer, self.pad_to_multiple_of)
        for split in self._splits(stage):
            source, tokens = self._home(split), self._tokenized(split)
            labels = None
            if split != "predict":
                labels = self._label_column(source)
                if self.problem != "regression":
                    labels = encode_labels(self._source(source), self.label, labels, self.labels)
            self._rows[split] = EncodedRows(
                tokens,
                padding,
                labels=labels,
                num_labels=self.num_labels if labels is not None else 0,
                rows=self._part(split),
            )

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of similar length in a shuffled order, resumable."""
        rows = self._need("train")
        if overfits(self.trainer):
            return self._plain_loader(rows, self.batch_size)
        loader = ResumableDataLoader(
            rows,
            self._sampler(rows, train=True),
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
    def state_dict(self) -> dict[str, int]:
        """What fixes the order of the training batches, and the position in it."""
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Have the training loader refuse other batches than those of the saved run."""
        self._restored = dict(state_dict)

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Every validation row once; in a fit without such rows no loader, at which Lightning warns and goes on."""
        fits = self.trainer is not None and self.trainer.state.fn == "fit"
        return [] if fits and "val" not in self._rows else self._eval_loader(self._need("val"))

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Every test row once."""
        return self._eval_loader(self._need("test"))

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Rows in the order of their source."""
        return self._plain_loader(self._need("predict"), self.eval_batch_size)

    def describe(self) -> Report:
        """What was set up: rows, labels, lengths in tokens, and the padding of an epoch over its real tokens.

        Raises:
            RuntimeError: Before ``setup``.
        """
        if not self._rows:
            raise RuntimeError("there is nothing to describe before setup(): call it first")
        facts: dict[str, Any] = {"problem": self.problem, "max_length": self.max_length}
        if "train" in self._rows and self.problem != "regression":
            counts = self._label_counts(self._rows["train"])
            facts["labels"] = counts
            facts["labels without a training row"] = [name for name, count in counts.items() if not count]
        return Report("Data", facts, [self._summary(split, rows) for split, rows in self._rows.items()])

    # ---- parts

    def _splits(self, stage: str | None) -> list[str]:
        return [split for split in _SPLITS[stage] if self.sources[self._home(split)] is not None]

    def _home(self, split: str) -> str:
        """Which source holds a split's rows."""
        return "train" if split == "val" and self.val_fraction is not None else split

    def _name(self, split: str) -> str:
        return str(self.sources[split]) if isinstance(self.sources[split], str) else f"{split} (the given Dataset)"

    def _source(self, split: str) -> Source:
        if split not in self._read:
            given = self.sources[split]
            assert given is not None
            columns = self.columns if split == "predict" else [*self.columns, self.label]
            self._read[split] = read_source(given, columns, name=self._name(split))
        return self._read[split]

    def _label_column(self, split: str) -> pa.Array:
        return read_labels(self._source(split), self.label, self.problem)

    def _tokenized(self, split: str) -> Dataset:
        source = self._home(split)
        if source not in self._tokens:
            self._tokens[source] = tokenize(self._source(source), self.columns, self.tokenizer, self.max_length)
        return self._tokens[source]

    def _part(self, split: str) -> Tensor | None:
        """Source rows of a split where ``val_fraction`` divides them, else None for all."""
        if self.val_fraction is None or split not in ("train", "val"):
            return None
        rows = torch.randperm(len(self._source("train")), generator=torch.Generator().manual_seed(self.seed))
        if self.problem == "single_label":
            numbers = encode_labels(self._source("train"), self.label, self._label_column("train"), self.labels)
            rows = rows[torch.argsort(torch.tensor(numbers.to_pylist())[rows], stable=True)]
        # Every (1 / fraction)-th row: in rows sorted by class that is each class in proportion.
        steps = torch.floor(torch.arange(len(rows) + 1, dtype=torch.float64) * self.val_fraction)
        chosen = steps.diff() > 0
        if not 0 < int(chosen.sum()) < len(rows):
            raise ValueError(
                f"val_fraction={self.val_fraction} of {len(rows)} rows leaves no row to train or validate on"
            )
        return rows[chosen if split == "val" else ~chosen].sort().values

    def _need(self, split: str) -> EncodedRows:
        if split not in self._rows:
            given = self.sources[self._home(split)] is not None
            raise ValueError(f"{split} rows are needed: " + ("call setup() first" if given else f"give {split}=..."))
        return self._rows[split]

    def _sampler(self, rows: EncodedRows, *, train: bool = False) -> LengthBucketSampler:
        return LengthBucketSampler(
            rows.lengths,
            self.batch_size if train else self.eval_batch_size,
            shuffle=train,
            seed=self.seed,
            num_replicas=1 if self.trainer is None else self.trainer.world_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            megabatch=MEGABATCH if self.bucket else 1,
        )

    def _eval_loader(self, rows: EncodedRows) -> DataLoader[Any]:
        if overfits(self.trainer):
            return self._plain_loader(rows, self.eval_batch_size)
        return DataLoader(
            rows,
            sampler=self._sampler(rows),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
        )

    def _plain_loader(self, rows: EncodedRows, batch_size: int) -> DataLoader[Any]:
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

    def _label_counts(self, rows: EncodedRows) -> dict[str, int]:
        assert rows.labels is not None
        labels = rows.labels.take(rows.rows.numpy())
        numbers = labels if self.problem == "single_label" else labels.flatten()
        counts = torch.bincount(torch.tensor(numbers.to_pylist(), dtype=torch.int64), minlength=self.num_labels)
        return dict(zip(self.labels, counts.tolist(), strict=True))

    def _summary(self, split: str, rows: EncodedRows) -> dict[str, Any]:
        if split == "predict":
            batches = [part.tolist() for part in torch.split(torch.arange(len(rows)), self.eval_batch_size)]
        else:
            batches = list(self._sampler(rows, train=split == "train"))
        truncated = torch.tensor(rows.tokens.data["truncated"].to_pylist())[rows.rows]
        return {
            "split": split,
            "rows": len(rows),
            "mean tokens": rows.lengths.double().mean().item(),
            "max tokens": int(rows.lengths.max()),
            "truncated": truncated.double().mean().item(),
            "padding": padding_waste(rows.lengths, batches),
        }
