"""Fine-tuning in a random subspace: frozen weights plus a fixed random projection of one short vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.core.counter_random import random_bits, random_key, uniform
from lightning_ft.core.report import Report
from lightning_ft.functional.computed_weights import (
    compute_weights,
    once_differentiable,
    pretrained_weights,
    size_of,
)
from lightning_ft.functional.moment import Moment
from lightning_ft.functional.trained_part import trained_size
from lightning_ft.functional.walsh_hadamard import walsh_hadamard

NAME = "intrinsic_dimension"
"""Under which the altered module holds its :class:`Subspace`."""


class FastFood:
    """P, a fixed random matrix of ``size`` rows and ``dimension`` columns that is never formed: P = c H G Π H B.

    B are signs, H is the Walsh-Hadamard matrix of n = 2^⌈log₂ size⌉, Π a permutation, G Gaussian, all a function of the
    seed; c = 1/√(size · ΣG²). The vector is padded to n, and the first ``size`` values of the result are taken. Then
    E‖Pv‖² = ‖v‖² over the draws, and columns are nearly orthogonal. A vector longer than n is cut into pieces of n,
    each with draws of its own, and their projections are added, so that no value of it is lost.

    The first transform sees n/p copies of zeros but for one: H (v, 0) repeats the transform of the first p = 2^⌈log₂ d⌉
    values, so only one of the two is of full size. Products with P and Pᵀ take O(n log n); nothing of the size of
    the model is kept but Π (4 bytes) and G (4 bytes a value of n), which no checkpoint holds and which are drawn anew
    where they are needed: as bits that are the same on every device.

    Args:
        dimension: d.
        size: D.
        seed: Any integer of 64 bits.

    Example:
        >>> projection = FastFood(4, 16, seed=0)
        >>> projection.project(torch.ones(4)).shape, projection.transpose(torch.ones(16)).shape
        (torch.Size([16]), torch.Size([4]))

    Reference:
        Le, Sarlós and Smola 2013, "Fastfood: Approximating Kernel Expansions in Loglinear Time".
    """

    def __init__(self, dimension: int, size: int, *, seed: int) -> None:
        self.dimension = dimension
        self.size = size
        self.seed = seed
        self.padded = _power_of_two(size)
        self.pieces = -(-dimension // self.padded)
        self.piece = self.padded if self.pieces > 1 else _power_of_two(dimension)
        self._drawn: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def project(self, vector: Tensor) -> Tensor:
        """P v, shape (size,), in the vector's precision."""
        signs, places, gaussian = self._draws(vector)
        padded = vector.new_zeros(self.pieces * self.piece)
        padded[: self.dimension] = vector * signs
        mixed = walsh_hadamard(padded.view(self.pieces, self.piece))
        read = places if places.device.type == "cpu" else self._reduced(places)
        # Indexing by [] would be three to four times as slow, here and below.
        shuffled = mixed.view(-1).index_select(0, read).view_as(gaussian)
        return walsh_hadamard(shuffled.mul_(gaussian).sum(0))[: self.size]

    def transpose(self, values: Tensor) -> Tensor:
        """Pᵀ w, shape (dimension,), in the precision of w."""
        signs, places, gaussian = self._draws(values)
        mixed = walsh_hadamard(torch.nn.functional.pad(values, (0, self.padded - self.size)))
        folded = self._fold((mixed * gaussian).view(-1), places).view(self.pieces, self.piece)
        return walsh_hadamard(folded).view(-1)[: self.dimension] * signs

    def _reduced(self, places: Tensor) -> Tensor:
        """Which value of the first transform each value before the second one is: there are copies of the first."""
        return places if self.pieces > 1 else places & (self.piece - 1)

    def _fold(self, values: Tensor, places: Tensor) -> Tensor:
        """For each value of the first transform the sum of those that read it."""
        if places.device.type == "cpu":
            return values.new_zeros(self.pieces * self.piece).index_add_(0, places, values)
        return self._ordered(values, places)

    def _ordered(self, values: Tensor, places: Tensor) -> Tensor:
        """The same on a GPU, which would add them in another order each time: the permutation is turned round."""
        turned = torch.empty_like(values).index_copy_(0, places.long(), values)
        return turned.view(self.pieces, -1, self.piece).sum(1).view(-1)

    def _draws(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """B, Π (places in all pieces together; on a CPU reduced) and c G, on a device and in a precision."""
        if like.is_meta:
            shape = self.pieces, self.padded
            places = torch.empty(self.pieces * self.padded, dtype=torch.long, device="meta")
            return like.new_empty(self.dimension), places, like.new_empty(shape)
        which = str(like.device), like.dtype
        if which not in self._drawn:
            # A draw in inference mode would be of no use to autograd afterwards.
            with torch.inference_mode(False), torch.no_grad():
                self._drawn.clear()
                self._drawn[which] = self._draw(like.device, like.dtype)
        return self._drawn[which]

    def _draw(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        bits = random_bits(random_key(self.seed, 0), torch.arange(self.dimension, device=device))
        signs = ((bits & 1) * 2 - 1).to(dtype)
        places = torch.empty(self.pieces, self.padded, dtype=torch.int32, device=device)
        gaussian = torch.empty(self.pieces, self.padded, dtype=dtype, device=device)
        for i in range(self.pieces):
            places[i] = permutation(self.padded, random_key(self.seed, 1, i), device) + i * self.padded
            draws = normal(self.padded, random_key(self.seed, 2, i), device)
            gaussian[i] = draws / math.sqrt(self.size * float(draws.square().sum()))
        places = places.view(-1)
        return signs, self._reduced(places) if device.type == "cpu" else places, gaussian

    def __deepcopy__(self, memo: dict[int, Any]) -> FastFood:
        return self  # nothing of it ever changes


def permutation(size: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of ``size``, a power of two: rounds of odd multiples, sums and shifts, each of which is one to one.

    Not drawn from all that there are, but of a cost and a memory that sorting random numbers has not.

    Example:
        >>> sorted(permutation(8, 1).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    bits = size.bit_length() - 1
    mask, shift = size - 1, max(1, bits // 2)
    places = torch.arange(size, device=device)
    for round_ in range(4):
        factor, term = random_key(key, round_, 0) & mask | 1, random_key(key, round_, 1) & mask
        places = places.mul_(factor).add_(term).bitwise_and_(mask)
        places = places.bitwise_xor_(places >> shift)
    return places


def normal(size: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers in double precision, by Box and Muller's transform of counted random bits."""
    half = -(-size // 2)
    numbers = uniform(random_bits(key, torch.arange(2 * half, device=device)))
    radius = (-2 * torch.log1p(-numbers[:half])).sqrt_()
    angle = 2 * math.pi * numbers[half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:size]


class Subspace(nn.Module):
    """What trains: one vector for all tensors, and in SAID a scale for each tensor, of d values together.

    Args:
        dimension: d.
        tensors: Number of tensors, m.
        said: Whether each tensor has a scale λ: the vector then has d − m values.
    """

    scales: nn.Parameter | None

    def __init__(self, dimension: int, tensors: int, *, said: bool) -> None:
        super().__init__()
        self.moment = Moment()
        self.vector = nn.Parameter(torch.zeros(dimension - tensors if said else dimension))
        self.register_parameter("scales", nn.Parameter(torch.ones(tensors)) if said else None)


class SubspaceWeight(nn.Module):
    """θ = θ⁰ + λ P v as a parametrisation of one weight; v and λ are those of a :class:`Subspace`.

    Args:
        subspace: Not a part of this module: it is registered once, with the root.
        index: Which scale is this weight's.
        size: Number of values of the weight.
        seed: Of its projection.
    """

    def __init__(self, subspace: Subspace, index: int, size: int, *, seed: int) -> None:
        super().__init__()
        self._subspace = (subspace,)  # in a tuple, so that it is not registered here too
        self.index = index
        self.projection = FastFood(subspace.vector.numel(), size, seed=seed)

    def forward(self, weight: Tensor) -> Tensor:
        """θ for θ⁰."""
        (subspace,) = self._subspace
        vector: Tensor = subspace.vector
        scales: Tensor | None = subspace.scales
        if vector.device != weight.device:  # of a copy of the model alone, elsewhere; or of a run on meta tensors
            vector = vector.to(weight.device)
            scales = None if scales is None else scales.to(weight.device)
        sources = [weight, vector, *([] if scales is None else [scales])]

        def compute() -> Tensor:
            scale = None if scales is None else scales[self.index]
            value: Tensor = _Projected.apply(weight, vector, scale, self.projection)  # type: ignore[no-untyped-call]
            return value

        return subspace.moment.once(self.index, sources, compute)


class _Projected(torch.autograd.Function):
    """Its tensors are attributes and not saved ones, see :class:`Moment`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, vector: Tensor, scale: Tensor | None, projection: FastFood) -> Tensor:
        ctx.projection, ctx.vector, ctx.scale = projection, vector.detach(), None if scale is None else scale.detach()
        added = projection.project(ctx.vector)
        if ctx.scale is not None:
            added = added * ctx.scale
        return (weight.to(added.dtype) + added.view(weight.shape)).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        back = ctx.projection.transpose(gradient.to(ctx.vector.dtype).reshape(-1))
        by_weight = gradient if ctx.needs_input_grad[0] else None
        if ctx.scale is None:
            return by_weight, back, None, None
        # ⟨g, P v⟩ = ⟨Pᵀ g, v⟩: the projection need not be kept.
        return by_weight, back * ctx.scale, back @ ctx.vector, None


def restrict_to_subspace(
    module: nn.Module,
    *,
    dimension: int,
    said: bool = True,
    seed: int = 0,
    layers: Mapping[str, Any] | None = None,
) -> Report:
    """Freeze all pretrained weights that train, and let the model read θ⁰ + λₜ Pₜ v in the place of each tensor.

    v starts at zero and λ at one. The head is left as it is, and trains beside the d values.

    Args:
        module: A LightningModule or a model, before it is wrapped and before its optimisers are made.
        dimension: d, the number of values that train outside the head.
        said: Structure-aware: m of the d values are scales of the m tensors.
        seed: Of the projections.
        layers: Where the head is: the arguments of :class:`~lightning_ft.core.Layers`.

    Raises:
        ValueError: d is too small, or larger than what it stands for; nothing is there to change; weights of a
            recurrent layer; sharded ones; the module has something else of that name.

    Reference:
        Aghajanyan, Gupta and Zettlemoyer 2021, "Intrinsic Dimensionality Explains the Effectiveness of Language Model
        Fine-Tuning".
    """
    if hasattr(module, NAME):
        raise ValueError(f"{type(module).__name__} has an attribute {NAME!r} already, under which its vector would be")
    weights = pretrained_weights(module, layers, "IntrinsicDimension")
    size, least = size_of(weights), len(weights) + 1 if said else 1
    if not least <= dimension <= size:
        why = f"one scale for each of {len(weights)} tensors, and a vector" if said else "one value"
        raise ValueError(
            f"dimension={dimension} must lie between {least} ({why}) and {size}, all values of the tensors"
            + ("; with said=False it may be smaller" if said and dimension < least else "")
        )
    subspace = Subspace(dimension, len(weights), said=said).to(next(iter(weights.values())).device)
    compute_weights(
        module,
        weights,
        lambda i, weight: SubspaceWeight(subspace, i, weight.numel(), seed=random_key(seed, i)),
    )
    module.add_module(NAME, subspace)
    facts = {
        "tensors": len(weights),
        "values": size,
        "dimension": dimension,
        "of these, scales": len(weights) if said else 0,
        "share": dimension / size,
        "values that train": trained_size(module),
    }
    return Report("Intrinsic dimension: θ = θ⁰ + λ P v" if said else "Intrinsic dimension: θ = θ⁰ + P v", facts)


def subspace_of(module: nn.Module) -> Subspace | None:
    """What :func:`restrict_to_subspace` gave a module."""
    found = getattr(module, NAME, None)
    return found if isinstance(found, Subspace) else None


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
