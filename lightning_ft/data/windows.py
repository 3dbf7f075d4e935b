"""Texts longer than a model's input, as overlapping windows that are evaluated together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lightning_ft.data.encoding import EncodedRows

if TYPE_CHECKING:
    from datasets import Dataset


class WindowRows(TorchDataset[dict[str, Any]]):
    """Source rows whose tokens lie in one window or more; a list of positions gives one batch of all their windows.

    For evaluation and prediction, which need all windows of a row at once. Training takes windows one by one, from
    :class:`EncodedRows`.

    Args:
        windows: The windows, those of a row one after another; their table has a column ``row``.
        columns: Values by source row that come along as lists, such as the texts that answers are cut from.
    """

    def __init__(self, windows: EncodedRows, columns: Mapping[str, Sequence[Any]] | None = None) -> None:
        self.windows = windows
        self.columns = dict(columns or {})
        self.rows, self.counts = torch.unique_consecutive(source_rows(windows.tokens)[windows.rows], return_counts=True)
        self._ends = self.counts.cumsum(0)
        of = torch.repeat_interleave(torch.arange(len(self.rows)), self.counts)
        self.lengths = torch.zeros(len(self.rows), dtype=torch.int64).index_add_(0, of, windows.lengths)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        """A batch of all windows of some rows.

        Args:
            positions: Positions in the set, ``(rows,)``.

        Returns:
            What :class:`EncodedRows` gives for the windows, ``(windows, …)``; ``example``, which of the batch's rows a
            window belongs to: ``(windows,)``; ``row``, the rows' numbers in the source: ``(rows,)``; and the extra
            columns as lists of ``rows`` values.
        """
        chosen = torch.as_tensor(positions)
        ends, counts = self._ends[chosen], self.counts[chosen]
        spans = [torch.arange(end - count, end) for end, count in zip(ends.tolist(), counts.tolist(), strict=True)]
        batch = dict(self.windows[torch.cat(spans).tolist()])
        rows = self.rows[chosen]
        batch["example"] = torch.repeat_interleave(torch.arange(len(chosen)), counts)
        extra = {name: [values[row] for row in rows.tolist()] for name, values in self.columns.items()}
        return {**batch, "row": rows, **extra}

    # A DataLoader that batches by itself calls this one, and hands the result to `collate_fn`.
    __getitems__ = __getitem__


def source_rows(windows: Dataset) -> Tensor:
    """The column ``row`` of a table of windows, ``(windows,)``."""
    return torch.tensor(windows.data["row"].to_numpy())


def windows_of(windows: Dataset, part: Tensor | None) -> Tensor | None:
    """Which windows belong to some source rows, ``(windows,)``; None for all of them.

    Args:
        windows: A table with a column ``row``.
        part: Numbers of the source rows, or None for all.
    """
    return None if part is None else torch.nonzero(torch.isin(source_rows(windows), part)).flatten()
