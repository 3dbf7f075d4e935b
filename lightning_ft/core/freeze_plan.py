"""What is frozen at which stage: decisions only; hooks and strategies are the callbacks' business."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_ft.core.layer_groups import LayerGroups


class FreezePlan:
    """A sequence of phases over layer groups, each the set of groups that train in it.

    Only parameters that require gradients when the plan is made are ever touched: what its owner froze (a peft
    base, a teacher) stays frozen in every phase.

    Args:
        groups: The partition of the model.
        phases: For each stage the names of the groups that train.

    Raises:
        ValueError: No phase, or a phase names a group that does not exist or in which nothing can train.
    """

    def __init__(self, groups: LayerGroups, phases: Sequence[Sequence[str]]) -> None:
        if not phases:
            raise ValueError("phases is empty: a plan needs one phase or more")
        unknown = sorted({name for phase in phases for name in phase} - set(groups))
        if unknown:
            raise ValueError(f"phases name {unknown}, but the model's groups are {list(groups)}")
        self.phases = tuple(tuple(phase) for phase in phases)
        self._managed = {name: [p for p in groups.parameters(name) if p.requires_grad] for name in groups}
        for stage, phase in enumerate(self.phases):
            if not any(self._managed[name] for name in phase):
                raise ValueError(f"phase {stage} ({list(phase)}) has no parameter that can train")

    @property
    def last_stage(self) -> int:
        """The stage that runs to the end of training."""
        return len(self.phases) - 1

    def trainable_parameters(self, stage: int) -> int:
        """Number of values that train at ``stage``."""
        return sum(p.numel() for name in self.phases[stage] for p in self._managed[name])

    def apply(self, stage: int) -> list[nn.Parameter]:
        """Set every managed parameter's ``requires_grad`` to what ``stage`` asks for.

        A parameter that freezes loses its gradient: an optimiser would go on stepping a stale one.

        Returns:
            The parameters that train now and did not before.
        """
        thawed = []
        phase = set(self.phases[stage])
        for name, parameters in self._managed.items():
            for parameter in parameters:
                if name in phase and not parameter.requires_grad:
                    parameter.requires_grad_(True)
                    thawed.append(parameter)
                elif name not in phase:
                    parameter.requires_grad_(False).grad = None
        return thawed

    def restore(self) -> None:
        """Make everything trainable again that was when the plan was made."""
        for parameters in self._managed.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
