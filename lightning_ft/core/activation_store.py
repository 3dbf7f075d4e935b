"""Activations of rows of different lengths, end to end in one buffer, found by key."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_ft.core.files import atomic_file

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_VALUES, _INDEX = "values.bin", "index.pt"


def parse_size(value: int | str, argument: str) -> int:
    """Bytes of what a person wrote.

    Args:
        value: A number of bytes, or a number followed by ``B``, ``KB``, ``MB``, ``GB``, ``TB``, ``KiB``, ``MiB`` or
            ``GiB``.
        argument: The argument's name, for the error.

    Raises:
        ValueError: The value has no unit that is known, or is not positive.

    Example:
        >>> parse_size("1.5 GB", "budget")
        1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", value if isinstance(value, str) else f"{value} B")
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1 or isinstance(value, bool):
        raise ValueError(f'{argument}={value!r} must be a size: write "500 MB", "2 GB" or a number of bytes')
    return size


@final
class ActivationStore:
    """Keeps one run of vectors ``(length, width)`` for each key, without padding, until its capacity is used up.

    What does not fit is not added: nothing is ever evicted, so that which keys are held depends on the order of
    :meth:`add` alone. The buffer is reserved at once; the system gives memory (or, for a file, disk) as it is written.

    Args:
        width: Length of a vector.
        capacity: Vectors that fit.
        dtype: Their type in the store.
        folder: Folder of a store on disk, which is memory-mapped; None keeps it in memory. :meth:`publish` moves it to
            where other runs find it.

    Example:
        >>> store = ActivationStore(2, 3)
        >>> store.add(b"row", torch.ones(2, 2)), store.add(b"too long", torch.ones(2, 2))
        (True, False)
        >>> store.gather(store.find([b"row"]), [1], 4)[0, :, 0]
        tensor([0., 1., 1., 0.])
    """

    def __init__(
        self, width: int, capacity: int, dtype: torch.dtype = torch.float32, *, folder: Path | None = None
    ) -> None:
        self.width, self.capacity, self.dtype, self.folder = width, capacity, dtype, folder
        size = (capacity + 1) * width
        if folder is None:
            flat = torch.empty(size, dtype=dtype)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            flat = torch.from_file(str(folder / _VALUES), shared=True, size=size, dtype=dtype)
        self._values = flat.view(capacity + 1, width)
        self._values[0] = 0  # what padding is gathered from
        self._where: dict[bytes, tuple[int, int]] = {}
        self._end = 1
        self.read_only = False

    @classmethod
    def open(cls, folder: Path) -> ActivationStore | None:
        """The store that a run published in ``folder``, read-only; None if there is none, or not a whole one."""
        try:
            index = torch.load(folder / _INDEX, weights_only=True)
            size = index["end"] * index["width"]
            if (folder / _VALUES).stat().st_size < size * index["dtype"].itemsize:
                return None
            flat = torch.from_file(str(folder / _VALUES), shared=False, size=size, dtype=index["dtype"])
        except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError):
            return None
        store = object.__new__(cls)
        store.width, store.capacity, store.dtype, store.folder = (
            index["width"],
            index["end"] - 1,
            index["dtype"],
            folder,
        )
        store._values = flat.view(index["end"], index["width"])
        spans = zip(index["starts"].tolist(), index["lengths"].tolist(), strict=True)
        keys, size = index["keys"].numpy().tobytes(), index["key_size"]
        store._where = {keys[i * size : (i + 1) * size]: span for i, span in enumerate(spans)}
        store._end, store.read_only = index["end"], True
        return store

    def publish(self, target: Path) -> ActivationStore:
        """Write the index, move the folder to ``target`` in one rename, and open it there.

        If another process was faster, its store is opened and this one removed.
        """
        assert self.folder is not None
        spans = torch.tensor(list(self._where.values()), dtype=torch.int64).reshape(-1, 2)
        index: dict[str, Any] = {
            "keys": torch.frombuffer(bytearray(b"".join(self._where)), dtype=torch.uint8),
            "key_size": len(next(iter(self._where))),
            "starts": spans[:, 0].clone(),
            "lengths": spans[:, 1].clone(),
            **{"end": self._end, "width": self.width, "dtype": self.dtype},
        }
        del self._values
        os.truncate(self.folder / _VALUES, self._end * self.width * self.dtype.itemsize)
        with atomic_file(self.folder / _INDEX) as path:
            torch.save(index, path)
        if ActivationStore.open(target) is None:
            shutil.rmtree(target, ignore_errors=True)  # a broken one
        try:
            self.folder.rename(target)
        except OSError:
            shutil.rmtree(self.folder, ignore_errors=True)
        opened = ActivationStore.open(target)
        if opened is None:
            raise OSError(f"the activations written to {target} cannot be read back: free space on that disk?")
        return opened

    def remove(self) -> None:
        """Delete the files of a store that was not published."""
        if self.folder is not None and not self.read_only:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, key: bytes, vectors: Tensor) -> bool:
        """Keep the vectors ``(length, width)`` of a key; False if they do not fit or the store is read-only."""
        length = len(vectors)
        if key in self._where:
            return True
        if self.read_only or self._end + length > self.capacity + 1:
            return False
        self._values[self._end : self._end + length] = vectors
        self._where[key] = (self._end, length)
        self._end += length
        return True

    def find(self, keys: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """Where the vectors of each key begin, and how many they are; None for a key that is not held."""
        return [self._where.get(key) for key in keys]

    def gather(self, spans: Sequence[tuple[int, int] | None], starts: Sequence[int], length: int) -> Tensor:
        """The vectors of several keys side by side, ``(keys, length, width)``, zero where a key has none.

        Args:
            spans: What :meth:`find` gave; None leaves zeros.
            starts: At which position the vectors of each key begin.
            length: Positions.
        """
        first = torch.tensor([span[0] if span else 0 for span in spans])[:, None]
        count = torch.tensor([span[1] if span else 0 for span in spans])[:, None]
        offset = torch.arange(length) - torch.tensor(list(starts))[:, None]
        index = torch.where((offset >= 0) & (offset < count), first + offset, 0)
        return self._values.index_select(0, index.flatten()).view(len(spans), length, self.width)

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return (self._end - 1) * self.width * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationStore:
        return self
