"""Batches of filled-in patterns: framed by special tokens, with demonstrations, with content-free inputs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from typing_extensions import override

from lightning_ft.core.counter_random import below, random_bits, random_key
from lightning_ft.data.encoding import EncodedRows, token_counts
from lightning_ft.data.masking import Masking
from lightning_ft.data.windows import WindowRows, source_rows
from lightning_ft.functional.cloze_windows import Frame

if TYPE_CHECKING:
    from datasets import Dataset


class Demonstrations:
    """Training rows with their label's word in the gap, drawn at random, as many of each label.

    Args:
        tokens: The tokens of every training row under every pattern, row by row.
        labels: Class number of each row, ``(rows,)``.
        rows: The rows to draw from.
        patterns: Number of patterns.
        per_label: How many of each label.
        names: Names of the labels.

    Raises:
        ValueError: A label with too few rows.
    """

    def __init__(
        self, tokens: Dataset, labels: Tensor, rows: Tensor, *, patterns: int, per_label: int, names: Sequence[str]
    ) -> None:
        self._ids = tokens.data["input_ids"].combine_chunks()
        self._of_label = [rows[labels[rows] == number].tolist() for number in range(len(names))]
        self.patterns = patterns
        self.per_label = per_label
        for name, members in zip(names, self._of_label, strict=True):
            if len(members) <= per_label:
                raise ValueError(
                    f"demonstrations={per_label} needs {per_label + 1} training rows or more of each label (no row is "
                    f"shown to itself), and {name!r} has {len(members)}"
                )
        per_row = per_label * len(names)
        self.mean_tokens = round(float(token_counts(tokens).double().mean()) * per_row)

    def draw(self, key: int, pattern: int, without: int | None = None) -> list[list[int]]:
        """Tokens of each demonstration of a set, in random order.

        Args:
            key: Decides the set.
            pattern: Number of the pattern that they follow.
            without: A row that may not be among them.
        """
        chance = random.Random(key)
        chosen: list[int] = []
        for members in self._of_label:
            drawn = chance.sample(members, self.per_label + 1)
            chosen += [row for row in drawn if row != without][: self.per_label]
        chance.shuffle(chosen)
        ids: list[list[int]] = self._ids.take([row * self.patterns + pattern for row in chosen]).to_pylist()
        return ids


class TrainRows(TorchDataset[dict[str, Any]]):
    """Rows under patterns, with demonstrations and masked texts that are new in each epoch.

    Args:
        queries: The framed rows, one item for each row and pattern.
        frame: What stands around them.
        seed: With the epoch and the item it decides all that is random.
        demonstrations: What to show beside each row; None for none.
        unlabelled: Texts to mask; None for none.
    """

    def __init__(
        self,
        queries: EncodedRows,
        frame: Frame,
        seed: int,
        *,
        demonstrations: Demonstrations | None = None,
        unlabelled: MaskedTexts | None = None,
    ) -> None:
        self.queries = queries
        self.frame = frame
        self.seed = seed
        self.demonstrations = demonstrations
        self.unlabelled = unlabelled
        self.rows = source_rows(queries.tokens)[queries.rows]
        self.lengths = queries.lengths + (0 if demonstrations is None else demonstrations.mean_tokens)

    @property
    def truncated(self) -> Tensor | None:
        """Which rows were cut, ``(rows,)``."""
        return self.queries.truncated

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        """What :class:`EncodedRows` gives, with demonstrations; masked texts as a batch in it, ``unlabelled``."""
        epoch = getattr(positions, "epoch", 0)
        batch = self.queries[positions] if self.demonstrations is None else self._shown(positions, epoch)
        if self.unlabelled is not None:
            batch["unlabelled"] = self.unlabelled.draw(positions, epoch)
        return batch

    # A DataLoader that batches by itself calls this one, and hands the result to `collate_fn`.
    __getitems__ = __getitem__

    def _shown(self, positions: Sequence[int], epoch: int) -> dict[str, Any]:
        from datasets import Dataset

        assert self.demonstrations is not None
        chosen = self.queries.rows[torch.as_tensor(positions)]
        table = self.queries.tokens.with_format(None)[chosen.tolist()]
        rows = zip(table["row"], table["pattern"], strict=True)
        sets = [
            self.demonstrations.draw(random_key(self.seed, epoch + 1, row, pattern), pattern, without=row)
            for row, pattern in rows
        ]
        old = table["input_ids"]
        table["input_ids"] = [self.frame.add(ids, shown) for ids, shown in zip(old, sets, strict=True)]
        table["mask_positions"] = [
            self.frame.gap(new, [bool(token) for token in gap[len(self.frame.before) :]])
            for new, gap in zip(table["input_ids"], table["mask_positions"], strict=True)
        ]
        if "token_type_ids" in table:
            table["token_type_ids"] = [[0] * len(ids) for ids in table["input_ids"]]
        labels = None if self.queries.labels is None else self.queries.labels.take(chosen.numpy())
        return EncodedRows(Dataset.from_dict(table), self.queries.padding, labels=labels)[range(len(chosen))]


class MaskedTexts:
    """Texts with tokens masked at random, to keep a masked language model's knowledge of the language.

    Args:
        texts: The texts under patterns.
        masking: What masks them.
    """

    def __init__(self, texts: EncodedRows, masking: Masking) -> None:
        self.texts = texts
        self.masking = masking

    def draw(self, positions: Sequence[int], epoch: int) -> dict[str, Any]:
        """A text drawn for each position of a training batch, masked; ``labels`` are the masked tokens, else -100."""
        keys = torch.as_tensor(positions)
        # Masking itself draws for the purposes 0 and 1.
        bits = random_bits(random_key(self.masking.seed, epoch, 2), keys)
        batch = self.texts[below(bits, len(self.texts)).tolist()]
        names: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")
        kept = {name: batch[name] for name in names if name in batch}
        return self.masking(kept, keys, epoch)


class EvaluationRows(WindowRows):
    """Rows under all patterns and sets of demonstrations together, and with them inputs without content.

    Args:
        windows: The rows; those of a row stand together, set by set, and in each the patterns in their order.
        content_free: A batch of inputs without content, in the same order; None to leave it out.
    """

    def __init__(self, windows: EncodedRows, content_free: dict[str, Any] | None) -> None:
        super().__init__(windows)
        self.content_free = content_free

    @property
    def truncated(self) -> Tensor:
        """Which rows were cut under some pattern, ``(rows,)``."""
        cut = self.windows.truncated
        assert cut is not None
        of = torch.repeat_interleave(torch.arange(len(self.rows)), self.counts)
        return torch.zeros(len(self.rows), dtype=torch.int64).index_add_(0, of, cut.long()) > 0

    @override
    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        batch = super().__getitem__(positions)
        return batch if self.content_free is None else {**batch, "content_free": self.content_free}

    __getitems__ = __getitem__
