"""A training step that is run once more, and leaves no trace in logs, metrics and optimisers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

_SILENCED = ("log", "log_dict", "toggle_optimizer", "untoggle_optimizer")
_COUNTS = ("_update_count", "_computed", "_forward_cache")


@contextmanager
def quiet(trainer: Trainer, module: LightningModule, metrics: list[nn.Module]) -> Iterator[None]:
    """Within the block nothing is logged and no optimiser may step; afterwards metrics are as they were before.

    Args:
        trainer: The trainer.
        module: Its module, whose ``self.log`` and ``self.log_dict`` do nothing meanwhile.
        metrics: Those of :func:`metrics_of`.
    """
    own = vars(module)
    before = {name: own[name] for name in _SILENCED if name in own}
    states = [(metric, _state(metric)) for metric in metrics]
    guards = [optimizer.register_step_pre_hook(_refuse) for optimizer in trainer.optimizers]
    own.update(dict.fromkeys(_SILENCED, _nothing))
    try:
        yield
    finally:
        for name in _SILENCED:
            del own[name]
        own.update(before)
        for metric, state in states:
            vars(metric).update(state)
        for guard in guards:
            guard.remove()


def metrics_of(module: nn.Module) -> list[nn.Module]:
    """The metrics of torchmetrics in a module."""
    from torchmetrics import Metric

    return [child for child in module.modules() if isinstance(child, Metric)]


def _state(metric: Any) -> dict[str, Any]:
    own = vars(metric)
    state = {name: own[name] for name in _COUNTS if name in own}
    for name in metric._defaults:
        value = own[name]
        # A state may be added to in place.
        state[name] = value.clone() if isinstance(value, Tensor) else list(value)
    return state


def _refuse(optimizer: Any, args: Any, kwargs: Any) -> None:
    raise ValueError(
        "training_step steps an optimiser before its first manual_backward, so that it cannot be called again for a "
        "perturbed pass: use lightning_ft.functional.perturbed_loss inside it"
    )


def _nothing(*_: Any, **__: Any) -> None:
    return None
