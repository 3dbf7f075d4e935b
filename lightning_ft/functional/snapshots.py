"""Snapshot ensembles: a cyclic learning rate, members of which only what changed is kept, and their mean answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Answer = Literal["single_label", "multi_label", "regression"]


def cyclic_cosine(step: int, total: float, *, cycles: int = 5, warmup: int = 0) -> float:
    """The factor on the learning rate that falls along half a cosine, again and again.

    factor = ½ [cos(π ((t − 1) mod C) / C) + 1], with C = ⌈T / M⌉, t = ``step`` + 1, T = ``total`` and M = ``cycles``.
    With ``warmup`` W the first W steps of each cycle have (k + 1)/(W + 1) of it, k = 0 … W − 1: the paper jumps to the
    full rate, which throws a transformer off. A pure function of the step, so that a resumed run continues exactly.

    Args:
        step: Optimiser steps done, from 0.
        total: Optimiser steps in all.
        cycles: Falls in all. Where C does not divide T the last is shorter, or there are fewer.
        warmup: Steps of the rise at a cycle's beginning.

    Raises:
        ValueError: ``cycles`` or ``warmup`` is out of range, or training has no end.

    Example:
        >>> [round(0.1 * cyclic_cosine(step, 20, cycles=4), 4) for step in range(6)]
        [0.1, 0.0905, 0.0655, 0.0345, 0.0095, 0.1]

    Reference:
        Huang et al. 2017, "Snapshot Ensembles: Train 1, Get M for Free".
    """
    length = cycle_length(total, cycles)
    if not 0 <= warmup < length:
        raise ValueError(f"warmup={warmup!r} must be steps, 0 or more and fewer than those of a cycle ({length})")
    k = step % length
    rise = (k + 1) / (warmup + 1) if k < warmup else 1.0
    return rise * 0.5 * (math.cos(math.pi * k / length) + 1)


def cycle_length(total: float, cycles: int) -> int:
    """Steps of a cycle, ⌈T / M⌉.

    Raises:
        ValueError: ``cycles`` is no number of cycles, or training has no end.
    """
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise ValueError(f"cycles={cycles!r} must be a whole number, 1 or more")
    if not 1 <= total < math.inf:
        raise ValueError(
            f"total={total!r} must be the number of optimiser steps, 1 or more: cycles are shares of a training that "
            "ends. Set Trainer(max_epochs=...) or Trainer(max_steps=...)"
        )
    return math.ceil(total / cycles)


def delta(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``state`` that differ from those of ``base``, whole.

    Whole and not subtracted: a difference takes the same room, and θ⁰ + (θ − θ⁰) is not θ to the bit. What never
    trained (all but the adapters of LoRA) takes none.

    Args:
        state: The weights.
        base: Those that they came from; what is not in it is new and belongs to the result.

    Raises:
        ValueError: ``state`` lacks tensors of ``base``, of which nothing could be said.

    Example:
        >>> base = {"a": torch.zeros(2), "b": torch.ones(1)}
        >>> delta({"a": torch.zeros(2), "b": torch.zeros(1)}, base)
        {'b': tensor([0.])}
    """
    if missing := sorted(base.keys() - state.keys()):
        raise ValueError(f"state lacks {', '.join(missing[:3])} of base: it is not of the same model")
    return {name: tensor for name, tensor in state.items() if name not in base or not _same(tensor, base[name])}


def apply_delta(changed: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of which :func:`delta` gave ``changed``, to the bit.

    Example:
        >>> base = {"a": torch.zeros(2), "b": torch.ones(1)}
        >>> apply_delta({"b": torch.zeros(1)}, base)["b"]
        tensor([0.])
    """
    return {**base, **changed}


def mean_answer(logits: Sequence[Tensor], answer: Answer = "single_label") -> Tensor:
    """Logits whose probabilities are the mean of those of all members, computed in fp32 and in log space.

    Args:
        logits: Of each member: ``(…, labels)``.
        answer: ``"single_label"``: log of the mean softmax; ``"multi_label"``: log p̄ − log(1 − p̄) of the mean sigmoid;
            ``"regression"``: the mean.

    Raises:
        ValueError: ``logits`` is empty, or ``answer`` is none of the three.

    Example:
        >>> mean_answer([torch.tensor([0.0, 0.0]), torch.tensor([0.0, 100.0])]).softmax(-1)
        tensor([0.2500, 0.7500])
    """
    if not logits:
        raise ValueError("logits is empty: an ensemble has one member or more")
    stacked = torch.stack([member.float() for member in logits])
    count = math.log(len(logits))
    if answer == "regression":
        return stacked.mean(0)
    if answer == "single_label":
        return F.log_softmax(stacked, -1).logsumexp(0) - count
    if answer == "multi_label":
        return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)
    raise ValueError(f'answer={answer!r} must be "single_label", "multi_label" or "regression"')


@contextmanager
def holding(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters and buffers of a module be other tensors for a while; nothing is copied.

    Args:
        module: The module.
        values: New values by name, on the module's device; tied tensors under any of their names.

    Raises:
        ValueError: A name is not in the module, or a shape differs.
    """
    known = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    for name, value in values.items():
        if name not in known or known[name].shape != value.shape:
            raise ValueError(f"the module has no {name} of the shape {tuple(value.shape)}: it is not a member's module")
    before = {name: known[name].data for name in values}
    try:
        for name, value in values.items():
            known[name].data = value.to(known[name].dtype)
        yield
    finally:
        for name, value in before.items():
            known[name].data = value


def ensemble_probabilities(
    module: nn.Module,
    members: Sequence[Mapping[str, Tensor]],
    call: Callable[[], Any],
    *,
    answer: Answer = "single_label",
) -> Tensor:
    """Mean probabilities of the members of an ensemble (for regression, their mean value).

    Args:
        module: The module that takes the members' weights one after another.
        members: What of each member differs from the module, by name, on its device.
        call: Runs the module and returns logits, or something with ``logits``: ``lambda: module(batch)``.
        answer: What the logits mean: see :func:`mean_answer`.

    Example:
        >>> layer = nn.Linear(1, 2, bias=False)
        >>> members = [{"weight": torch.tensor([[0.0], [w]])} for w in (0.0, 100.0)]
        >>> with torch.no_grad():
        ...     ensemble_probabilities(layer, members, lambda: layer(torch.ones(1)))
        tensor([0.2500, 0.7500])
    """
    logits = mean_answer([logits_of(output) for output in each_member(module, members, call)], answer)
    return {"single_label": lambda: logits.softmax(-1), "multi_label": logits.sigmoid}.get(answer, lambda: logits)()


def each_member(module: nn.Module, members: Sequence[Mapping[str, Tensor]], call: Callable[[], Any]) -> Iterator[Any]:
    """What ``call`` returns while the module holds each member's weights."""
    for member in members:
        with holding(module, member):
            yield call()


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns.

    Raises:
        TypeError: There are none to be seen.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"forward returned a {type(output).__name__}, and an ensemble averages logits: name the module inside that "
            "returns a tensor of logits, or an output with .logits: through=..."
        )
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # By bits: -0.0 equals 0.0, and NaN not even itself.
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)
