"""Data for finding entities: words with tags of the kind B-PER, or texts with labelled spans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ft.data.base import Rows, TextData
from lightning_ft.data.curriculum import Curriculum
from lightning_ft.data.encoding import EncodedRows
from lightning_ft.data.labels import encode_labels
from lightning_ft.data.tagged_rows import Cells, EvaluationRows, TrainingWindows
from lightning_ft.data.tags import (
    Scheme,
    Words,
    align_spans,
    complete_labels,
    entity_type,
    read_lists,
    read_spans,
    read_tags,
)
from lightning_ft.data.windows import WindowRows, windows_of
from lightning_ft.data.words import tokenize_words, words_of

if TYPE_CHECKING:
    from datasets import Dataset


class TokenClassificationData(TextData):
    """Words with tags, or texts with spans of characters; tokenised once, batched by length, resumable.

    A row is either a list of words with a list of tags, or, with ``text``, a text with a list of entities
    ``{"start", "end", "label"}``, whose offsets count characters from 0, the end excluded. Spans become tags of the
    words that the tokenizer's pre-tokeniser makes, see :func:`~lightning_ft.data.words.tokenize_words`; a span that
    cuts a word takes the whole of it, and :meth:`describe` tells how many did. Documents longer than ``max_length``
    lie in several windows that share ``stride`` tokens.

    A training batch holds single windows: ``input_ids``, ``attention_mask``, ``token_type_ids`` (where the tokenizer
    makes them), ``labels``, all ``(windows, width)``, and ``row``, the source row of each window. A label stands at
    the first token that holds characters of a word; other tokens have -100.

    A batch of validation, test or prediction holds all windows of its rows, and each word once: in the window in which
    the shorter of its two sides has most context. Beside the above it has

    - ``example`` ``(windows,)``: which of the batch's rows a window belongs to; ``row`` is then ``(rows,)``;
    - ``words`` ``(windows, width)``: at the token that a word's tag is read from, 1 + the word's number; else 0;
    - ``offsets`` ``(rows, words, 2)``: first character of each word and the one after its last, -1 beyond the last
      word. Where rows are words, they are offsets in the words joined by single spaces;
    - ``tokens``, a list of the words of each row, or ``text``, a list of texts;
    - ``tags`` ``(rows, words)``: numbers of the true tags, -100 beyond the last word; not in prediction.

    A word of which the tokenizer makes no token (a zero-width space) cannot be tagged: it counts, with its true tag
    and ``O`` as the predicted one.

    Args:
        tokenizer: Folder or hub name, as for ``AutoTokenizer``; a fast one. One without a pad token pads with its
            end-of-sequence token (see `Padding.of`).
        train: Training rows: a file, a ``hub://`` address or a ``datasets.Dataset``, see `read_source`.
        val: Validation rows.
        test: Test rows.
        predict: Rows to predict.
        tokens: Column of the words, lists of strings.
        tags: Column of their tags, lists of strings or of ``datasets.ClassLabel`` numbers.
        text: Column of the text, where rows are texts.
        spans: Column of their entities; by default ``"spans"``. The lists may be empty.
        labels: The tags, in the order of their numbers; by default those of a ``datasets.ClassLabel`` column, or else
            those in ``train``: ``O``, then the others sorted. By default the scheme is complete: ``I-X`` is there where
            only ``B-X`` was seen.
        scheme: ``"BIO"`` (IOB2), ``"BIOES"``, or ``"IO"``, where neighbours of one type are one entity.
        max_length: Tokens of a window.
        stride: Tokens that neighbouring windows share; by default a quarter of ``max_length``.
        batch_size: Windows of a training batch on one process.
        eval_batch_size: Rows of another batch; by default ``batch_size``.
        bucket: Batch rows of similar length in training. If false, batches are drawn at random.
        seed: Seed of the training order and of ``val_fraction``.
        num_workers: Worker processes of each loader. Few are needed: a batch is a few array operations.
        val_fraction: Without ``val``, the share of ``train`` that becomes it.
        pad_to_multiple_of: Round the width of batches up to a multiple of it (8 suits tensor cores).
        id: Column that names each row; it stands beside the row's number in predictions.
        trust_remote_code: Whether the tokenizer may run code from the hub.
        curriculum: Train on easy rows first, see `Curriculum`.

    Raises:
        ValueError: Arguments that contradict each other; later, data that is at fault, with its file and line.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"tokens": [["Anna", "sings"]], "tags": [["B-PER", "O"]]})
        >>> TokenClassificationData("bert-base-uncased", train=rows).labels
        ['O', 'B-PER', 'I-PER']
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | Dataset | None = None,
        val: str | Dataset | None = None,
        test: str | Dataset | None = None,
        predict: str | Dataset | None = None,
        *,
        tokens: str = "tokens",
        tags: str = "tags",
        text: str | None = None,
        spans: str | None = None,
        labels: Sequence[str] | None = None,
        scheme: Scheme = "BIO",
        max_length: int = 128,
        stride: int | None = None,
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
        if scheme not in get_args(Scheme):
            raise ValueError(f"scheme must be one of {get_args(Scheme)}, got {scheme!r}")
        if spans is not None and text is None:
            raise ValueError(f"spans={spans!r} are offsets in a text: give its column as text=...")
        self.stride = max_length // 4 if stride is None else stride
        if not 0 <= self.stride < max_length:
            raise ValueError(f"stride={stride} must be 0 or more and less than max_length={max_length}")
        self.scheme: Scheme = scheme
        self.text = text
        self.input = tokens if text is None else text
        self.target = tags if text is None else spans or "spans"
        if self.input == self.target:
            raise ValueError(
                f"words or texts and their tags or spans must be different columns, both are {self.input!r}"
            )
        self._given_labels = None if labels is None else [str(name) for name in labels]
        # What `facts` tells, by split.
        self._counts: dict[str, dict[str, int]] = {"words": {}, "words without a token": {}, "snapped spans": {}}
        self._label_counts: dict[str, int] = {}

    @property
    def labels(self) -> list[str]:
        """The tags, in the order of their numbers. Reads the training rows; no tokenizer is loaded for it.

        Raises:
            ValueError: Neither ``labels`` nor ``train`` was given, or a tag is not of the scheme.
        """
        return self._labels

    @property
    def num_labels(self) -> int:
        """Number of tags."""
        return len(self.labels)

    @cached_property
    def _labels(self) -> list[str]:
        if (given := self._given_labels) is not None:
            if given.count("O") != 1 or len(set(given)) < len(given):
                raise ValueError(f"labels must differ, and one of them must be 'O', got {given}")
            for tag in given:
                entity_type(tag, self.scheme)
            return given
        if self.sources["train"] is None:
            raise ValueError("the labels are not known: give labels=..., or train to take them from")
        train = self.source("train")
        if self.text is not None:
            return complete_labels(read_spans(train, self.target, self.text).kind.unique().to_pylist(), self.scheme)
        named = list(train.class_names.get(self.target, ()))
        tags = named or self._read_tags("train").flatten().unique().to_pylist()
        complete = complete_labels(filter(None, (entity_type(tag, self.scheme) for tag in tags)), self.scheme)
        return [*named, *(tag for tag in complete if tag not in named)]

    @override
    def columns(self, split: str) -> list[str]:
        return [self.input] if split == "predict" else [self.input, self.target]

    @override
    def prepare(self, split: str) -> None:
        self._tokens(split)

    @override
    def encode(self, split: str) -> Rows:
        tokens = self._tokens(split)
        words, part = words_of(tokens), self.part(split)
        tags = None if split == "predict" else self._tags(split, words)
        windows = EncodedRows(tokens.remove_columns(["starts", "ends"]), self.padding, rows=windows_of(tokens, part))
        self._count(split, windows, words, tags, part)
        if split == "train":
            assert tags is not None
            return TrainingWindows(windows, words, tags)
        cells = Cells(self.source(split).table[self.input])
        return EvaluationRows(WindowRows(windows, {"tokens" if self.text is None else "text": cells}), words, tags)

    @override
    def rarity(self, rows: Rows) -> Tensor:
        return super().rarity(rows.windows if isinstance(rows, TrainingWindows) else rows)

    @override
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"scheme": self.scheme}
        if "train" in self._rows:
            facts["labels"] = self._label_counts
            facts["labels without a training word"] = [name for name, count in self._label_counts.items() if not count]
        return {**facts, **{name: dict(counts) for name, counts in self._counts.items() if counts}}

    def _tokens(self, split: str) -> Dataset:
        source = self.source(split)
        words = read_lists(source, self.input, "words") if self.text is None else None
        return tokenize_words(source, self.input, self.tokenizer, self.max_length, self.stride, words)

    def _read_tags(self, split: str) -> Any:
        source = self.source(split)
        return read_tags(source, self.target, self.scheme, read_lists(source, self.input, "words"), self.input)

    def _tags(self, split: str, words: Words) -> Tensor:
        """The number of each word's tag, ``(words of all rows,)``."""
        source = self.source(split)
        if self.text is None:
            numbers = encode_labels(source, self.target, self._read_tags(split), self.labels)
            return torch.tensor(numbers.flatten().to_numpy())
        spans = read_spans(source, self.target, self.text)
        tags, changed = align_spans(source, self.target, self.text, spans, words, self.labels, self.scheme)
        self._counts["snapped spans"][self.home(split)] = changed
        return tags

    def _count(self, split: str, windows: EncodedRows, words: Words, tags: Tensor | None, part: Tensor | None) -> None:
        import pyarrow.compute as pc

        marks = windows.tokens.data["words"]
        marks = marks if part is None else marks.take(windows.rows.numpy())
        chosen = slice(None) if part is None else torch.isin(words.rows, part)
        count = len(words.offsets[chosen])
        read = pc.sum(pc.greater(pc.list_flatten(marks), 0)).as_py() or 0
        self._counts["words"][split] = count
        self._counts["words without a token"][split] = count - read
        if tags is not None and split == "train":
            counts = torch.bincount(tags[chosen], minlength=self.num_labels)
            self._label_counts = dict(zip(self.labels, counts.tolist(), strict=True))
