"""Where the heads of attention are: the linear layers that read what attention gives, and how many heads each reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = {"matmul", "bmm", "__matmul__", "einsum", "baddbmm"}
_MAPS = {"linear", "addmm", "matmul", "__matmul__"}


@dataclass(frozen=True)
class HeadProjection:
    """An output projection of attention, whose input is the heads' outputs side by side.

    Args:
        name: Path of the layer.
        layer: ``nn.Linear``, transformers' ``Conv1D``, or the ``out_proj`` of an ``nn.MultiheadAttention``.
        heads: How many heads it reads; of grouped queries the query heads.
        called: Whether the layer is called: ``nn.MultiheadAttention`` reads its weight instead.
    """

    name: str
    layer: nn.Module
    heads: int
    called: bool = True

    @property
    def weight(self) -> nn.Parameter:
        """Its weight."""
        weight = self.layer._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def input_dim(self) -> int:
        """The weight's dimension of input units."""
        return 1 if isinstance(self.layer, nn.Linear) else 0

    @property
    def width(self) -> int:
        """Input units of a head."""
        return self.weight.shape[self.input_dim] // self.heads

    def scaled(self, gates: Tensor) -> Tensor:
        """The weight with each head's input units times its gate ``(heads,)``."""
        units = gates.repeat_interleave(self.width)
        return self.weight * (units if self.input_dim == 1 else units[:, None])


def find_heads(
    module: nn.Module, run: Callable[[], object], *, heads: Mapping[str, int] | None = None
) -> list[HeadProjection]:
    """The output projections of attention, found in one run by what flows into them, in the order of the modules.

    A layer is one if its input is the output of ``scaled_dot_product_attention``, or of a softmax over four dimensions
    and the product with it, moved and reshaped but not computed with; the number of heads is theirs. So no names are
    needed, and no configuration. ``nn.MultiheadAttention`` says itself how many it has.

    Args:
        module: The module.
        run: Runs it on anything, in whatever mode.
        heads: Path of each projection to its number of heads, instead.

    Raises:
        ValueError: There is none (kernels that are not torch's cannot be looked into); a path is none of a linear
            layer's; a width is no multiple of the number of heads; a layer is quantised or an adapter's.
    """
    layers = {name: child for name, child in module.named_modules() if _is_linear(child)}
    if heads is not None:
        if wrong := [name for name in heads if name not in layers]:
            raise ValueError(
                f"heads={wrong[0]!r} must name a linear layer; there are: {', '.join(list(layers)[:8])}, ..."
            )
        inside = {id(child.out_proj) for child in module.modules() if isinstance(child, nn.MultiheadAttention)}
        found = [HeadProjection(n, layers[n], count, id(layers[n]) not in inside) for n, count in heads.items()]
    else:
        found = _traced(module, run, layers)
    if not found:
        raise ValueError(
            f"no output projection of attention was found in {type(module).__name__}: attention that is neither "
            "torch's scaled_dot_product_attention nor a softmax cannot be looked into. Load the model with "
            'attn_implementation="sdpa" or "eager", or give heads={"path.of.projection": number_of_heads}'
        )
    for projection in found:
        _check(module, projection)
    return found


def _traced(module: nn.Module, run: Callable[[], object], layers: Mapping[str, nn.Module]) -> list[HeadProjection]:
    weights = {id(layer._parameters.get("weight")): name for name, layer in layers.items()}
    trace = _AttentionTrace(weights)
    with torch.no_grad(), trace:
        run()
    counts, called = dict(trace.found), dict.fromkeys(trace.found, True)
    for name, child in module.named_modules():
        if isinstance(child, nn.MultiheadAttention):
            counts[f"{name}.out_proj"], called[f"{name}.out_proj"] = child.num_heads, False
    return [HeadProjection(name, layers[name], counts[name], called[name]) for name in layers if name in counts]


def _check(module: nn.Module, projection: HeadProjection) -> None:
    name, weight = projection.name, projection.layer._parameters.get("weight")
    parents = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 2)]
    if any(type(module.get_submodule(path)).__module__.startswith("peft.tuners") for path in parents):
        raise ValueError(f"{name} is part of an adapter of peft: merge it before heads are looked at")
    if weight is None or not weight.is_floating_point():
        raise ValueError(
            f"{name} has quantised or parametrised weights, whose heads cannot be silenced: bake them before, or load "
            "the model without quantisation"
        )
    if projection.heads < 1 or weight.shape[projection.input_dim] % projection.heads:
        raise ValueError(
            f"{name} reads {weight.shape[projection.input_dim]} units, which are no multiple of {projection.heads} "
            f"heads: give heads={{{name!r}: ...}}"
        )


def _is_linear(child: nn.Module) -> bool:
    # Without transformers no model has one.
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    return isinstance(child, (nn.Linear, transposed))


class _AttentionTrace(TorchFunctionMode):
    """Follows what attention gives through moves and reshapes to the layer that reads it.

    Args:
        weights: Identity of each linear layer's weight to the layer's name.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self._weights = weights
        # The tensors are held, so that no identity is used twice.
        self._marks: dict[int, tuple[Tensor, str, int]] = {}
        self.found: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._follow(func, list(_tensors([*args, *(kwargs or {}).values()])), result)
        return result

    def _follow(self, func: Any, given: list[Tensor], result: Tensor) -> None:
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention and result.ndim == 4:
            self._mark(result, "output", given[0].shape[1])
        elif name == "softmax" and result.ndim == 4:
            self._mark(result, "weights", result.shape[1])
        else:
            marked = next((self._marks[id(t)] for t in given if id(t) in self._marks), None)
            if marked is not None:
                self._pass_on(name, marked, given, result)

    def _pass_on(self, name: str, marked: tuple[Tensor, str, int], given: list[Tensor], result: Tensor) -> None:
        source, kind, heads = marked
        layer = next((self._weights[id(t)] for t in given if id(t) in self._weights), None)
        if layer is not None and name in _MAPS:
            if kind == "output":
                self.found.setdefault(layer, heads)
        elif kind == "weights" and name in _PRODUCTS:
            self._mark(result, "output", heads)
        elif result.numel() == source.numel() and (len(given) == 1 or name in ("to", "type_as")):
            self._mark(result, kind, heads)

    def _mark(self, tensor: Tensor, kind: str, heads: int) -> None:
        self._marks[id(tensor)] = (tensor, kind, heads)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
