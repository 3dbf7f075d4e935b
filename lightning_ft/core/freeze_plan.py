"""What is frozen at which stage: decisions only; hooks and strategies are the callbacks' business."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from lightning_ft.core.layer_groups import LayerGroups, Named


class FreezePlan:
    """A sequence of phases over layer groups, each the set of groups that train in it.

    Only parameters that require gradients when the plan is made are ever touched: what its owner froze (a peft
    base, a teacher) stays frozen in every phase.

    Args:
        groups: The partition of the model.
        phases: For each stage the names of the groups that train.
        always: Parameters that train in every phase, whatever their group.

    Raises:
        ValueError: No phase, or a phase names a group that does not exist or in which nothing can train.
    """

    def __init__(
        self,
        groups: LayerGroups,
        phases: Sequence[Sequence[str]],
        *,
        always: Collection[nn.Parameter] = (),
    ) -> None:
        if not phases:
            raise ValueError("phases is empty: a plan needs one phase or more")
        unknown = sorted({name for phase in phases for name in phase} - set(groups))
        if unknown:
            raise ValueError(f"phases name {unknown}, but the model's groups are {list(groups)}")
        self.phases = tuple(tuple(phase) for phase in phases)
        self._groups = groups
        self._always = {id(p) for p in always}
        self._managed = {
            group: [(name, p) for name, p in groups.named_parameters(group) if p.requires_grad] for group in groups
        }
        for stage, phase in enumerate(self.phases):
            if not any(self._managed[name] for name in phase):
                raise ValueError(f"phase {stage} ({list(phase)}) has no parameter that can train")

    @property
    def last_stage(self) -> int:
        """The stage that runs to the end of training."""
        return len(self.phases) - 1

    def training(self, stage: int) -> list[Named]:
        """Names and parameters of what trains at ``stage``, bottom to top."""
        return [(name, p) for name, p, trains in self._flags(stage) if trains]

    def frozen(self, stage: int) -> list[Named]:
        """Names and parameters of what this plan freezes at ``stage``; not what its owner had frozen before."""
        return [(name, p) for name, p, trains in self._flags(stage) if not trains]

    def trainable_parameters(self, stage: int) -> int:
        """Number of values that train at ``stage``."""
        return sum(self._groups.shape_of(p).numel() for _, p in self.training(stage))

    def _flags(self, stage: int) -> Iterator[tuple[str, nn.Parameter, bool]]:
        phase = set(self.phases[stage])
        for group, pairs in self._managed.items():
            for name, parameter in pairs:
                yield name, parameter, group in phase or id(parameter) in self._always

    def apply(self, stage: int) -> list[nn.Parameter]:
        """Set every managed parameter's ``requires_grad`` to what ``stage`` asks for.

        A parameter that freezes loses its gradient: an optimiser would go on stepping a stale one.

        Returns:
            The parameters that train now and did not before.
        """
        thawed = []
        for _, parameter, trains in self._flags(stage):
            if not trains:
                parameter.requires_grad_(False).grad = None
            elif not parameter.requires_grad:
                parameter.requires_grad_(True)
                thawed.append(parameter)
        return thawed

    def restore(self) -> None:
        """Make everything trainable again that was when the plan was made."""
        for pairs in self._managed.values():
            for _, parameter in pairs:
                parameter.requires_grad_(True)
