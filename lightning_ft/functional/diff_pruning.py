"""Diff pruning: frozen weights plus a difference of which few values are not zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.core.counter_random import random_key
from lightning_ft.core.report import Report
from lightning_ft.functional.computed_weights import (
    compute_weights,
    once_differentiable,
    pretrained_weights,
    size_of,
)
from lightning_ft.functional.hard_concrete import HardConcrete, logistic_noise
from lightning_ft.functional.moment import Moment
from lightning_ft.functional.trained_part import trained_size


class SparseOffset(nn.Module):
    """θ = θ⁰ + z⊙δ as a parametrisation of one weight, with z drawn in train mode and without noise in eval mode.

    z = z_element · z_group, both :class:`HardConcrete` with a = ``log_alpha`` and ``group_log_alpha``; the group is the
    whole tensor. Gates of a = ±∞ are 1 or 0 whatever the noise: that is how a fixed mask is kept. Gates that do not
    require gradients are not drawn.

    Args:
        weight: θ⁰; δ and a have its shape, in fp32 at least.
        gates: The distribution.
        structured: Whether there is a group gate.
        moment: Says when z is drawn anew: at each read outside of a moment it is the same.
        key: Seeds the draws together with the moment's stamp.
    """

    group_log_alpha: nn.Parameter | None

    def __init__(self, weight: Tensor, gates: HardConcrete, *, structured: bool, moment: Moment, key: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.gates = gates
        self.moment = moment
        self.key = key
        self.delta = nn.Parameter(torch.zeros(weight.shape, **options))
        self.log_alpha = nn.Parameter(torch.full(weight.shape, gates.start, **options))
        group = nn.Parameter(torch.full((1,), gates.start, **options)) if structured else None
        self.register_parameter("group_log_alpha", group)

    def forward(self, weight: Tensor) -> Tensor:
        """θ for θ⁰."""
        sources = [weight, *self.parameters()]
        return self.moment.once((self.key, self.training), sources, lambda: self._value(weight))

    def _value(self, weight: Tensor) -> Tensor:
        noise = group_noise = None
        if self.training and self.log_alpha.requires_grad:
            stamp = self.moment.stamp or ()
            noise = logistic_noise(self.log_alpha, random_key(self.key, 0, *stamp))
            if self.group_log_alpha is not None:
                group_noise = logistic_noise(self.group_log_alpha, random_key(self.key, 1, *stamp))
        value: Tensor = _Offset.apply(
            *(weight, self.delta, self.log_alpha, self.group_log_alpha, noise, group_noise, self.gates)
        )  # type: ignore[no-untyped-call]
        return value

    @torch.no_grad()
    def gate(self) -> Tensor:
        """z without noise."""
        element = self.gates.value(self.log_alpha)
        return element if self.group_log_alpha is None else element.mul_(self.gates.value(self.group_log_alpha))

    @torch.no_grad()
    def fix(self, keep: Tensor) -> None:
        """z⊙δ where ``keep``, and zero elsewhere, from now on by gates of 1 and 0."""
        self.delta.copy_(torch.where(keep, self.gate() * self.delta, 0))
        self.log_alpha.fill_(-torch.inf).masked_fill_(keep, torch.inf)
        if self.group_log_alpha is not None:
            self.group_log_alpha.fill_(torch.inf)

    @property
    def fixed(self) -> bool:
        """Whether its mask is."""
        return bool(self.log_alpha.flatten()[0].isinf())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # What `compact` has made small.
        if (index := state_dict.pop(f"{prefix}index", None)) is not None:
            values = state_dict.pop(f"{prefix}values")
            places = index.long().to(self.delta.device)
            keep = torch.zeros_like(self.delta, dtype=torch.bool)
            keep.view(-1)[places] = True
            delta = torch.zeros_like(self.delta)
            delta.view(-1)[places] = values.to(delta)
            mask = torch.full_like(delta, -torch.inf).masked_fill_(keep, torch.inf)
            state_dict |= {f"{prefix}delta": delta, f"{prefix}log_alpha": mask}
            if self.group_log_alpha is not None:
                state_dict[f"{prefix}group_log_alpha"] = torch.full_like(self.group_log_alpha, torch.inf)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Offset(torch.autograd.Function):
    """Its tensors are attributes and not saved ones, see :class:`Moment`: a checkpointed block reads the same value."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        delta: Tensor,
        log_alpha: Tensor,
        group: Tensor | None,
        noise: Tensor | None,
        group_noise: Tensor | None,
        gates: HardConcrete,
    ) -> Tensor:
        ctx.gates, ctx.delta = gates, delta.detach()
        ctx.slope = 1.0 if noise is None else 1 / gates.temperature
        ctx.soft = _soft(log_alpha, noise, ctx.slope)
        ctx.group = None if group is None else _soft(group, group_noise, ctx.slope)
        gate = gates.stretch(ctx.soft)
        if ctx.group is not None:
            gate.mul_(gates.stretch(ctx.group))
        return torch.addcmul(weight.to(delta.dtype), gate, delta).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        upstream, gates = gradient.to(ctx.delta.dtype), ctx.gates
        element = gates.stretch(ctx.soft)
        whole = None if ctx.group is None else gates.stretch(ctx.group)
        by_element = by_group = None
        if ctx.needs_input_grad[2]:
            by_gate = upstream * ctx.delta
            if whole is not None:
                by_group = (by_gate * element).sum().view(1) * _derivative(ctx.group, gates, ctx.slope)
                by_gate.mul_(whole)
            by_element = by_gate.mul_(_derivative(ctx.soft, gates, ctx.slope))
        by_delta = upstream * (element if whole is None else element.mul_(whole))
        by_weight = gradient if ctx.needs_input_grad[0] else None
        return by_weight, by_delta, by_element, by_group, None, None, None


def _soft(log_alpha: Tensor, noise: Tensor | None, slope: float) -> Tensor:
    return torch.sigmoid(log_alpha if noise is None else (log_alpha + noise).mul_(slope))


def _derivative(soft: Tensor, gates: HardConcrete, slope: float) -> Tensor:
    """∂z/∂a: zero where z is clipped."""
    width = gates.upper - gates.lower
    stretched = soft * width + gates.lower
    inside = (stretched > 0) & (stretched < 1)
    return (soft * (1 - soft)).mul_(width * slope).mul_(inside)


# ---- surgery


def diff_prune(
    module: nn.Module,
    *,
    gates: Mapping[str, float] | None = None,
    structured: bool = True,
    seed: int = 0,
    layers: Mapping[str, Any] | None = None,
) -> Report:
    """Freeze all pretrained weights that train, and let the model read θ⁰ + z⊙δ in their place; δ is zero.

    Biases, norms and embeddings among them; the head is left as it is, and trains. Beside θ⁰ a weight has δ, a, their
    gradients, what an optimiser keeps of both (four values for Adam), θ and s: about eleven numbers, where full
    fine-tuning has four.

    Args:
        module: A LightningModule or a model, before it is wrapped and before its optimisers are made.
        gates: The arguments of :class:`HardConcrete`.
        structured: One more gate for each tensor.
        seed: Of the gates' draws.
        layers: Where the head is: the arguments of :class:`~lightning_ft.core.Layers`.

    Raises:
        ValueError: Nothing is there to change; weights of a recurrent layer; sharded ones.

    Reference:
        Guo, Rush and Kim 2021, "Parameter-Efficient Transfer Learning with Diff Pruning".
    """
    distribution = HardConcrete(**(gates or {}))
    weights = pretrained_weights(module, layers, "diff pruning")
    moment = Moment()
    compute_weights(
        module,
        weights,
        lambda i, weight: SparseOffset(
            weight, distribution, structured=structured, moment=moment, key=random_key(seed, i)
        ),
    )
    facts = {
        "tensors": len(weights),
        "values": size_of(weights),
        "group gates": len(weights) if structured else 0,
        "values that train": trained_size(module),
        "gates": asdict(distribution),
    }
    return Report("Diff pruning: θ = θ⁰ + z⊙δ", facts)


def sparse_offsets(module: nn.Module) -> list[SparseOffset]:
    """The offsets of a module, each once."""
    return [child for child in module.modules() if isinstance(child, SparseOffset)]


@torch.no_grad()
def prune_offsets(module: nn.Module, share: float) -> Report:
    """Keep of all z⊙δ the largest by magnitude, over all tensors together, and fix the mask.

    Args:
        module: After :func:`diff_prune`.
        share: How many values of all are kept, in (0, 1].

    Returns:
        How many of each tensor are.

    Raises:
        ValueError: There are no offsets; they are pruned already; ``share`` is out of range.
    """
    check_share(share)
    named = list(named_offsets(module))
    if not named:
        raise ValueError(f"{type(module).__name__} has no offsets to prune: call diff_prune, or use DiffPruning, first")
    if named[0][1].fixed:
        raise ValueError("the offsets are pruned already, and their mask is fixed")
    magnitudes = [(offset.gate() * offset.delta).abs_().flatten() for _, offset, _ in named]
    every = torch.cat([m.float() for m in magnitudes])
    count = max(1, round(share * len(every)))
    # Ties are settled by place, so that every process keeps the same.
    least = every.topk(count, sorted=True).values[-1]
    kept = every > least
    kept[(every == least).nonzero().flatten()[: count - int(kept.sum())]] = True
    assert int(kept.sum()) == count
    rows = []
    for (name, offset, _), keep in zip(named, torch.split(kept, [len(m) for m in magnitudes]), strict=True):
        offset.fix(keep.view(offset.delta.shape))
        rows.append({"weight": name, "values": len(keep), "kept": int(keep.sum())})
    facts = {"values": len(every), "kept": count, "share": count / len(every), "least kept": float(least)}
    return Report("Diff pruning: mask fixed", facts, [row for row in rows if row["kept"]])


def check_share(share: float) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: It lies outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} must lie in (0, 1]: the part of all weights that may differ (0.005)")


def compact(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which each fixed mask and its δ are the places and the values that are kept.

    A module that was altered by :func:`diff_prune` loads it.
    """
    result = dict(state)
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, SparseOffset) and f"{path}.delta" in result and child.fixed:
            delta = result.pop(f"{path}.delta")
            places = result.pop(f"{path}.log_alpha").flatten().isposinf().nonzero().flatten()
            result.pop(f"{path}.group_log_alpha", None)
            result[f"{path}.index"] = places.int() if delta.numel() < 2**31 else places
            result[f"{path}.values"] = delta.flatten()[places]
    return result


def named_offsets(module: nn.Module) -> Iterator[tuple[str, SparseOffset, Tensor]]:
    """The name of each weight as it was before, its offset and θ⁰; tied ones once."""
    seen: set[SparseOffset] = set()
    for path, child in module.named_modules():
        for name, steps in getattr(child, "parametrizations", {}).items():
            for offset in steps:
                if isinstance(offset, SparseOffset) and offset not in seen:
                    seen.add(offset)
                    yield f"{path}.{name}".strip("."), offset, steps.original
