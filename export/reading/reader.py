"""What all readers share: what they are made of, items and their parts, and the arrays that a graph is fed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lightning_ft.export.reading.graph import Graph

if TYPE_CHECKING:
    import numpy as np


class Exported(NamedTuple):
    """What a reader is made of."""

    place: Path
    """The exported folder, with ``tokenizer.json``."""
    task: str
    """As Hugging Face names it."""
    labels: list[str]
    """Names of the classes, by index."""
    settings: dict[str, Any]
    """Those of ``head.json``, over the reader's own defaults, under those that the user gave."""
    padding: dict[str, Any]
    """``token`` and ``token_type``, which fill up rows, and whether they stand on the ``left``."""
    truncation_side: str
    """Where a text that is too long loses tokens: ``"right"`` or ``"left"``."""
    limit: int | None
    """Tokens that the model takes; None for any number."""
    max_length: int | None
    """Tokens kept of a row, or of a window of it; None for all."""
    truncate: bool
    """Whether a row that is too long is cut, and not refused, where the task has no windows."""
    batch_size: int
    """Parts that are run at once."""
    open_graph: Callable[[str], Graph]
    """Opens the graph in a file of the folder."""


class Part(NamedTuple):
    """What is one row of the graph's inputs: a sequence of tokens, or one for each choice."""

    ids: Sequence[Sequence[int]]
    """The tokens."""
    types: Sequence[Sequence[int]]
    """Their types, as long."""
    known: Any = None
    """What else the reader must know to run it, or to read what comes out."""

    @property
    def width(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(ids) for ids in self.ids)

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(ids) for ids in self.ids)


class Item(NamedTuple):
    """An encoded row."""

    parts: Sequence[Part]
    """What the graph reads of it: one part, or one for each window or pattern."""
    row: Any = None
    """What an answer needs of the row."""


class Reader(ABC):
    """Rows of one task as items, and what the graphs say of them as answers. Derive from it for a task.

    Args:
        exported: The folder.
    """

    files: ClassVar[tuple[str, ...]] = ("model.onnx",)
    """The graphs that it opens."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings that ``head.json`` may have, and the values that they have without."""

    groups: ClassVar[tuple[str, ...]] = ()
    """Settings that are several: those that a user gives of them leave the others as they are."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.settings = exported.settings

    @abstractmethod
    def encode(self, row: Any, where: str) -> Item:
        """Check and tokenise a row; no graph is needed.

        Args:
            row: What the user gave.
            where: What to call it in errors.

        Raises:
            TypeError: It is no row of the task.
            ValueError: It is one that cannot be read.
        """

    def number(self, item: Item, number: int) -> Item:
        """An item that knows its place in a call, where the answer depends on it."""
        return item

    @abstractmethod
    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """Run parts of similar length and equal :meth:`kind` at once; what is wanted of the outputs for each.

        Little is to be kept: logits over a vocabulary, of all parts of a call, would not fit into memory.
        """

    @abstractmethod
    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """The JSON-able answer to a row.

        Args:
            item: From :meth:`encode`.
            outputs: For each of its parts, from :meth:`run`.
        """

    def kind(self, part: Part) -> int:
        """Parts of different kinds are not run together: by the number of choices."""
        return len(part.ids)

    def close_up(self, parts: Sequence[Part], names: Sequence[str]) -> dict[str, np.ndarray]:
        """The graph's inputs that are made of tokens alone, ``(parts, width)``, or ``(parts, choices, width)``.

        Args:
            parts: Of one kind.
            names: Inputs of the graph; others than the three of tokens are left out.
        """
        import numpy as np

        padding = self.exported.padding
        width, choices = max(part.width for part in parts), len(parts[0].ids)
        ids = [row for part in parts for row in part.ids]
        columns: dict[str, tuple[Sequence[Any], int]] = {
            "input_ids": (ids, padding["token"]),
            "attention_mask": ([[1] * len(row) for row in ids], 0),
            "token_type_ids": ([row for part in parts for row in part.types], padding["token_type"]),
        }
        feed = {}
        for name in names:
            if name in columns:
                values, empty = columns[name]
                table = np.full((len(ids), width), empty, np.int64)
                for row, tokens in zip(table, values, strict=True):
                    row[self.columns(len(tokens), width)] = tokens
                feed[name] = table if choices == 1 else table.reshape(len(parts), choices, width)
        return feed

    def columns(self, length: int, width: int) -> slice:
        """Which columns of a rectangle the tokens of a row stand in."""
        return slice(width - length, width) if self.exported.padding["left"] else slice(0, length)


def shown(row: Any) -> str:
    """A row, in an error."""
    text = repr(row)
    return text if len(text) <= 80 else f"{text[:77]}..."
