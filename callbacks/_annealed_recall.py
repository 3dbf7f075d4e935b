"""Optimiser hooks that anneal the steps of pretrained parameters and pull them beside the step."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_ft.core.annealing import Annealing
from lightning_ft.core.penalty import QuadraticPenalty

_LINEAR = (Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, SGD)
"""Their step is the learning rate times something that it has no part in, but for decoupled weight decay."""
_LEAST = 1e-12  # λ below this moves nothing, and weight decay is divided by it


class AnnealedRecall:
    """θ ← θ − λ(t)ηu − r(θ − θ⁰) − ηδθ for one optimiser whose own step is θ ← θ − ηu − ηδθ; r = η(1 − λ(t))γ.

    A pre-hook divides the optimiser's groups by the age t of their parameters for the duration of the step, and gives
    each part the rate ηλ/(1 − r) and the decoupled weight decay δ/λ. The post-hook moves the result by r towards θ⁰:
    (1 − r)(θ − ηλ/(1−r)u − ηδ/(1−r)θ) + rθ⁰, which is the above. Make it when all other hooks that divide groups or
    multiply rates are there: it then knows the final rates, and takes its division back before they do theirs.

    t counts the steps of each parameter, from 1: one without a gradient ages not, and one whose optimiser state was
    cleared begins anew. Fused optimisers under an fp16 scaler skip a step on the device: whether they did is read
    when the next step begins, when it has long been known.

    Args:
        owner: Name of the callback, for messages.
        optimizer: The optimiser.
        named: Names and parameters to recall, those that the optimiser holds.
        references: θ⁰ of each.
        strength: γ.
        annealing: λ.
        ages: t of each name so far, which this writes to.
        legacy_order: The authors' code pulls the weights that the step has left: rate ηλ instead of ηλ/(1 − r).

    Raises:
        TypeError: The optimiser's step is not known to be linear in its rate.
    """

    def __init__(
        self,
        owner: str,
        optimizer: Optimizer,
        named: Sequence[tuple[str, nn.Parameter]],
        references: Sequence[Tensor],
        strength: float,
        annealing: Annealing,
        ages: MutableMapping[str, int],
        *,
        legacy_order: bool = False,
    ) -> None:
        check_linear(owner, optimizer)
        self.owner = owner
        self.optimizer = optimizer
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.strength = strength
        self.annealing = annealing
        self.ages = ages
        self.legacy_order = legacy_order
        self._penalty = QuadraticPenalty(1.0, references)
        self._index = {id(p): i for i, p in enumerate(self.parameters)}
        # A smaller pull is lost in rounding where θ is not much smaller than its distance to θ⁰.
        self._least = min(torch.finfo(p.dtype).eps for p in self.parameters) / 4
        self._keeps_state = not isinstance(optimizer, SGD)
        self._own: list[dict[str, Any]] | None = None
        self._parts: list[dict[str, Any]] = []
        self._pulls: list[tuple[list[int], Any]] = []
        self._pending: tuple[list[int], Tensor, Any] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def recall(self) -> tuple[float, int]:
        """Sum of 1 − λ of the coming step over the values that have gradients, and their number."""
        self.settle()
        live = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        sizes = [self.parameters[i].numel() for i in live]
        rests = [self.annealing.rest(self._age(i) + 1) for i in live]
        return sum(size * rest for size, rest in zip(sizes, rests, strict=True)), sum(sizes)

    def _age(self, index: int) -> int:
        name = self.names[index]
        if self._keeps_state and not self.optimizer.state.get(self.parameters[index]):
            self.ages[name] = 0
        return self.ages.get(name, 0)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._undo()  # a step that raised left the groups divided
        self.settle()
        self._pulls = []
        self._parts = [part for group in optimizer.param_groups for part in self._divide(group)]
        self._own, optimizer.param_groups = optimizer.param_groups, self._parts

    def _divide(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        by_age: dict[int | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            index = self._index.get(id(parameter))
            by_age.setdefault(None if index is None else self._age(index), []).append(parameter)
        return [self._part(group, age, parameters) for age, parameters in by_age.items()]

    def _part(self, group: dict[str, Any], age: int | None, parameters: list[nn.Parameter]) -> dict[str, Any]:
        if age is None:
            return {**group, "params": parameters}
        share = max(_LEAST, self.annealing(age + 1))
        pull = self._pull(group["lr"], self.annealing.rest(age + 1))
        self._pulls.append(([self._index[id(p)] for p in parameters], pull))
        part = {**group, "params": parameters, "lr": group["lr"] * (share if self.legacy_order else share / (1 - pull))}
        if group.get("decoupled_weight_decay"):
            part["weight_decay"] = group["weight_decay"] / share
        return part

    def _pull(self, rate: Any, rest: float) -> Any:
        if not isinstance(rate, Tensor) and rate * self.strength >= 1:
            raise ValueError(
                f"{self.owner}: a step at learning rate {rate:g} with strength={self.strength:g} recalls "
                f"{rate * self.strength:.3g} of the distance at full recall, and 1 or more would jump past the "
                f"pretrained weights: take a strength below {1 / rate:.3g}"
            )
        return rate * self.strength * rest

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimisers under an fp16 scaler run a step that overflowed, too, and skip it inside, by this flag.
        overflow: Tensor | None = getattr(optimizer, "found_inf", None)
        for members, pull in self._pulls:
            if isinstance(pull, Tensor) or pull > self._least:
                rate = pull if overflow is None else pull * (1 - overflow)
                self._penalty.pull_(self.parameters, learning_rate=rate, members=members)
        stepped = [i for members, _ in self._pulls for i in members if self.parameters[i].grad is not None]
        if overflow is None:
            self._grow(stepped)
        else:
            self._pending = stepped, *_fetch(overflow)
        self._undo()

    def _grow(self, stepped: list[int]) -> None:
        for index in stepped:
            name = self.names[index]
            self.ages[name] = self.ages.get(name, 0) + 1

    def settle(self) -> None:
        """Count a step of which only the device knew whether it was skipped."""
        if self._pending is not None:
            stepped, overflow, event = self._pending
            self._pending = None
            if event is not None:
                event.synchronize()
            if not overflow.item():
                self._grow(stepped)

    def _undo(self) -> None:
        # After a step that raised, another hook may have put its own groups back already.
        if self._own is not None and self.optimizer.param_groups is self._parts:
            self.optimizer.param_groups = self._own
        self._own = None

    def remove(self) -> None:
        """Take the hooks off, and what a step that raised has left."""
        self.settle()
        self._undo()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _fetch(flag: Tensor) -> tuple[Tensor, Any]:
    """A copy in main memory, and what to wait for before it is read."""
    if flag.device.type == "cpu":
        return flag.clone(), None
    copy = flag.to("cpu", non_blocking=True)
    event = torch.Event(flag.device)
    event.record()
    return copy, event


def check_linear(owner: str, optimizer: Optimizer) -> None:
    """Refuse an optimiser whose step is not known to be linear in its learning rate.

    Raises:
        TypeError: It is none of ``torch.optim`` that are, or overrides their ``step``.
    """
    # torch wraps `step` in each class that is used.
    step = inspect.unwrap(type(optimizer).step)
    if not any(isinstance(optimizer, cls) and step is inspect.unwrap(cls.step) for cls in _LINEAR):
        raise TypeError(
            f"{owner} multiplies learning rates, which anneals a step exactly if that is linear in its rate: "
            f"{type(optimizer).__name__} is not known to be. Use torch.optim.AdamW (or "
            f"{', '.join(cls.__name__ for cls in _LINEAR if cls is not AdamW)})"
        )
