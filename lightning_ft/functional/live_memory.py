"""Bytes of the tensors that are alive, by what they are for, and their peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARTS = ("weights", "gradients", "optimiser", "activations", "workspace")


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of all tensors that are made within it, until they are freed.

    A storage is counted once, however many tensors share it, and in its whole size. It is *workspace* until
    :meth:`tag` says better. Works with tensors that hold no data (``FakeTensor``), whose sizes are those of real ones.

    Attributes:
        live: Bytes alive, by part.
        peak: ``live`` at the moment when its sum was largest.
        largest: The most that each part had at any moment.

    Example:
        >>> import torch
        >>> with LiveMemory() as memory:
        ...     kept = torch.zeros(10)
        ...     _ = (kept + 1).sum()
        >>> memory.live["workspace"] >= 40, sum(memory.peak.values()) >= 80
        (True, True)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parts: dict[int, tuple[str, int, Any]] = {}
        self.live = dict.fromkeys(PARTS, 0)
        self.reset()

    def reset(self) -> None:
        """Begin a new peak at what is alive."""
        self.peak = dict(self.live)
        self.largest = dict(self.live)

    def tag(self, tensors: Iterable[Tensor], part: str, *, only: str | None = None) -> None:
        """Count these tensors to a part, if they are not yet counted, or are counted to ``only``, or to any part."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._parts.get(id(storage))
            if known is None:
                self._add(storage, part)
            elif known[0] != part and only in (None, known[0]):
                self._move(-known[1], known[0])
                self._parts[id(storage)] = (part, *known[1:])
                self._move(known[1], part)

    def _add(self, storage: torch.UntypedStorage, part: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._parts[key] = (part, size, weakref.ref(storage, lambda _: self._freed(key)))
        self._move(size, part)

    def _freed(self, key: int) -> None:
        part, size, _ = self._parts.pop(key)
        self.live[part] -= size

    def _move(self, size: int, part: str) -> None:
        self.live[part] += size
        self.largest[part] = max(self.largest[part], self.live[part])
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._parts:
                self._add(leaf.untyped_storage(), "workspace")
        return output


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def state_tensors(state: Mapping[Any, Any]) -> Iterator[Tensor]:
    """The tensors of an optimiser's ``state``, wherever its entries hold them."""
    for entry in state.values():
        yield from (leaf for leaf in tree_leaves(entry) if isinstance(leaf, Tensor))
