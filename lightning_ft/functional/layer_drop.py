"""LayerDrop: blocks that give what they are given, for as long as they are dropped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_ft.core.counter_random import random_key
from lightning_ft.core.undisturbed import same_randomness
from lightning_ft.functional.module_trace import Forwards, apart, float_tensors

Build = Callable[[Tensor, list[Any]], Any]


def draw_dropped(probabilities: Mapping[str, float], *key: int) -> set[str]:
    """Which blocks are dropped: each by itself, with its probability, as a function of the key alone.

    Args:
        probabilities: By the block's name; the order counts.
        key: Integers: a seed, an epoch, a batch.

    Example:
        >>> draw_dropped({"block.0": 0.0, "block.1": 1.0}, 0, 0)
        {'block.1'}
    """
    draws = ((random_key(*key, i) % (1 << 64) >> 11) * 2.0**-53 for i in range(len(probabilities)))
    return {name for (name, p), draw in zip(probabilities.items(), draws, strict=True) if draw < p}


class DroppableBlocks:
    """Stands before the ``forward`` of blocks, on the instances; :meth:`remove` takes it away.

    A dropped block in train mode returns its hidden state as it came, in the structure that its output has: other parts
    of it must be arguments that it only hands on, or plain values. What that structure is, is learnt when it is first
    needed, from a run beside the real one (no gradients, no random number drawn, no cache). A block that makes
    something for the others (T5's lowest, whose position bias all use) cannot be dropped, and runs.

    A dropped block's parameters get gradients of zero, which is what they are: an optimiser, DDP and an accumulation
    window then treat the step as any other, and no parameter is unused.

    Args:
        blocks: By name, bottom to top.

    Attributes:
        dropped: Names of the blocks to drop now.
        calls: Of each block, how often it was called in train mode, and how often it was dropped.
        needed: Blocks that cannot be dropped, and why.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.dropped: Collection[str] = ()
        self.calls = {name: [0, 0] for name in blocks}
        self.needed: dict[str, str] = {}
        self._builds: dict[Hashable, Build | None] = {}
        lists = {name.rpartition(".")[0]: name for name in reversed(list(blocks))}
        self._lowest = set(lists.values())
        self._forwards = Forwards()
        self._active = True
        # Bound to the block, so that a copy of the module has it bound to its own.
        self._forwards.replace(
            {
                block: MethodType(_Forward(self, name, vars(block).get("forward")), block)
                for name, block in blocks.items()
            }
        )

    def remove(self) -> None:
        """Put back what was there; copies of the module drop nothing any more, either."""
        self._active = False
        self._forwards.restore()

    def call(self, name: str, block: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The output of a block."""
        if not (self._active and block.training):
            return run(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        if name in self._lowest:
            _refuse_filled(leaves)
        self.calls[name][0] += 1
        hidden = next(float_tensors(leaves), None)
        if name not in self.dropped or hidden is None:
            return run(*args, **kwargs)
        build = self._build(name, run, args, kwargs, leaves, str(structure))
        if build is None:
            return run(*args, **kwargs)
        self.calls[name][1] += 1
        if torch.is_grad_enabled():
            trained = [p for p in block.parameters() if p.requires_grad]
            touched: Tensor = _ZeroGradients.apply(hidden, *trained)  # type: ignore[no-untyped-call]
            hidden = touched
        return build(hidden, leaves)

    def _build(self, name: str, run: Any, args: Any, kwargs: Any, leaves: list[Any], structure: str) -> Build | None:
        flags = tuple(leaf if isinstance(leaf, bool | str | None) else type(leaf) for leaf in leaves)
        form = (name, structure, flags)
        if form not in self._builds:
            with apart(), same_randomness():
                output = run(*map(_without_cache, args), **{key: _without_cache(v) for key, v in kwargs.items()})
            try:
                self._builds[form] = _plan(output, next(float_tensors(leaves)), leaves)
            except ValueError as reason:
                self._builds[form] = None
                self.needed[name] = str(reason)
        return self._builds[form]


class _Forward:
    """Called with the block that it is bound to."""

    def __init__(self, dropping: DroppableBlocks, name: str, own: Any) -> None:
        self.dropping, self.name, self.own = dropping, name, own

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self.own.__func__ if isinstance(self.own, MethodType) else None
        run = partial(own or type(block).forward, block) if own or self.own is None else self.own
        return self.dropping.call(self.name, block, run, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return self


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return hidden.clone()  # FSDP2 cannot hook a view, which the tensor itself would become, too

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like]
        return (gradients[0], *zeros)


def _plan(output: Any, hidden: Tensor, leaves: list[Any]) -> Build:
    """How to build the output of a dropped block from its hidden state and its arguments.

    Raises:
        ValueError: A part of it is none of these.
    """
    found: list[int] = []

    def plan(value: Any) -> Build:
        if isinstance(value, Tensor):
            if not found and value.is_floating_point() and value.shape == hidden.shape:
                found.append(1)
                return lambda hidden, leaves: hidden
            place = next((i for i, leaf in enumerate(leaves) if leaf is value), None)
            if place is None:
                raise ValueError(f"it makes a tensor of shape {tuple(value.shape)} beside its hidden state")
            return lambda hidden, leaves: leaves[place]
        if type(value) in (tuple, list):
            parts, kind = [plan(part) for part in value], type(value)
            return lambda hidden, leaves: kind(part(hidden, leaves) for part in parts)
        if value is None or isinstance(value, bool | int | float | str):
            return lambda hidden, leaves: value
        raise ValueError(f"it returns a {type(value).__name__}")

    build = plan(output)
    if not found:
        raise ValueError(f"it returns no hidden state of the shape {tuple(hidden.shape)} that it is given")
    return build


def _caches(leaves: list[Any]) -> Iterator[Any]:
    return (leaf for leaf in leaves if callable(getattr(leaf, "get_seq_length", None)))


def _without_cache(value: Any) -> Any:
    return None if any(_caches([value])) else value


def _refuse_filled(leaves: list[Any]) -> None:
    for cache in _caches(leaves):
        if any(int(cache.get_seq_length(layer)) for layer in range(len(cache))):
            raise ValueError(
                "LayerDrop: in train mode the model is called with a cache that an earlier call filled, in which "
                "dropped blocks have no entries: generate in eval mode, or train with use_cache=False"
            )
