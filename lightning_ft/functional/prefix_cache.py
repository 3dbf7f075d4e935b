"""What a frozen prefix gave for each row, kept and handed out in place of running it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_ft.core.activation_store import ActivationStore
from lightning_ft.functional.frozen_prefix import FrozenPrefix, digest, fingerprint
from lightning_ft.functional.prefix_rows import Inputs, Row, Unsuited, by_length, detach_rows, rows_of


@final
class PrefixCache:
    """The activations of one frozen prefix with the weights that it has now.

    Filled in one pass over all rows (:meth:`fill`), in batches that depend on the set of rows alone: the same
    activations, to the bit, in every run. Without that it takes what it meets first (:attr:`filled` is false), and then
    the last bits depend on which rows were computed together. What does not fit the budget is computed each time.

    Args:
        prefix: How rows are computed and stood in for.
        parameters: The parameters of the prefix.
        budget: Bytes that may be kept.
        folder: Folder for stores on disk; None keeps them in memory.
    """

    def __init__(
        self, prefix: FrozenPrefix, parameters: Iterable[nn.Parameter], budget: int, folder: Path | None = None
    ) -> None:
        self.prefix, self.folder = prefix, folder
        self.filled = self.reused = False
        self.epochs = 0
        """Epochs that it has served to their end."""
        self._others: set[bytes] = set()
        self._capacity = budget // (prefix.width * prefix.dtype.itemsize)
        self._store: ActivationStore | None = None
        self._watched = prefix.watched(parameters)
        self._print, self._digest = fingerprint(self._watched), digest(self._watched, prefix.describe())
        self._forms: dict[Any, str] = {}

    @property
    def rows(self) -> int:
        """Rows that are held."""
        return 0 if self._store is None else len(self._store)

    @property
    def share(self) -> float:
        """The share of the rows met that it holds; the others did not fit."""
        return self.rows / max(1, self.rows + len(self._others))

    @property
    def nbytes(self) -> int:
        """Bytes that are used."""
        return 0 if self._store is None else self._store.nbytes

    def is_stale(self) -> bool:
        """Whether the weights changed. Written with the values that they had (an average swapped in and out) is not."""
        now = fingerprint(self._watched)
        if now == self._print:
            return False
        self._print = now
        return digest(self._watched, self.prefix.describe()) != self._digest

    def takes_over_from(self, other: PrefixCache) -> bool:
        """Take the rows of a cache of the same prefix and weights; False if it is of another one."""
        if other._digest != self._digest or other._store is None:
            return False
        self._store, self.filled, self.epochs, self._others = other._store, other.filled, other.epochs, other._others
        return True

    def fill(self, rows: Iterable[Row]) -> None:
        """Compute all rows that fit, or open the store that another run filled with the same rows and weights."""
        kept: dict[bytes, Row] = {}
        used = 0
        for row in rows:
            if row.key in kept or row.key in self._others:
                continue
            length = 1 if self.prefix.pooled else row.length
            if used + length > self._capacity:
                self._others.add(row.key)
            else:
                kept[row.key] = detach_rows([row])[0]
                used += length
        self.filled = True
        if self.folder is None:
            self._store = self._computed(kept, used, None)
            return
        name = digest([], self._digest + b"".join(sorted(kept)).hex())
        self._store = self._reopened(self.folder / name, kept)
        self.reused = self._store is not None
        if self._store is None:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            store = self._computed(kept, used, self.folder / f".{name}.{os.getpid()}.tmp")
            self._store = store.publish(self.folder / name) if kept else store

    def start_empty(self) -> None:
        """Keep rows as they are met."""
        folder = None if self.folder is None else self.folder / f".lazy.{os.getpid()}.tmp"
        self._store = ActivationStore(self.prefix.width, self._capacity, self.prefix.dtype, folder=folder)

    def answer(self, inputs: Inputs) -> tuple[int, int]:
        """Stand in for the prefix in a call of its owner.

        Returns:
            Rows of the call, and how many of them were held.

        Raises:
            Unsuited: A call of this form is not answered rightly.
        """
        assert self._store is not None
        self._check_form(inputs)
        rows, store = rows_of(inputs.columns), self._store
        spans = store.find([row.key for row in rows])
        pooled, length = self.prefix.pooled, next(iter(inputs.columns.values())).shape[1]
        starts = [0] * len(rows) if pooled else [row.start for row in rows]
        values = store.gather(spans, starts, 1 if pooled else length)
        missing = [i for i, span in enumerate(spans) if span is None]
        if missing:
            for i, vectors in zip(missing, self.prefix.compute([rows[i] for i in missing]), strict=True):
                values[i, starts[i] : starts[i] + len(vectors)] = vectors
                if not self.filled and not store.add(rows[i].key, vectors):
                    self._others.add(rows[i].key)
        self.prefix.begin(values, length)
        return len(rows), len(rows) - len(missing)

    def close(self) -> None:
        """Give memory and temporary files back."""
        if self._store is not None:
            self._store.remove()
        self._store = None

    def _check_form(self, inputs: Inputs) -> None:
        """Each form of call is proved once: other flags or another precision may ask for what was skipped."""
        kind = next(iter(inputs.columns.values())).device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        form = (inputs.form, cast)
        if form not in self._forms:
            try:
                self.prefix.prove(inputs)
                self._forms[form] = ""
            except Unsuited as reason:
                self._forms[form] = str(reason)
        if self._forms[form]:
            raise Unsuited(self._forms[form])

    def _computed(self, rows: dict[bytes, Row], vectors: int, folder: Path | None) -> ActivationStore:
        store = ActivationStore(self.prefix.width, vectors, self.prefix.dtype, folder=folder)
        for batch in by_length(list(rows.values())):
            for row, values in zip(batch, self.prefix.compute(batch), strict=True):
                store.add(row.key, values)
        return store

    def _reopened(self, folder: Path, rows: dict[bytes, Row]) -> ActivationStore | None:
        """The store of another run, if what it holds is what this model computes."""
        store = ActivationStore.open(folder)
        if store is None or store.width != self.prefix.width or any(key not in store for key in rows):
            return None
        sample = sorted(rows.values(), key=lambda row: (row.stop, row.key))
        for row in (sample[0], sample[len(sample) // 2], sample[-1]):
            held = store.gather(store.find([row.key]), [0], 1 if self.prefix.pooled else row.length)[0]
            if not self.prefix.agree(held, self.prefix.compute([row])[0]):
                return None
        return store


def all_rows(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Row]:
    """The rows of batches of columns, one after the other."""
    for columns in batches:
        yield from rows_of(columns)
