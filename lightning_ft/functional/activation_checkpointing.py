"""Blocks that keep only their inputs for backward, and compute the rest again there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lightning_ft.core.layers import Layers
from lightning_ft.functional.module_trace import Forwards

Place = tuple[torch.device, Tensor]


def chosen_blocks(module: nn.Module, blocks: str | Sequence[str] = "all", layers: Layers | None = None) -> list[str]:
    """Paths of the blocks that ``blocks`` names, bottom to top.

    Args:
        module: Any module.
        blocks: ``"all"``, or as in :meth:`LayerGroups.select`: ``"top:2"``, ``"block.0..block.5"``, a list.
        layers: Where the blocks are, if they are not found by themselves.

    Raises:
        ValueError: Something else than blocks is named, or nothing.
    """
    layers = layers or Layers()
    paths = layers.block_paths(module)
    names = list(paths) if blocks == "all" else layers.of(module).select(blocks)
    if wrong := [name for name in names if name not in paths]:
        raise ValueError(f"blocks={blocks!r} must name blocks, {', '.join(paths)}; it names {', '.join(wrong)}")
    # One that runs at several depths (ALBERT's) is one module.
    return list(dict.fromkeys(path for name in names for path in paths[name]))


class CheckpointedBlocks:
    """Recompute the forward pass of blocks in backward, until :meth:`remove`.

    Where gradients are asked for, a block runs under :func:`torch.utils.checkpoint.checkpoint` (the form that is not
    re-entrant), which restores the random generators and autocast for the second run: dropout masks, and so gradients,
    are the same to the bit. What is replaced is the ``forward`` of each instance; the module tree and state dicts are
    as before, and hooks run once. A cache of keys and values that the model fills though nothing reads it is left out.

    Args:
        blocks: The modules.
        offload: Keep those inputs of a block that need gradients in main memory: pinned, and copied in the order of the
            device's other work, so that nothing waits for it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> block = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> wrapped = CheckpointedBlocks([block])
        >>> block(torch.ones(1, 2)).sum().backward()
        >>> block[0].bias.grad.shape
        torch.Size([2])
        >>> wrapped.remove()
    """

    def __init__(self, blocks: Sequence[nn.Module], *, offload: bool = False) -> None:
        self._forwards = Forwards()
        self._forwards.replace({block: _wrap(block, offload) for block in blocks})
        if "torch._dynamo" in sys.modules:
            # What was compiled before would run on as it was.
            torch.compiler.reset()

    def remove(self) -> None:
        """Put the blocks back."""
        self._forwards.restore()


def _wrap(block: nn.Module, offload: bool) -> Callable[..., Any]:
    forward = block.forward
    # Partial objects, since copies of the module then run their own blocks.
    wrapped = partial(_run, block, forward, offload)
    wrapped.__wrapped__ = forward  # type: ignore[attr-defined]
    return wrapped


def _run(block: nn.Module, forward: Callable[..., Any], offload: bool, *args: Any, **kwargs: Any) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not torch.is_grad_enabled() or not (moving or any(p.requires_grad for p in block.parameters())):
        return forward(*args, **kwargs)
    rest = [None if i in moving else _without_cache(leaf) for i, leaf in enumerate(leaves)]

    def again(*tensors: Tensor) -> Any:
        values = list(rest)
        for i, tensor in zip(moving, tensors, strict=True):
            values[i] = tensor
        own_args, own_kwargs = tree_unflatten(values, spec)
        return forward(*own_args, **own_kwargs)

    with saved_tensors_hooks(_to_main_memory, _back) if offload else nullcontext():
        return checkpoint(again, *(leaves[i] for i in moving), use_reentrant=False)


def _without_cache(leaf: Any) -> Any:
    """None in place of an empty key-value cache: each run would append to it, and training reads none."""
    length = getattr(leaf, "get_seq_length", None)
    if not callable(length):
        return leaf
    if length():
        raise ValueError(
            "ActivationCheckpointing cannot run a block twice that reads keys and values from a cache (prefix tuning, "
            "past_key_values): leave one of the two out"
        )
    return None


def _to_main_memory(tensor: Tensor) -> Place:
    if tensor.device.type == "cpu":
        return tensor.device, tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return tensor.device, kept.copy_(tensor, non_blocking=True)


def _back(place: Place) -> Tensor:
    device, kept = place
    return kept.to(device, non_blocking=True)
