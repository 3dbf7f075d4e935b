"""Weights that are computed: once for each stretch in which what they are computed of does not change."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class Moment:
    """A stretch of a run in which a computed weight is computed once, however often a forward pass reads it.

    Whoever runs the model (a callback) begins and ends it; outside of one each read computes. Within it a value is kept
    as long as no tensor that it is computed of is known to have been written to. (Of a fused optimiser's step that is
    not known: whoever begins a moment drops what is kept after a step.) It must hold on to none of the tensors that
    autograd frees in a backward pass, so that several passes may go through it: for ``autograd.Function`` that save
    nothing but attributes. Copies of a module share no value with it.

    Attributes:
        stamp: What the stretch is known by, None outside of one; a key of random draws.

    Example:
        >>> moment, calls = Moment(), []
        >>> _ = moment.once("w", [], lambda: torch.ones(len(calls.append(1) or calls)))
        >>> moment.begin(0, 1)
        >>> [len(moment.once("w", [], lambda: torch.ones(len(calls.append(1) or calls)))) for _ in range(3)]
        [2, 2, 2]
    """

    def __init__(self) -> None:
        self.stamp: tuple[int, ...] | None = None
        self._values: dict[Hashable, tuple[Any, Tensor]] = {}

    def begin(self, *stamp: int) -> None:
        """Start a stretch; what was kept is dropped."""
        self._values.clear()
        self.stamp = stamp

    def end(self) -> None:
        """Drop what was kept; each read computes again."""
        self._values.clear()
        self.stamp = None

    def drop(self) -> None:
        """Drop what was kept, but go on."""
        self._values.clear()

    def once(self, name: Hashable, sources: list[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The value that ``compute`` gives, from an earlier read where that is the same.

        Args:
            name: Of the value.
            sources: The tensors of which it is computed.
            compute: Computes it.
        """
        if self.stamp is None or any(source.is_inference() or source.is_meta for source in sources):
            return compute()
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        state = (*modes, *((s.data_ptr(), s._version, s.requires_grad, s.dtype) for s in sources))
        kept = self._values.get(name)
        if kept is None or kept[0] != state:
            kept = self._values[name] = (state, compute())
        return kept[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Moment:
        return Moment()
