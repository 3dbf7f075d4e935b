"""Means of weights: of several state dicts, or on the line between two."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]
_STATISTICS = ("running_mean", "running_var")
"""Buffers of batch norms: statistics of activations, which are not those of the mean weights."""


def average(states: Iterable[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The mean of state dicts, θ̄ = Σ wᵢ θᵢ / Σ wᵢ, each of which is needed only for a moment.

    Computed as a running mean, θ̄ ← θ̄ + (wᵢ / Σ_{j≤i} wⱼ) (θᵢ − θ̄), in fp32 (fp64 for fp64), so that what is the same in
    all members stays so to the bit. Integers and booleans (position ids, counters) have no mean: the first member's
    are kept. Pass a generator that reads one file at a time, and only the mean and one member are in memory.

    Args:
        states: State dicts with the same keys and shapes.
        weights: A weight of 0 or more for each; all the same by default.

    Returns:
        New tensors, in the dtypes and on the devices of the first state dict.

    Raises:
        ValueError: No state dict; keys or shapes differ; weights are not one for each, below 0, or all 0.

    Example:
        >>> one, three = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
        >>> average([one, three])
        {'w': tensor([2.])}
        >>> average([one, three], weights=[3, 1])
        {'w': tensor([1.5000])}

    Reference:
        Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time".
    """
    if weights is not None:
        _check_weights(weights)
    mean: dict[str, Tensor] = {}
    like: dict[str, torch.dtype] = {}
    total, count = 0.0, 0
    for count, state in enumerate(states, 1):
        if weights is not None and count > len(weights):
            raise ValueError(f"weights has {len(weights)} values and there are more state dicts: pass one for each")
        weight = 1.0 if weights is None else weights[count - 1]
        total += weight
        if count == 1:
            like = {name: tensor.dtype for name, tensor in state.items()}
            mean = start_mean(state)
        elif weight:
            add_to_mean_(mean, state, weight / total)
        else:
            check_alike(mean, state)
    if not count:
        raise ValueError("states is empty: there is nothing to average")
    if weights is not None and count != len(weights):
        raise ValueError(f"weights has {len(weights)} values for {count} state dicts: pass one for each")
    if count > 1 and (found := [name for name in mean if name.rpartition(".")[2] in _STATISTICS]):
        warnings.warn(
            f"{found[0]} and {len(found) - 1} more are statistics of batch norms, and their mean is not what the mean "
            "weights give: compute them anew on training batches (torch.optim.swa_utils.update_bn)",
            stacklevel=2,
        )
    return {name: tensor.to(like[name]) for name, tensor in mean.items()}


def interpolate(a: State, b: State, alpha: float) -> dict[str, Tensor]:
    """The weights (1 − α) a + α b, in fp32 (fp64 for fp64); integers and booleans are those of ``a``.

    Args:
        a: The state dict at α = 0; the result has its dtypes.
        b: The state dict at α = 1.
        alpha: α; outside [0, 1] it extrapolates.

    Raises:
        ValueError: Keys or shapes differ, or ``alpha`` is not finite.

    Example:
        >>> interpolate({"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}, 0.25)
        {'w': tensor([1.5000])}

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT).
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha!r} must be a number: 0 gives the first weights, 1 the second")
    mean = start_mean(a)
    add_to_mean_(mean, b, alpha)
    return {name: tensor.to(a[name].dtype) for name, tensor in mean.items()}


def start_mean(state: State) -> dict[str, Tensor]:
    """A copy of a state dict to average into: floating-point tensors in fp32, or fp64 if they are."""
    return {name: tensor.detach().to(_wide(tensor), copy=True) for name, tensor in state.items()}


@torch.no_grad()
def add_to_mean_(mean: dict[str, Tensor], state: State, weight: float) -> None:
    """mean ← mean + ``weight`` (state − mean), in place.

    Raises:
        ValueError: Keys or shapes differ.
    """
    check_alike(mean, state)
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            tensor.lerp_(state[name].detach().to(device=tensor.device, dtype=tensor.dtype), weight)


def check_alike(one: State, other: State) -> None:
    """Refuse state dicts of different models.

    Raises:
        ValueError: Keys or shapes differ, or floating-point tensors stand against integers.
    """
    if one.keys() != other.keys():
        missing, more = sorted(one.keys() - other.keys()), sorted(other.keys() - one.keys())
        raise ValueError(
            f"the state dicts must have the same keys: the second lacks {_some(missing)} and has {_some(more)} beyond "
            "the first. Only weights of one architecture have a mean"
        )
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)} in one state dict and {tuple(other[name].shape)} in "
                "another: only weights of one architecture have a mean"
            )
        if tensor.is_floating_point() != other[name].is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} in one state dict and {other[name].dtype} in another")


def _check_weights(weights: Sequence[float]) -> None:
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"weights={list(weights)!r} must be 0 or more, and one of them above 0")
    if not weights[0] > 0:
        raise ValueError(f"weights={list(weights)!r} must begin with a number above 0: leave out what has none")


def _wide(tensor: Tensor) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
