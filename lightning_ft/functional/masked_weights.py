"""Weights behind masks, and the plain weights that are left when the masks are baked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_ft.core.fresh import mark_fresh
from lightning_ft.core.layers import as_layers
from lightning_ft.core.report import Report
from lightning_ft.core.sharding import is_sharded
from lightning_ft.functional.mixed_layers import linear_weights

Mode = Literal["hard", "soft", "magnitude"]
"""What decides which weights are kept: the highest scores, scores above a threshold, the largest weights."""


class MaskedWeight(nn.Module):
    """A parametrisation W′ = W ⊙ M, with ∂L/∂W = ∂L/∂W′ ⊙ M and, straight through M, ∂L/∂S = ∂L/∂W′ ⊙ W.

    Args:
        weight: W, for its shape and device.
        scored: Whether M comes from scores S, which start at 0; else there are none.
    """

    mask: Tensor
    kept: Tensor
    scores: nn.Parameter | None

    def __init__(self, weight: Tensor, *, scored: bool) -> None:
        super().__init__()
        # In fp32 whatever the weight is: the scores' small steps would round to nothing in bf16.
        scores = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32)) if scored else None
        self.register_parameter("scores", scores)
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("kept", torch.tensor(weight.numel(), device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """W′."""
        if self.scores is None:
            return weight.masked_fill(~self.mask, 0.0)
        masked: Tensor = _StraightThrough.apply(weight, self.scores, self.mask)  # type: ignore[no-untyped-call]
        return masked


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        weight, scores, mask = inputs
        ctx.save_for_backward(weight, mask)
        ctx.dtype = scores.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), (weight, mask) = gradients, ctx.saved_tensors
        of_weight = gradient.masked_fill(~mask, 0.0) if ctx.needs_input_grad[0] else None
        of_scores = (gradient.to(ctx.dtype) * weight) if ctx.needs_input_grad[1] else None
        return of_weight, of_scores, None


@dataclass(frozen=True)
class Masked:
    """A weight that is masked.

    Args:
        name: As it was named before.
        weight: W.
        by: Its mask, and its scores where it has some.
    """

    name: str
    weight: nn.Parameter
    by: MaskedWeight


def mask_weights(module: nn.Module, mode: Mode = "hard", *, layers: Mapping[str, Any] | None = None) -> Report:
    """Put a mask that keeps everything before the weights of all linear maps in the blocks, in place.

    They are those of ``nn.Linear``, ``nn.MultiheadAttention`` and transformers' ``Conv1D``; embeddings, head, biases
    and norms have none. A kind of :func:`~lightning_ft.functional.alterations.alter`. Masks change in
    :func:`~lightning_ft.functional.movement.update_masks`.

    Args:
        module: The module.
        mode: ``"hard"`` and ``"soft"`` add scores; ``"magnitude"`` has none.
        layers: Arguments of :class:`~lightning_ft.core.layers.Layers`, if the blocks are not found by themselves.

    Raises:
        ValueError: Nothing is there to mask; a weight is quantised, an adapter's, parametrised already, or shared.
    """
    check_mode(mode)
    refuse_sharded(module)
    groups = as_layers(layers).of(module)
    inside = {id(p) for name in groups.select("blocks") for p in groups.parameters(name)}
    _refuse(module, inside)
    chosen = [weight for weight in linear_weights(module) if id(weight.parameter) in inside]
    if not chosen:
        raise ValueError(f"no block of {type(module).__name__} has a linear map, whose weights could be pruned")
    if len({id(weight.parameter) for weight in chosen}) < len(chosen):
        raise ValueError("two linear maps of the blocks share a weight, which a mask would part: untie them first")
    for weight in chosen:
        owner, parameter = weight.reader.get_submodule(weight.owner), weight.parameter
        masked = MaskedWeight(parameter, scored=mode != "magnitude")
        mark_fresh([masked])  # the scores have no pretrained values that something could pull them to
        parametrize.register_parametrization(owner, weight.attribute, masked)
    found = masked_weights(module)
    facts = {"mode": mode, "matrices": len(found), "weights": sum(m.weight.numel() for m in found)}
    return Report("Masked the linear maps of the blocks", facts)


def check_mode(mode: Mode) -> None:
    """Refuse an unknown mode.

    Raises:
        ValueError: It is none of the three.
    """
    if mode not in get_args(Mode):
        raise ValueError(f'mode={mode!r} must be "hard" (highest scores), "soft" (a threshold) or "magnitude"')


def refuse_sharded(module: nn.Module) -> None:
    """Refuse a module of which each process holds a part.

    Raises:
        ValueError: It is one.
    """
    if any(is_sharded(p) for p in module.parameters()):
        raise ValueError(
            "MovementPruning chooses among all scores of a matrix, and under FSDP each process holds a part of them: "
            "train with DDP"
        )


def _refuse(module: nn.Module, inside: set[int]) -> None:
    for name, child in module.named_modules():
        if type(child).__module__.partition(".")[0] == "peft" and any(id(p) in inside for p in child.parameters()):
            raise ValueError(f"{name} is an adapter of peft, over frozen weights: merge it before the model is pruned")
        if not any(id(p) in inside for p in child.parameters(recurse=False)):
            continue
        if isinstance(child, parametrize.ParametrizationList):
            raise ValueError(f"{name} is a parametrised weight already: bake that before, or prune without it")
        weight = getattr(child, "weight", None)
        if isinstance(child, nn.Linear) and isinstance(weight, nn.Parameter) and not weight.is_floating_point():
            raise ValueError(
                f"{name} has quantised weights ({type(child).__name__}), which cannot be masked: load the model "
                "without quantisation, and quantise what was pruned and exported"
            )


def masked_weights(module: nn.Module) -> list[Masked]:
    """The masked weights of a module, in order."""
    return [
        Masked(f"{path}.{attribute}".strip("."), parametrisations.original, by)
        for path, child in module.named_modules()
        if parametrize.is_parametrized(child)
        for attribute, parametrisations in child.parametrizations.items()
        for by in parametrisations
        if isinstance(by, MaskedWeight)
    ]


def sparsity(module: nn.Module) -> Report:
    """How many of the masked weights are kept, by matrix.

    Raises:
        ValueError: None is masked.
    """
    weights = masked_weights(module)
    if not weights:
        raise ValueError(f"{type(module).__name__} has no masked weights: MovementPruning, or mask_weights, masks them")
    counts = torch.stack([masked.by.mask.sum() for masked in weights]).tolist()  # the host waits once
    rows = [
        {"matrix": m.name, "weights": m.weight.numel(), "kept": kept, "sparsity": 1 - kept / m.weight.numel()}
        for m, kept in zip(weights, counts, strict=True)
    ]
    total = sum(masked.weight.numel() for masked in weights)
    facts = {"weights": total, "kept": sum(counts), "sparsity": 1 - sum(counts) / total}
    return Report("Pruned weights", facts, rows)


def check_masks(module: nn.Module) -> Report:
    """The table of :func:`sparsity`, if each mask keeps as many weights as were chosen.

    Raises:
        ValueError: Nothing is masked.
        RuntimeError: A mask was changed by something else than :func:`~lightning_ft.functional.movement.update_masks`.
    """
    report = sparsity(module)
    for row, masked in zip(report.rows, masked_weights(module), strict=True):
        if row["kept"] != int(masked.by.kept):
            raise RuntimeError(f"{masked.name} keeps {row['kept']} weights, where {int(masked.by.kept)} were chosen")
    return report


def bake(module: nn.Module) -> Report:
    """Put W′ in the place of W, in place, and take masks and scores away: plain weights, of which most are exactly 0.

    For a model whose training is over; checkpoints that training goes on from keep W, S and M. (The exports bake a
    copy.) Proves before that the masks keep as many weights as the schedule said, and after that all others are 0.

    Args:
        module: Of :func:`mask_weights`.

    Returns:
        The table of :func:`sparsity`.

    Raises:
        ValueError: Nothing is masked.
        RuntimeError: See :func:`check_masks`; or a weight that is masked is not 0.

    Example:
        >>> tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4, bias=False)])})
        >>> _ = mask_weights(tower, layers={"groups": {"block.0": "layers"}})
        >>> from lightning_ft.functional.movement import update_masks
        >>> update_masks(masked_weights(tower), "hard", 0.25)
        >>> bake(tower).facts["kept"], int(tower["layers"][0].weight.count_nonzero())
        (4, 4)
    """
    report = check_masks(module)
    for masked in masked_weights(module):
        path, _, attribute = masked.name.rpartition(".")
        owner = module.get_submodule(path)
        _own_class(owner)
        parametrize.remove_parametrizations(owner, attribute, leave_parametrized=True)
        if masked.weight.detach()[~masked.by.mask].any():
            raise RuntimeError(f"{masked.name} has weights other than 0 where its mask has none")
    return report


def _own_class(module: nn.Module) -> None:
    """Torch made a class for this module alone and will take it apart; a copy of the module would share it."""
    shared = type(module)
    content = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)
