"""Batches of sources with targets of another length, given or made from the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lightning_ft.core.counter_random import random_key
from lightning_ft.data.encoding import EncodedRows, Padding
from lightning_ft.data.windows import source_rows
from lightning_ft.functional.span_corruption import span_corruption

if TYPE_CHECKING:
    import pyarrow as pa

IGNORED = -100
"""Label where there is no token to learn."""
_FIXED = -1  # the draw of validation and test


class TargetRows(TorchDataset[dict[str, Any]]):
    """Rows of source tokens and, in a rectangle of its own width, of target tokens.

    Args:
        sources: The sources.
        targets: The targets of the same rows, padded on the right with -100; None for rows to predict.
        references: Texts that a generated one is measured by, by source row: lists of strings; None for none.
    """

    def __init__(
        self, sources: EncodedRows, targets: EncodedRows | None = None, references: pa.Array | None = None
    ) -> None:
        self.sources = sources
        self.targets = targets
        self.references = references
        self.rows = sources.rows
        # The longer side decides what a batch costs: by the sum, batches of scitldr have five times the padding.
        self.lengths = sources.lengths if targets is None else torch.maximum(sources.lengths, targets.lengths)

    @property
    def truncated(self) -> Tensor | None:
        """Which sources were cut, ``(rows,)``."""
        return self.sources.truncated

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        """A batch of tensors.

        Args:
            positions: Positions in the set, ``(batch,)``.

        Returns:
            What :class:`EncodedRows` gives for the sources, ``labels``: ``(batch, target width)``, and ``references``,
            a list of lists of strings.
        """
        batch = self.sources[positions]
        if self.targets is not None:
            batch["labels"] = self.targets[positions]["input_ids"]
        if self.references is not None:
            batch["references"] = self.references.take(batch["row"].numpy()).to_pylist()
        return batch

    # A DataLoader that batches by itself calls this one, and hands the result to `collate_fn`.
    __getitems__ = __getitem__


class CorruptedRows(TorchDataset[dict[str, Any]]):
    """Rows of plain text with spans taken out, which are the targets: see :func:`span_corruption`.

    What is taken out depends on the seed, the epoch and the row: on nothing else.

    Args:
        texts: Tokens without special ones; their table has a column ``row``, the number in the source.
        sentinels: Ids of the sentinels.
        eos: Id of the end-of-sequence token.
        noise: Share of tokens in spans.
        mean_span: Mean length of a span, in tokens.
        seed: Seed of all draws.
        redraw: Whether each epoch has a draw of its own, for training; else all have the same one.

    Raises:
        ValueError: There are fewer sentinels than spans in the longest row, or a number is out of range.
    """

    def __init__(
        self,
        texts: EncodedRows,
        sentinels: Sequence[int],
        eos: int,
        *,
        noise: float,
        mean_span: float,
        seed: int,
        redraw: bool,
    ) -> None:
        self.texts = texts
        self.sentinels = list(sentinels)
        self.eos = eos
        self.options = {"noise": noise, "mean_span": mean_span}
        self.seed = seed
        self.redraw = redraw
        self.rows = source_rows(texts.tokens)[texts.rows]
        self.lengths = texts.lengths
        self._corrupt(torch.zeros(int(self.lengths.max()), dtype=torch.int64), torch.Generator())

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """A batch of ``input_ids`` and ``attention_mask``, ``labels`` and ``row``.

        Args:
            positions: Positions in the set, ``(batch,)``; from a :class:`LengthBucketSampler` they know their epoch,
                and without one it is the first.
        """
        draw = getattr(positions, "epoch", 0) if self.redraw else _FIXED
        chosen = torch.as_tensor(positions)
        numbers = self.texts.rows[chosen].tolist()
        ids = self.texts.tokens[numbers]["input_ids"].to_pylist()
        pairs = []
        for number, row in zip(numbers, ids, strict=True):
            generator = torch.Generator().manual_seed(random_key(self.seed, draw, number))
            pairs.append(self._corrupt(torch.tensor(row), generator))
        inputs, targets = zip(*pairs, strict=True)
        padding = self.texts.padding
        input_ids, mask = _rectangle(inputs, padding)
        labels, _ = _rectangle(targets, Padding(IGNORED, multiple=padding.multiple))
        return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels, "row": self.rows[chosen]}

    # A DataLoader that batches by itself calls this one, and hands the result to `collate_fn`.
    __getitems__ = __getitem__

    def _corrupt(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return span_corruption(ids, self.sentinels, self.eos, generator=generator, **self.options)


def _rectangle(rows: Sequence[Tensor], padding: Padding) -> tuple[Tensor, Tensor]:
    mask = padding.mask(torch.tensor([len(row) for row in rows]))
    return torch.full(mask.shape, padding.token).masked_scatter_(mask, torch.cat(list(rows))), mask
