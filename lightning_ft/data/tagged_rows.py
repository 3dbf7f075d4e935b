"""Batches of windows that know their words' tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lightning_ft.data.encoding import EncodedRows
from lightning_ft.data.tags import Words
from lightning_ft.data.windows import WindowRows, source_rows

if TYPE_CHECKING:
    import pyarrow as pa

_IGNORED = -100


class TrainingWindows(TorchDataset[dict[str, Any]]):
    """Windows of tokens with a label at the first token of each word; a list of positions gives one batch.

    Args:
        windows: The windows, with the columns of :func:`~lightning_ft.data.words.tokenize_words`.
        words: The words of each source row.
        tags: The number of each word's tag, ``(words of all rows,)``.
    """

    def __init__(self, windows: EncodedRows, words: Words, tags: Tensor) -> None:
        self.windows = windows
        self.first = words.first
        self.tags = tags
        self.rows = source_rows(windows.tokens)[windows.rows]
        self.lengths = windows.lengths

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        """A batch as :class:`~lightning_ft.data.TokenClassificationData` describes it."""
        batch = self.windows[positions]
        marks = batch.pop("words").abs()
        return {**batch, "labels": _labels(marks, self.first[batch["row"]], self.tags)}

    # A DataLoader that batches by itself calls this one, and hands the result to `collate_fn`.
    __getitems__ = __getitem__


class EvaluationRows(TorchDataset[dict[str, Any]]):
    """Source rows in all their windows, with each word once; a list of positions gives one batch.

    Args:
        rows: The rows' windows.
        words: The words of each source row.
        tags: The number of each word's tag, ``(words of all rows,)``; None where they are not known.
    """

    def __init__(self, rows: WindowRows, words: Words, tags: Tensor | None) -> None:
        self.inner = rows
        self.words = words
        self.first = words.first
        self.tags = tags
        self.rows = rows.rows
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        """A batch as :class:`~lightning_ft.data.TokenClassificationData` describes it."""
        batch = self.inner[positions]
        rows = batch["row"]
        counts, first = self.words.counts[rows], self.first[rows]
        column = torch.arange(int(counts.max()))
        there = column < counts[:, None]
        index = (first[:, None] + column)[there]
        batch["words"] = batch["words"].clamp(min=0)
        batch["offsets"] = torch.full((*there.shape, 2), -1).masked_scatter_(
            there[..., None], self.words.offsets[index]
        )
        if self.tags is not None:
            batch["tags"] = torch.full(there.shape, _IGNORED).masked_scatter_(there, self.tags[index])
            batch["labels"] = _labels(batch["words"], first[batch["example"]], self.tags)
        return batch

    __getitems__ = __getitem__


def _labels(marks: Tensor, first: Tensor, tags: Tensor) -> Tensor:
    """Tags at the tokens that words are read from, -100 elsewhere.

    Args:
        marks: 1 + a word's number in its row, or 0, ``(windows, width)``.
        first: Place of each row's first word in ``tags``, ``(windows,)``.
        tags: Of all words.
    """
    if not len(tags):
        return torch.full_like(marks, _IGNORED)
    found = tags[(first[:, None] + marks - 1).clamp(min=0, max=len(tags) - 1)]
    return found.masked_fill(marks == 0, _IGNORED)


class Cells(Sequence[Any]):
    """A column whose cells are made Python values one by one, when they are asked for.

    Args:
        values: The column.
    """

    def __init__(self, values: pa.ChunkedArray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: Any) -> Any:
        return self.values[row].as_py()
