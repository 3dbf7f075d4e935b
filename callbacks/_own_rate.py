"""Some parameters with a learning rate of their own, in optimisers that know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class OwnRate:
    """Splits the groups of optimisers while ``step()`` runs: some parameters take another rate, and no weight decay.

    Their rate follows the optimiser's schedule: it is ``rate`` where that is at its base rate (of OneCycleLR, at its
    highest). The groups, their state dicts and schedulers stay the optimiser's own. Make it in ``on_train_start``, when
    others have put their hooks: it splits after them, and joins before them. A factor of DiscriminativeLR applies, too.

    Args:
        owner: Name of the callback, for messages.
        optimizers: The trainer's.
        parameters: Whose rate it is.
        rate: The rate.
        bases: Of :func:`base_rates`.

    Raises:
        ValueError: The optimisers do not hold all of the parameters.
    """

    def __init__(
        self,
        owner: str,
        optimizers: Sequence[Optimizer],
        parameters: Sequence[nn.Parameter],
        rate: float,
        bases: dict[int, Any],
    ) -> None:
        self._rate = rate
        self._bases = {id(p): bases[id(p)] for p in parameters if id(p) in bases}
        self._own: dict[int, list[dict[str, Any]]] = {}
        self._optimizers = list(optimizers)
        if missing := len(parameters) - len(self._bases):
            raise ValueError(
                f"{owner} added {len(parameters)} tensors to the model, and {missing} of them are in no optimiser: "
                "build it in configure_optimizers from self.parameters(), which has them by then"
            )
        self._before = [optimizer.register_step_pre_hook(self._split) for optimizer in optimizers]
        self._after: dict[int, RemovableHandle] = {}

    def _split(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._join(optimizer, args, kwargs)  # a step that raised left the groups split
        # First of the hooks that follow the step, as it is the last of those before it: splits are undone in reverse.
        if id(optimizer) in self._after:
            self._after[id(optimizer)].remove()
        handle = self._after[id(optimizer)] = optimizer.register_step_post_hook(self._join)
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(handle.id, last=False)
        self._own[id(optimizer)] = optimizer.param_groups
        optimizer.param_groups = [part for group in optimizer.param_groups for part in self._parts(group)]

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        mine = [p for p in group["params"] if id(p) in self._bases]
        if not mine:
            return [group]
        rest = [p for p in group["params"] if id(p) not in self._bases]
        rate = self._rate * (group["lr"] / self._bases[id(mine[0])])
        own = {**group, "params": mine, "lr": rate, "weight_decay": 0.0}
        return [{**group, "params": rest}, own] if rest else [own]

    def _join(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        own = self._own.pop(id(optimizer), None)
        if own is None:
            return
        parts = {id(p): part for part in optimizer.param_groups for p in part["params"]}
        for group in own:
            # Some optimisers keep running values in the group itself (a step count, an estimated scale).
            part = next((parts[id(p)] for p in group["params"] if id(p) in parts), group)
            kept = ("params", "lr", "weight_decay")
            group.update({key: value for key, value in part.items() if key not in kept})
        optimizer.param_groups = own

    def remove(self) -> None:
        """Take the hooks off."""
        for optimizer in self._optimizers:
            self._join(optimizer, (), {})
        for handle in [*self._before, *self._after.values()]:
            handle.remove()
        self._before.clear()
        self._after.clear()


def base_rates(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> dict[int, Any]:
    """The base rate of the group of each parameter, by the parameter's identity. In ``on_fit_start``, before a restore.

    It is what the schedulers note of it, or the rate itself where there are none.

    Raises:
        ValueError: A base rate is 0, of which no share can be told.
    """
    wanted = {id(p) for p in parameters}
    bases: dict[int, Any] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held = [id(p) for p in group["params"] if id(p) in wanted]
            base = group.get("max_lr", group.get("initial_lr", group.get("lr")))
            if held and not base:
                raise ValueError(
                    f"a group of {type(optimizer).__name__} has the base learning rate {base!r}, of which nothing can "
                    "take a share: give it a rate, which a scheduler may then lower"
                )
            bases |= dict.fromkeys(held, base)
    return bases
