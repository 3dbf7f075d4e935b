"""Linear layers that compute with mixed weights in train mode, while their parameters stay what and where they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ft.functional.mixout import Per, mixout

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class LinearWeight:
    """A weight of a linear map, and the module whose ``forward`` reads it.

    Args:
        reader: The module that reads it.
        owner: Path of the module that holds it, from the reader; empty where that is the reader.
        attribute: Its name there.
        output_dim: The dimension of its output units.
        maps: How many maps are stacked in it along the first dimension (queries, keys and values: 3).
    """

    reader: nn.Module
    owner: str
    attribute: str
    output_dim: int = -2
    maps: int = 1

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself."""
        parameter = getattr(self.reader.get_submodule(self.owner), self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter


def linear_weights(module: nn.Module) -> list[LinearWeight]:
    """The weights of all linear maps: ``nn.Linear``, ``nn.MultiheadAttention``, transformers' ``Conv1D`` (GPT-2).

    Those that an embedding shares are left out: the embedding looks up what the linear map would change.

    Example:
        >>> attention = nn.TransformerEncoderLayer(4, 2)
        >>> [(type(w.reader).__name__, w.owner, w.attribute) for w in linear_weights(attention)][:2]
        [('MultiheadAttention', '', 'in_proj_weight'), ('MultiheadAttention', 'out_proj', 'weight')]
    """
    tied = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    return [weight for weight in _linear_weights(module) if id(weight.parameter) not in tied]


def _linear_weights(module: nn.Module) -> Iterator[LinearWeight]:
    # Without transformers no model has one.
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    inside = set()
    for child in module.modules():
        if isinstance(child, nn.MultiheadAttention):
            # It reads its output layer's weight and never calls the layer.
            inside.add(child.out_proj)
            for attribute in _ATTENTION:
                if getattr(child, attribute) is not None:
                    yield LinearWeight(child, "", attribute, maps=3 if attribute == "in_proj_weight" else 1)
            yield LinearWeight(child, "out_proj", "weight")
        elif isinstance(child, nn.Linear) and child not in inside:
            yield LinearWeight(child, "", "weight")
        elif isinstance(child, transposed):
            yield LinearWeight(child, "", "weight", output_dim=-1)


class MixedLayers:
    """Mixes weights while the layers that read them run in train mode; call :meth:`remove` at the end.

    For the duration of a layer's ``forward`` the mixed weight stands in its instance dictionary, before the parameter
    of the same name, which stays registered: state dicts, optimisers, DDP and copies of the module see plain
    parameters only. Weights that do not require gradients are left as they are. Recomputation under gradient
    checkpointing draws the same units again, since it restores the generators.

    Args:
        references: The weights to mix, and W⁰ of each.
        p: See :func:`~lightning_ft.functional.mixout`; assign to ``p`` to change it.
        per: See there.
        legacy_gradient: See there.
    """

    def __init__(
        self, references: Mapping[LinearWeight, Tensor], p: float, *, per: Per = "column", legacy_gradient: bool = False
    ) -> None:
        self.p = p
        self.per: Per = per
        self.legacy_gradient = legacy_gradient
        self.used = False
        readers: dict[nn.Module, list[tuple[LinearWeight, nn.Parameter, Tensor]]] = {}
        for weight, reference in references.items():
            readers.setdefault(weight.reader, []).append((weight, weight.parameter, reference))
        self._readers = {r: [parameter for _, parameter, _ in weights] for r, weights in readers.items()}
        self._handles: list[RemovableHandle] = []
        if "torch._dynamo" in sys.modules:
            # What was compiled before runs on without hooks that come later: it guards against none.
            torch.compiler.reset()
        for reader, weights in readers.items():
            layer = _Layer(self, weights)
            self._handles.append(reader.register_forward_pre_hook(layer.mix))
            # Recomputation under checkpointing may leave a forward by an exception.
            self._handles.append(reader.register_forward_hook(layer.unmix, always_call=True))

    def mixed(self, weight: Tensor, reference: Tensor, like: LinearWeight) -> Tensor:
        """W̃ of one weight."""
        if hasattr(reference, "full_tensor"):
            reference = reference.full_tensor()
        reference = reference.to(device=weight.device, dtype=weight.dtype, non_blocking=True)
        if like.maps > 1:
            weight, reference = (t.reshape(like.maps, -1, *t.shape[1:]) for t in (weight, reference))
        mixed = mixout(
            weight,
            reference,
            self.p,
            per=self.per,
            output_dim=like.output_dim,
            legacy_gradient=self.legacy_gradient,
        )
        return mixed.flatten(0, 1) if like.maps > 1 else mixed

    def trains(self, reader: nn.Module | None = None) -> bool:
        """Whether a weight that this module reads (None: any weight) is to be mixed and requires gradients."""
        chosen = self._readers.values() if reader is None else [self._readers.get(reader, [])]
        return any(parameter.requires_grad for parameters in chosen for parameter in parameters)

    def remove(self) -> None:
        """Take the hooks off. Copies of the module that were made meanwhile mix no more, either."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.p = 0.0


class _Layer:
    """The hooks of one reader. They find weights by path, so that a copy of the module mixes its own."""

    def __init__(self, mixing: MixedLayers, weights: list[tuple[LinearWeight, nn.Parameter, Tensor]]) -> None:
        self.mixing = mixing
        self.weights = weights

    def __deepcopy__(self, memo: Any) -> _Layer:
        return self  # a copy of the module needs no copy of W⁰

    def mix(self, reader: nn.Module, args: Any) -> None:
        if not reader.training or not self.mixing.p:
            return
        for weight, parameter, reference in self.weights:
            # Of the registered parameter: the one that FSDP2 puts in its place for the forward may not be told.
            if parameter.requires_grad:
                owner = reader.get_submodule(weight.owner)
                self.mixing.used = True
                vars(owner)[weight.attribute] = self.mixing.mixed(getattr(owner, weight.attribute), reference, weight)

    def unmix(self, reader: nn.Module, args: Any, output: Any) -> None:
        for weight, _, _ in self.weights:
            vars(reader.get_submodule(weight.owner)).pop(weight.attribute, None)
