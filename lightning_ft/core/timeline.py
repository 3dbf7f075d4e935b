"""What trained when, and at which rate: planned before a training, or recorded in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_ft.core.layer_groups import LayerGroups


@dataclass
class Timeline:
    """The learning rate of each layer group from one optimiser step to the next that was noted.

    Args:
        groups: Names of the groups, bottom to top.
        steps: The steps at which something was noted, growing.
        rates: At each of them the rate of the groups that trained; a group that is left out was frozen.
        end: The step at which the last of them ended.
    """

    groups: Sequence[str]
    steps: list[int] = field(default_factory=list)
    rates: list[dict[str, float]] = field(default_factory=list)
    end: int = 0

    def note(self, step: int, rates: Mapping[str, float]) -> None:
        """Add what holds from ``step`` on.

        Example:
            >>> timeline = Timeline(["body", "head"])
            >>> timeline.note(0, {"head": 1e-3})
            >>> timeline.note(5, {"head": 1e-3})
            >>> timeline.note(9, {"head": 1e-3, "body": 1e-4})
            >>> timeline.changes(), timeline.end
            ([0, 9], 10)
        """
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step={step} must come after step {self.steps[-1]}, which was noted before")
        self.steps.append(step)
        self.rates.append(dict(rates))
        self.end = max(self.end, step + 1)

    def changes(self) -> list[int]:
        """The steps at which other groups began to train than before."""
        trained = [set(rates) for rates in self.rates]
        return [step for i, step in enumerate(self.steps) if i == 0 or trained[i] != trained[i - 1]]

    def thin(self, most: int) -> None:
        """Leave out every second entry until there are ``most``, but none at which other groups began to train."""
        while len(self.steps) > most:
            keep = set(self.changes())
            kept = [i for i, step in enumerate(self.steps) if i % 2 == 0 or step in keep]
            if len(kept) == len(self.steps):
                return
            self.steps = [self.steps[i] for i in kept]
            self.rates = [self.rates[i] for i in kept]

    def clip(self, step: int) -> None:
        """Forget what was noted from ``step`` on: a resumed run trains it again."""
        kept = [i for i, known in enumerate(self.steps) if known < step]
        self.steps = [self.steps[i] for i in kept]
        self.rates = [self.rates[i] for i in kept]
        self.end = min(self.end, step)


def step_cost(groups: LayerGroups, trains: Sequence[str] | set[str]) -> float:
    """Predicted arithmetic of a training step in which some groups train, as a share of one in which all do.

    Arithmetic goes with the weights of matrices: a forward pass through all groups, a backward pass from the top down
    to the lowest that trains, and once more the same for the gradients of those that train. Embeddings are looked up
    and cost nothing. A third each, so training the head alone costs about a third.

    Args:
        groups: The model's groups.
        trains: Names of those that train.

    Example:
        >>> from torch import nn
        >>> tower = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> groups = LayerGroups.of(tower, groups={"low": "^0", "middle": "^1", "top": "^2"})
        >>> [round(step_cost(groups, names), 3) for names in (["top"], ["middle", "top"], ["low", "middle", "top"])]
        [0.556, 0.778, 1.0]
    """
    work = {name: sum(p.numel() for p in groups.parameters(name) if p.ndim > 1) for name in groups}
    work |= {name: 0 for name in work if name.endswith("embeddings")}
    total = sum(work.values())
    names = list(groups)
    lowest = min((names.index(name) for name in trains), default=len(names))
    backward = sum(work[name] for name in names[lowest:])
    weights = sum(work[name] for name in set(trains))
    return (total + backward + weights) / (3 * total) if total else 1.0
