"""When a metric has stopped improving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final


@dataclass(frozen=True)
class Plateau:
    """A *when*: the monitored value has not improved for ``patience`` validations.

    Args:
        monitor: Name under which the LightningModule logs the value.
        mode: Whether smaller (``"min"``) or larger (``"max"``) is better.
        patience: Validations in a row without improvement.
        min_delta: The least change that counts as an improvement.
        reload_best: Put back the best weights when the time has come.

    Raises:
        ValueError: A number is out of range.
    """

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    patience: int = 1
    min_delta: float = 0.0
    reload_best: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode={self.mode!r} must be 'min' or 'max'")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience={self.patience!r} must be a whole number of validations, 1 or more")
        if not self.min_delta >= 0:
            raise ValueError(f"min_delta={self.min_delta!r} must be 0 or more")

    def __str__(self) -> str:
        times = "a validation" if self.patience == 1 else f"{self.patience} validations"
        return f"after {times} without a better {self.monitor}"


@final
class PlateauWatch:
    """Counts validations without improvement. The first value is always an improvement, not-a-number never is.

    Args:
        plateau: What counts.

    Example:
        >>> watch = PlateauWatch(Plateau(patience=2))
        >>> [(watch.improves(loss), watch.over) for loss in (0.5, 0.4, 0.6, 0.4)]
        [(True, False), (True, False), (False, False), (False, True)]
    """

    def __init__(self, plateau: Plateau) -> None:
        self.plateau = plateau
        self._best: float | None = None
        self._waited = 0

    @property
    def over(self) -> bool:
        """Whether patience is at an end."""
        return self._waited >= self.plateau.patience

    def improves(self, value: float) -> bool:
        """Take in the value of one validation; True if it is the best so far."""
        sign = 1 if self.plateau.mode == "max" else -1
        better = value == value and (self._best is None or sign * (value - self._best) > self.plateau.min_delta)
        self._best = value if better else self._best
        self._waited = 0 if better else self._waited + 1
        return better

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._best, self._waited = state["best"], state["waited"]
