"""Where the sub-layers of a transformer block end and begin, read off the data flow of one run on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ft.core.data_flow import meta_run
from lightning_ft.core.norms import is_norm

# Through these a sub-layer's result comes to the residual addition as what its last module gave.
_CARRIES = {
    *("view", "_unsafe_view", "reshape", "transpose", "permute", "t", "squeeze", "unsqueeze", "expand", "slice"),
    *("select", "clone", "alias", "detach", "_to_copy", "mul", "mul_", "div", "div_", "add", "add_", "native_dropout"),
}
_SCALES = {"mul", "mul_", "div", "div_"}


@dataclass(frozen=True)
class SubLayer:
    """One branch f of a block, h + f(h): attention, or a feed-forward layer.

    Args:
        output: Path of the module whose output is added to the residual stream: the branch's last linear map, an
            attention as a whole where that has no module of its own, or a norm between it and the addition.
        entry: Path of the first module of the branch, which takes the residual stream itself (a norm, where norms come
            first); None if no module takes it.
        source: Path of the first module of the branch with a matrix, which takes the branch's input.
        norm: Path of the norm that the block's result goes through after this addition; None where norms come first.
        width: Of the residual stream.
    """

    output: str
    entry: str | None
    source: str | None
    norm: str | None
    width: int


@dataclass(frozen=True)
class BlockFlow:
    """What one run of a block showed.

    Args:
        sub_layers: Its branches, in the order in which they end; the last is the feed-forward layer of every known
            transformer. Branches that run beside each other (GPT-J, Falcon) are two.
        widths: Path of each module in it that ran once, to the last size of what it gave.
        unknown: How many branches end in an operation of no module that runs once.
    """

    sub_layers: tuple[SubLayer, ...]
    widths: Mapping[str, int]
    unknown: int


def block_flows(module: nn.Module, blocks: Sequence[str]) -> dict[str, BlockFlow]:
    """The sub-layers of each block, from the residual additions: a + b, where b was computed from a by modules.

    A copy of the smallest part of ``module`` that runs all blocks on token ids is run on the meta device, the largest
    such part first (an encoder-decoder needs both its stacks to show cross-attention).

    Args:
        module: Any module.
        blocks: Paths of its blocks.

    Raises:
        ValueError: No part of the module runs the blocks on dummy token ids.
    """
    flows: dict[str, BlockFlow] = {}
    errors: list[str] = []
    for owner in modules_above(blocks):
        wanted = [path for path in blocks if path not in flows and f"{path}.".startswith(f"{owner}." if owner else "")]
        if wanted:
            found, error = _run(module.get_submodule(owner), [path[len(owner) :].lstrip(".") for path in wanted])
            flows |= {path: _moved(found[i], owner) for i, path in enumerate(wanted) if i in found}
            errors += [f"{type(module.get_submodule(owner)).__name__}.forward: {error!r}"[:160]] if error else []
    if missing := [path for path in blocks if path not in flows]:
        raise ValueError(
            f"the sub-layers of {missing[0]} cannot be told: nothing above it runs it on dummy token ids "
            f"({'; '.join(errors)})"
        )
    return {path: flows[path] for path in blocks}


def modules_above(blocks: Iterable[str]) -> list[str]:
    """Paths of the modules above blocks, outermost first."""
    parts = [path.split(".")[:-1] for path in blocks]
    return sorted(
        {".".join(p[:i]) for p in parts for i in range(len(p))}, key=lambda owner: owner.count(".") + 1 if owner else 0
    )


def _moved(flow: BlockFlow, owner: str) -> BlockFlow:
    def move(path: str | None) -> Any:
        return None if path is None else f"{owner}.{path}".lstrip(".")

    layers = [SubLayer(move(s.output), move(s.entry), move(s.source), move(s.norm), s.width) for s in flow.sub_layers]
    return BlockFlow(tuple(layers), {move(path): width for path, width in flow.widths.items()}, flow.unknown)


def _run(owner: nn.Module, paths: Sequence[str]) -> tuple[dict[int, BlockFlow], Exception | None]:
    twins: dict[nn.Module, nn.Module] = {}
    flows: dict[int, BlockFlow] = {}
    try:
        with torch.no_grad(), meta_run(owner, twins) as (twin, ids):
            names = {child: name for name, child in twin.named_modules()}
            blocks = [twins[owner.get_submodule(path)] for path in paths]
            record = _Record()
            for index, block in enumerate(blocks):
                block.register_forward_pre_hook(partial(_begin, record), with_kwargs=True)
                for child in block.modules():
                    child.register_forward_pre_hook(record.enter, with_kwargs=True)
                    child.register_forward_hook(record.leave)
                block.register_forward_hook(partial(_end, record, flows, index, names))
            with record:
                twin(**ids)
    except Exception as error:  # noqa: BLE001 - a stranger's forward may raise anything
        return flows, error
    return flows, None


def _begin(record: _Record, block: nn.Module, args: Any, kwargs: Any) -> None:
    record.begin(block, (args, kwargs))


def _end(
    record: _Record,
    flows: dict[int, BlockFlow],
    index: int,
    names: Mapping[nn.Module, str],
    block: nn.Module,
    args: Any,
    output: Any,
) -> None:
    if record.block is block:
        flows.setdefault(index, record.result(names))
        record.block = None


@dataclass(frozen=True)
class _Visit:
    """A module, the node that it took and the node that it gave."""

    module: nn.Module
    took: int | None
    gave: int | None


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of one run of a block as a graph; node 0 is the hidden state that the block takes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block: nn.Module | None = None

    def begin(self, block: nn.Module, values: Any) -> None:
        self.block = block
        hidden = next(_floats(values))
        self.names = [""]
        self.parents: list[tuple[int, ...]] = [()]
        self.above = [0]  # which nodes lead to each, as bits
        self.shapes = [hidden.shape]
        self.node = {id(hidden): 0}
        self.alive: list[Any] = [hidden]  # an id is reused once its tensor is gone
        self.open: list[tuple[nn.Module, int | None]] = []
        self.visits: list[_Visit] = []
        self.entered: list[nn.Module] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.block is not None:
            parents = tuple(self.node[id(t)] for t in _all_tensors((args, kwargs)) if id(t) in self.node)
            made = list(_all_tensors(output))
            if parents and made:
                self.names.append(func._schema.name.partition("::")[2])
                self.parents.append(parents)
                self.shapes.append(made[0].shape)
                above = 0
                for parent in parents:
                    above |= self.above[parent] | 1 << parent
                self.above.append(above)
                for tensor in made:
                    self.node[id(tensor)] = len(self.names) - 1
                    self.alive.append(tensor)
        return output

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.block is not None:
            self.open.append((module, self._node((args, kwargs))))
            self.entered.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.block is not None:
            self.visits.append(_Visit(module, self.open.pop()[1], self._node(output)))

    def _node(self, values: Any) -> int | None:
        return next((self.node[id(t)] for t in _floats(values) if id(t) in self.node), None)

    # ---- what it shows

    def result(self, names: Mapping[nn.Module, str]) -> BlockFlow:
        counts = Counter(self.entered)
        once = [v for v in self.visits if counts[v.module] == 1 and v.module is not self.block]
        ends, unknown = [], 0
        for add, stream, branch in self._residuals():
            found = self._last_modules(branch, stream, once)
            unknown += found is None
            ends += [(self.visits.index(end), add, stream, end) for end in found or ()]
        final = next((v.gave for v in self.visits if v.module is self.block), None)
        layers = [
            self._sub_layer(names, add, stream, end, final) for _, add, stream, end in sorted(ends, key=lambda e: e[0])
        ]
        widths = {names[v.module]: self.shapes[v.gave][-1] for v in once if v.gave is not None and self.shapes[v.gave]}
        return BlockFlow(tuple(layers), widths, unknown)

    def _residuals(self) -> list[tuple[int, int, int]]:
        """Additions a + b with b computed from a by a module with parameters: node, a, b; none inside another's b."""
        given = [v for v in self.visits if v.gave is not None and _has_parameters(v.module)]
        found = []
        for add, name in enumerate(self.names):
            parents = self.parents[add]
            if name not in ("add", "add_") or len(parents) != 2 or prod(self.shapes[add]) != prod(self.shapes[0]):
                continue
            stream, branch = sorted(parents)
            if self._from(branch, stream) and any(self._between(v.gave, stream, branch) for v in given):
                found.append((add, stream, branch))
        return [
            (add, stream, branch)
            for add, stream, branch in found
            if not any(self._upto(add, other) and not self._upto(add, below) for _, below, other in found)
        ]

    def _from(self, node: int, ancestor: int) -> bool:
        return bool(self.above[node] >> ancestor & 1)

    def _upto(self, node: int, descendant: int) -> bool:
        return node == descendant or self._from(descendant, node)

    def _between(self, node: int | None, stream: int, branch: int) -> bool:
        """Whether a node lies on the way from the stream to the branch's end."""
        return node is not None and self._from(node, stream) and self._upto(node, branch)

    def _last_modules(self, node: int, stream: int, once: Sequence[_Visit]) -> list[_Visit] | None:
        """The modules with parameters that gave ``node``, or what was only carried on to it."""
        for visit in once:  # the innermost is left first
            if visit.gave == node and _has_parameters(visit.module):
                return [visit]
        parents = [p for p in dict.fromkeys(self.parents[node]) if self._from(p, stream)]
        if self.names[node] not in _CARRIES or not parents or (self.names[node] in _SCALES and len(parents) > 1):
            return None
        found = [self._last_modules(parent, stream, once) for parent in parents]
        return None if any(part is None for part in found) else [v for part in found for v in part or ()]

    def _sub_layer(
        self, names: Mapping[nn.Module, str], add: int, stream: int, end: _Visit, final: int | None
    ) -> SubLayer:
        order = {module: i for i, module in reversed(list(enumerate(self.entered)))}
        assert end.gave is not None
        inside = [v for v in self.visits if self._between(v.gave, stream, end.gave) and v.module._parameters]
        inside = sorted(
            (v for v in inside if any(p is not None for p in v.module._parameters.values())),
            key=lambda v: order[v.module],
        )
        entry = next((v.module for v in inside if v.took == stream), None)
        source = next(
            (v.module for v in inside if any(p is not None and p.ndim > 1 for p in v.module._parameters.values())), None
        )
        norm = next((v.module for v in self.visits if v.took == add and v.gave == final and is_norm(v.module)), None)
        return SubLayer(
            names[end.module],
            None if entry is None else names[entry],
            None if source is None else names[source],
            None if norm is None else names[norm],
            self.shapes[0][-1],
        )


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _all_tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, Mapping)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _all_tensors(value)


def _floats(values: Any) -> Iterator[Tensor]:
    return (tensor for tensor in _all_tensors(values) if tensor.is_floating_point())
