"""One body under two heads: an old task's head on the weights that train now."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.core.sharding import is_sharded

Named = tuple[str, nn.Parameter]
# Where torch keeps the weight of a parametrisation (Mixout's) that is the weight itself in eval mode.
_PARAMETRISED = re.compile(r"parametrizations\.(\w+)\.original$")


def share_body(old: nn.Module, current: nn.Module, layers: Layers | None = None) -> Report:
    """Put the body of ``current`` under the head of ``old``: the same parameters, by reference, and not copies.

    Of each layer group but the head, parameters are matched by the longest common end of their names: the heads may
    keep the body under different attributes. Running statistics of their modules (BatchNorm) go along. A tied weight
    is replaced wherever it is used. What only ``old`` has after its last block (a pooler) is left to its head. From
    then on what trains ``current`` changes ``old``, too.

    Args:
        old: The module that keeps its head; changed in place.
        current: The module that lends its body.
        layers: Where the blocks and the head are, if they are not found by themselves; of both.

    Raises:
        ValueError: The bodies differ: groups, names or shapes; ``current`` is sharded.

    Example:
        >>> def model(classes):
        ...     return nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, classes)})
        >>> old, current = model(3), model(2)
        >>> layers = Layers(groups={"body": "^body", "head": "^head"})
        >>> share_body(old, current, layers).facts["shared"], old["body"].weight is current["body"].weight
        (2, True)
    """
    layers = layers or Layers()
    if sharded := next((n for n, p in current.named_parameters() if is_sharded(p)), None):
        raise ValueError(
            f"{sharded} is sharded over processes, and an old head needs a whole body: use a strategy that keeps whole "
            "models (DDP)"
        )
    theirs, ours = layers.of(old), layers.of(current)
    bodies = [{name for name in groups if name not in ("head", "tail")} for groups in (theirs, ours)]
    if bodies[0] != bodies[1]:
        raise ValueError(
            f"the old module's body has the groups {', '.join(sorted(bodies[0]))}, and the one that trains "
            f"{', '.join(sorted(bodies[1]))}: they must be of one architecture, with as many blocks"
        )
    pairs: dict[nn.Parameter, nn.Parameter] = {}
    kept: list[str] = []
    for group in theirs:
        if group != "head":
            found, lost = _match(theirs.named_parameters(group), ours.named_parameters(group) if group in ours else ())
            if lost and group != "tail":
                raise ValueError(
                    f"{lost[0]} of the old module has no counterpart of its name and shape in {group} of the module "
                    "that trains: they must be of one architecture (adapters are to be merged first)"
                )
            pairs |= found
            kept += lost
    _replace(old, current, pairs)
    return Report("Body shared", {"shared": len(pairs), "left to the old head": kept})


def _match(theirs: Sequence[Named], ours: Sequence[Named]) -> tuple[dict[nn.Parameter, nn.Parameter], list[str]]:
    """Pairs of one group, and the names of those of ``theirs`` that have no partner."""
    ends: dict[str, list[nn.Parameter]] = {}
    for name, parameter in ours:
        for end in _ends(name):
            ends.setdefault(end, []).append(parameter)
    pairs: dict[nn.Parameter, nn.Parameter] = {}
    lost = []
    for name, parameter in theirs:
        candidates = next((ends[end] for end in _ends(name) if end in ends), [])
        if len(candidates) == 1 and candidates[0].shape == parameter.shape:
            pairs[parameter] = candidates[0]
        else:
            lost.append(name)
    if len(set(pairs.values())) < len(pairs):
        raise ValueError("two parameters of the old body have the same counterpart: say where they are, layers=")
    return pairs, lost


def _ends(name: str) -> Iterator[str]:
    parts = _PARAMETRISED.sub(r"\1", name).split(".")
    yield from (".".join(parts[i:]) for i in range(len(parts)))


def _replace(old: nn.Module, current: nn.Module, pairs: dict[nn.Parameter, nn.Parameter]) -> None:
    owners = {p: module for module in current.modules() for p in module._parameters.values() if p is not None}
    for module in list(old.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in pairs:
                module._parameters[name] = pairs[parameter]
                lender = owners[pairs[parameter]]._buffers
                module._buffers.update({key: lender[key] for key in module._buffers if key in lender})
