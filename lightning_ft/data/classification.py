"""Data for classification and regression of texts and text pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ft.data.base import TextData
from lightning_ft.data.curriculum import Curriculum
from lightning_ft.data.encoding import EncodedRows, tokenize
from lightning_ft.data.labels import Problem, encode_labels, infer_labels, read_labels

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


class ClassificationData(TextData):
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
        id: Column that names each row; it stands beside the row's number in predictions.
        trust_remote_code: Whether the tokenizer may run code from the hub.
        curriculum: Train on easy rows first, see `Curriculum`.

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
        id: str | None = None,
        trust_remote_code: bool = False,
        curriculum: Curriculum | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            {"train": train, "val": val, "test": test, "predict": predict},
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            bucket=bucket,
            seed=seed,
            num_workers=num_workers,
            val_fraction=val_fraction,
            pad_to_multiple_of=pad_to_multiple_of,
            id=id,
            trust_remote_code=trust_remote_code,
            curriculum=curriculum,
        )
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
        self.texts = [text] if text_pair is None else [text, text_pair]
        self.label = label
        self.problem = problem
        self._given_labels = None if labels is None else [str(name) for name in labels]

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of their numbers; none for regression. Reads the training rows.

        No tokenizer is loaded for it.

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
            train = self.source("train")
            names = list(train.class_names.get(self.label) or infer_labels(self._label_column("train")))
        if len(names) < (2 if self.problem == "single_label" else 1):
            raise ValueError(
                f"{self.problem} needs {'two or more labels' if self.problem == 'single_label' else 'a label'}, "
                f"got {names}: give labels=..., or correct column {self.label!r} of {self.source_name('train')}"
            )
        return names

    @override
    def columns(self, split: str) -> list[str]:
        return self.texts if split == "predict" else [*self.texts, self.label]

    @override
    def prepare(self, split: str) -> None:
        self._tokens(split)

    @override
    def encode(self, split: str) -> EncodedRows:
        labels = None if split == "predict" else self._encoded_labels(split)
        return EncodedRows(
            self._tokens(split),
            self.padding,
            labels=labels,
            num_labels=self.num_labels if labels is not None else 0,
            rows=self.part(split),
        )

    @override
    def strata(self) -> Tensor | None:
        return torch.tensor(self._encoded_labels("train").to_pylist()) if self.problem == "single_label" else None

    @override
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"problem": self.problem}
        if "train" in self._rows and self.problem != "regression":
            counts = self._label_counts(self.need("train"))
            facts["labels"] = counts
            facts["labels without a training row"] = [name for name, count in counts.items() if not count]
        return facts

    def _tokens(self, split: str) -> Dataset:
        return tokenize(self.source(split), self.texts, self.tokenizer, self.max_length)

    def _label_column(self, split: str) -> pa.Array:
        return read_labels(self.source(split), self.label, self.problem)

    def _encoded_labels(self, split: str) -> pa.Array:
        labels = self._label_column(split)
        return (
            labels
            if self.problem == "regression"
            else encode_labels(self.source(split), self.label, labels, self.labels)
        )

    def _label_counts(self, rows: EncodedRows) -> dict[str, int]:
        assert rows.labels is not None
        labels = rows.labels.take(rows.rows.numpy())
        numbers = labels if self.problem == "single_label" else labels.flatten()
        counts = torch.bincount(torch.tensor(numbers.to_pylist(), dtype=torch.int64), minlength=self.num_labels)
        return dict(zip(self.labels, counts.tolist(), strict=True))
