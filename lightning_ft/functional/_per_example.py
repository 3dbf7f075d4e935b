"""Squares of per-example gradients from one backward pass over a batch.

autograd sums over the examples of a batch before anybody sees a gradient. Where a parameter is a layer's, the gradient
of each example can be had from the layer's input a and the gradient g of its output: G_b = Σₜ g_bt a_btᵀ of a linear
layer. The gradients of the weights themselves are then not computed by autograd: what is done here takes their place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

_CHUNK = {"cpu": 1 << 20}
"""Values of per-example gradients that are held at once: what a CPU's cache takes, and 256 MB elsewhere."""


class UnfitError(Exception):
    """This batch, or this module, has gradients that cannot be told apart by example."""


@dataclass
class Use:
    """One call of a layer: its input, and where the gradient of its output can be asked for."""

    layer: nn.Module
    input: Tensor
    version: int
    edge: GradientEdge


class LayerUses:
    """Notes the calls of all layers that own parameters of interest.

    Args:
        module: What is called.
        parameters: The parameters of interest, by name.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._wanted = {id(p) for p in parameters.values()}
        # A layer with layers in it may use its parameters in whichever way.
        self.layers = [
            layer
            for layer in module.modules()
            if not any(True for _ in layer.children())
            and any(id(p) in self._wanted for p in layer._parameters.values() if p is not None)
        ]
        self.owned = {id(p) for layer in self.layers for p in layer._parameters.values() if p is not None}
        self.uses: list[Use] = []
        self.problem: str | None = None
        self._expanded = False

    @contextmanager
    def noted(self, examples: int) -> Iterator[None]:
        """Note the calls that are made inside, which are for a batch of so many examples."""
        self.uses, self.problem = [], None
        self._expanded = False
        handles = [layer.register_forward_hook(self._hook(examples), with_kwargs=True) for layer in self.layers]
        try:
            yield
        except RuntimeError as error:
            if not self._expanded:
                raise
            raise UnfitError(f"the module does not take a row of positions for each example: {error}") from error
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, examples: int) -> Any:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
            given = [*args, *kwargs.values()]
            if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
                self.problem = f"{type(layer).__name__} does not map one tensor to one"
                return None
            if not output.requires_grad:
                return None
            taken, result = given[0].detach(), None
            if isinstance(layer, nn.Embedding) and len(output) == 1 < examples:
                # Positions, one row for all examples, which would be added up over them: a row for each instead, of
                # which there are as many as the words before had (several for an example of multiple choice).
                rows = len(self.uses[-1].input) if self.uses else examples
                taken, output = (t.expand(rows, *t.shape[1:]) for t in (taken, output))
                result, self._expanded = output, True
            # The edge and not the tensor, which an activation in place may change to another one.
            self.uses.append(Use(layer, taken, given[0]._version, get_gradient_edge(output)))
            self._check(layer, taken, output, examples)
            return result

        return note

    def _check(self, layer: nn.Module, taken: Tensor, output: Tensor, examples: int) -> None:
        if not (taken.ndim and output.ndim and len(output) % examples == 0 and len(taken) == len(output)):
            self.problem = (
                f"{type(layer).__name__} maps {tuple(taken.shape)} to {tuple(output.shape)} for {examples} examples"
            )


def gradients(uses: Sequence[Use], outputs: Tensor, score: Tensor, *, keep: bool) -> list[Tensor | None]:
    """The gradient of each call's output, for a gradient of ``outputs``."""
    given: Any = [use.edge for use in uses]
    found = torch.autograd.grad(outputs, given, score, retain_graph=keep, allow_unused=True)
    if any(use.input._version != use.version for use in uses if use.input._version >= 0):
        raise UnfitError("a layer's input was changed in place")
    return list(found)


def add_squares_(
    sums: Mapping[str, Tensor],
    names: Mapping[int, str],
    uses: Sequence[Use],
    outputs: Sequence[Tensor | None],
    examples: int,
) -> None:
    """Add Σ_b G_b² of each parameter to ``sums``.

    Args:
        sums: Where to add, by name.
        names: The names, by the parameters' identities.
        uses: The calls of layers.
        outputs: What :func:`gradients` gave for them.
        examples: Of the batch.
    """
    parts: dict[str, list[_Part]] = {}
    for use, gradient in zip(uses, outputs, strict=True):
        if gradient is None:
            continue
        a, g = (t.reshape(examples, len(t) // examples, *t.shape[1:]) for t in (use.input, gradient))
        for own, parameter in use.layer._parameters.items():
            if parameter is not None and id(parameter) in names:
                parts.setdefault(names[id(parameter)], []).append(_Part(use.layer, own, a, g))
    for name, calls in parts.items():
        _add_squares_of_(sums[name], calls, examples)


@dataclass
class _Part:
    """A parameter's part in one call; input and gradient of the output begin with ``(examples, rows of each)``."""

    layer: nn.Module
    parameter: str
    input: Tensor
    gradient: Tensor

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``(b, t, m)`` and ``(b, t, n)`` with G_b = Σₜ l_bt r_btᵀ, of a weight matrix."""
        if self.parameter != "weight":
            return None
        a, g = self.input.flatten(1, -2), self.gradient.flatten(1, -2)
        if type(self.layer) is nn.Linear:
            return g, a
        return (a, g) if _is_conv1d(self.layer) else None

    def indices(self) -> Tensor | None:
        """Of an embedding: which row of it each place ``(b, t)`` took."""
        if type(self.layer) is not nn.Embedding or self.layer.scale_grad_by_freq or self.layer.max_norm is not None:
            return None
        return self.input.flatten(1)

    def of(self, some: slice) -> Tensor:
        """G of some examples, ``(b, *shape)``."""
        part = _Part(self.layer, self.parameter, self.input[some], self.gradient[some])
        if (factors := part.factors()) is not None:
            return torch.bmm(factors[0].mT, factors[1])
        if (indices := part.indices()) is not None:
            return part._rows(indices)
        if type(self.layer) is nn.LayerNorm and len(self.layer.normalized_shape) == 1:
            a, g = part.input, part.gradient
            if self.parameter == "weight":
                g = g * F.layer_norm(a, self.layer.normalized_shape, eps=self.layer.eps)
            return g.flatten(1, -2).sum(1)
        if self.parameter == "bias" and (type(self.layer) is nn.Linear or _is_conv1d(self.layer)):
            return part.gradient.flatten(1, -2).sum(1)
        return part._differentiated()

    def _rows(self, indices: Tensor) -> Tensor:
        assert isinstance(self.layer, nn.Embedding)
        weight, examples = self.layer.weight, len(indices)
        flat = indices + len(weight) * torch.arange(examples, device=indices.device)[:, None]
        rows = self.gradient.flatten(0, -2) * _not_padding(self.layer, indices)
        found = rows.new_zeros(examples * len(weight), weight.shape[1]).index_add_(0, flat.flatten(), rows)
        return found.view(examples, *weight.shape)

    def _differentiated(self) -> Tensor:
        """By autograd, of each example by itself: of any layer that works under ``vmap``."""
        own = {**dict(self.layer.named_parameters(recurse=False)), **dict(self.layer.named_buffers(recurse=False))}
        fixed = {name: tensor.detach() for name, tensor in own.items()}

        def one(a: Tensor, g: Tensor) -> Tensor:
            def call(parameter: Tensor) -> Tensor:
                result: Tensor = torch.func.functional_call(self.layer, {**fixed, self.parameter: parameter}, (a,))
                return result

            pulled: Tensor = torch.func.vjp(call, fixed[self.parameter])[1](g)[0]
            return pulled

        try:
            found: Tensor = torch.vmap(one)(self.input, self.gradient)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # whatever a stranger's layer does there
            raise UnfitError(f"{type(self.layer).__name__} does not work under vmap: {error}") from error
        return found


def _add_squares_of_(total: Tensor, calls: Sequence[_Part], examples: int) -> None:
    if len(calls) == 1:
        if (factors := calls[0].factors()) is not None:
            _add_products_(total, *factors)
            return
        if (indices := calls[0].indices()) is not None:
            _add_rows_(total, calls[0], indices)
            return
    size = max(1, _CHUNK.get(total.device.type, 1 << 26) // max(1, total.numel()))
    for start in range(0, examples, size):
        # Of a parameter that is used more than once, the uses add up before anything is squared.
        some = [call.of(slice(start, start + size)) for call in calls]
        total += torch.stack(some).sum(0).square_().sum(0) if len(some) > 1 else some[0].square().sum(0)


def _add_products_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += Σ_b (Σₜ l_bt r_btᵀ)²."""
    if left.shape[1] == 1:
        total.addmm_(left[:, 0].square().T, right[:, 0].square())  # one place an example: the squares factor
        return
    if total.device.type != "cpu":
        size = max(1, (1 << 26) // total.numel())
        for l, r in zip(torch.split(left, size), torch.split(right, size), strict=True):  # noqa: E741
            total += torch.bmm(l.mT, r).square_().sum(0)
        return
    # Padding, and what the head does not read of the last block, has no gradient: those places are left out.
    live = (left != 0).any(-1) & (right != 0).any(-1)  # whichever of the two is the gradient
    counts = live.sum(1).tolist()
    if max(counts) <= 1:
        some = live.nonzero(as_tuple=True)
        total.addmm_(left[some].square().T, right[some].square())
        return
    scratch = torch.empty_like(total)
    for b, count in enumerate(counts):
        if count:
            l, r = (left[b], right[b]) if count == left.shape[1] else (left[b][live[b]], right[b][live[b]])  # noqa: E741
            torch.mm(l.T, r, out=scratch)
            total.addcmul_(scratch, scratch)


def _add_rows_(total: Tensor, part: _Part, indices: Tensor) -> None:
    """The same for an embedding, of which an example touches few rows: only those are added up."""
    assert isinstance(part.layer, nn.Embedding)
    size = len(total)
    flat = (indices + size * torch.arange(len(indices), device=indices.device)[:, None]).flatten()
    touched, place = torch.unique(flat, return_inverse=True)
    rows = part.gradient.flatten(0, -2) * _not_padding(part.layer, indices)
    found = rows.new_zeros(len(touched), rows.shape[-1]).index_add_(0, place, rows)
    total.index_add_(0, touched % size, found.square_())


def _not_padding(layer: nn.Embedding, indices: Tensor) -> Tensor | int:
    """torch gives the row of the padding no gradient."""
    return 1 if layer.padding_idx is None else (indices.flatten() != layer.padding_idx)[:, None]


def _is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's linear layer, with its weight the other way round."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(layer) is library.Conv1D
