"""Where numbers stopped being finite: in gradients by layer, in a forward pass by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.core.sharding import local


@dataclass(frozen=True)
class Overflow:
    """The layers of one backward pass whose gradients are not finite, in the order in which backward met them.

    Args:
        layers: Name of each layer group, and its parameter with the largest share of inf and nan.
        began: The first of them: the others inherit what it passed on.
    """

    layers: Mapping[str, str]
    began: str


@torch.no_grad()
def find_overflow(
    module: nn.Module, parameters: Iterable[nn.Parameter] | None = None, *, layers: Layers | None = None
) -> Overflow | None:
    """Which layers of ``module`` hold gradients with inf or nan. Waits for the device once.

    Backward runs from the head down, so the overflow began in the topmost layer that has one. Layers are those of
    :class:`~lightning_ft.core.layer_groups.LayerGroups`; where it finds none, the modules that own the parameters, the
    last registered first.

    Args:
        module: After ``backward``, before clipping: a norm that is inf makes nan of every gradient.
        parameters: Those to look at, such as one optimiser's; all by default.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Returns:
        None where all gradients are finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> net(torch.ones(1, 1)).backward()
        >>> net[1].weight.grad.fill_(torch.inf)
        tensor([[inf]])
        >>> find_overflow(net)
        Overflow(layers={'1': '1.weight'}, began='1')
    """
    shares = _non_finite_shares(module, None if parameters is None else {id(p) for p in parameters})
    if not shares:
        return None
    found: dict[str, str] = {}
    for layer, names in _top_down(module, layers or Layers()):
        if hit := [name for name in reversed(names) if name in shares]:
            found[layer] = max(hit, key=lambda name: shares[name])
    return Overflow(found, next(iter(found)))


def _non_finite_shares(module: nn.Module, wanted: set[int] | None) -> dict[str, float]:
    chosen = [(name, p) for name, p in module.named_parameters() if wanted is None or id(p) in wanted]
    named = [(name, local(p.grad)) for name, p in chosen if p.grad is not None]
    values = [(name, g.coalesce().values() if g.is_sparse else g) for name, g in named]
    values = [(name, g) for name, g in values if g.numel()]
    if not values:
        return {}
    device = values[0][1].device
    counts = torch.stack([(~g.isfinite()).sum().to(device) for _, g in values]).tolist()
    return {name: count / g.numel() for (name, g), count in zip(values, counts, strict=True) if count}


def _top_down(module: nn.Module, layers: Layers) -> list[tuple[str, list[str]]]:
    """Names of layers and of the parameters in each, the last to run first."""
    names = {id(p): name for name, p in module.named_parameters()}
    try:
        groups = layers.of(module)
    except ValueError:
        if layers != Layers():
            raise
        owners: dict[str, list[str]] = {}
        for name in names.values():
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        return list(owners.items())[::-1]
    return [(group, [names[id(p)] for p in groups.parameters(group)]) for group in reversed(groups.names)]


class ForwardWatch:
    """Finds the module whose output stops being finite first in a forward pass, without waiting for the device.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Hardtanh())
        >>> watch = ForwardWatch()
        >>> with watch.on(net):
        ...     _ = net(torch.full((1, 1), torch.inf))
        >>> watch.first()
        '0'
    """

    def __init__(self) -> None:
        self._seen: list[tuple[str, Tensor]] = []

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Watch the modules without children: the others only pass on what these compute."""
        handles = [
            child.register_forward_hook(lambda _, args, output, name=name: self._note(name, output))
            for name, child in module.named_modules()
            if not any(child.children())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, output: Any) -> None:
        tensors = [t.detach() for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        if tensors:
            self._seen.append((name, torch.stack([(~t.isfinite()).any() for t in tensors]).any()))

    def first(self) -> str | None:
        """Its name, and all is forgotten. None where all outputs were finite. Waits for the device."""
        seen, self._seen = self._seen, []
        flags = torch.stack([flag for _, flag in seen]).tolist() if seen else []
        return next((name for (name, _), flag in zip(seen, flags, strict=True) if flag), None)


class OverflowLog:
    """What is known of the steps that a loss scaler skipped. Its state is plain, for checkpoints."""

    def __init__(self) -> None:
        self.steps = 0
        self.skipped = 0
        self.in_a_row = 0
        self.in_forward = 0
        """Skipped steps in a row whose loss was inf or nan already."""
        self._first: int | None = None
        self._last: int | None = None
        self._rows: dict[str, dict[str, Any]] = {}

    def stepped(self) -> None:
        """A step was made."""
        self.steps += 1
        self.in_a_row = self.in_forward = 0

    def overflowed(self, scale: float, layers: Mapping[str, str], *, began: str, forward: bool) -> None:
        """A step was skipped.

        Args:
            scale: The loss scale.
            layers: As in :class:`Overflow`.
            began: Where it began; a layer, or a part of the forward pass.
            forward: Whether the loss was inf or nan already.
        """
        self.steps += 1
        self.skipped += 1
        self.in_a_row += 1
        self.in_forward = self.in_forward + 1 if forward else 0
        self._last = self.steps
        self._first = self._first or self.steps
        for name, parameter in {began: "", **layers}.items():
            new = {"began here": 0, "reached": 0, "lowest scale": scale, "highest scale": scale, "parameter": "-"}
            row = self._rows.setdefault(name, new)
            row["began here"] += name == began
            row["reached"] += 1
            row["lowest scale"] = min(row["lowest scale"], scale)
            row["highest scale"] = max(row["highest scale"], scale)
            row["parameter"] = parameter or row["parameter"]

    def report(self, scale: float) -> Report:
        """How often steps were skipped, and which layers made it so.

        Args:
            scale: The loss scale now.
        """
        share = self.skipped / self.steps if self.steps else 0.0
        facts: dict[str, Any] = {"optimiser steps tried": self.steps, "skipped": self.skipped, "share skipped": share}
        if self.skipped:
            facts |= {"first at": self._first, "last at": self._last}
        rows = sorted(self._rows.items(), key=lambda item: (-item[1]["began here"], -item[1]["reached"]))
        table: Sequence[Mapping[str, Any]] = [{"layer": name, **row} for name, row in rows]
        return Report("fp16: steps skipped by the loss scaler", {**facts, "loss scale now": scale}, table)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**vars(self), "_rows": {name: dict(row) for name, row in self._rows.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        vars(self).update(state, _rows={name: dict(row) for name, row in state["_rows"].items()})
