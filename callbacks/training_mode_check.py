"""A loud stop for models that train in evaluation mode."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override


class TrainingModeCheck(Callback):
    """Fail when something that trains is in eval mode.

    ``from_pretrained`` returns models in eval mode and Lightning keeps the mode that it finds, so dropout,
    mixout and gradient checkpointing vanish without a word. Checked before training and at the start of every
    epoch: each module with parameters that train, and each dropout
    beside one.

    Raises:
        RuntimeError: A module that trains is in eval mode; the message names the modules and the remedy.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check(pl_module)


def _check(root: nn.Module) -> None:
    asleep = []
    for name, module in root.named_modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if trains and not module.training:
            asleep.append(name or type(module).__name__)
        # A dropout has no parameters of its own: it belongs to what trains around it.
        if any(p.requires_grad for p in module.parameters()):
            asleep += [
                f"{name}.{child_name}".lstrip(".")
                for child_name, child in module.named_children()
                if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0 and not child.training
            ]
    if asleep:
        shown = ", ".join(asleep[:5]) + (f" and {len(asleep) - 5} more" if len(asleep) > 5 else "")
        raise RuntimeError(
            f"{len(asleep)} modules train in eval mode, so their dropout is off: {shown}. Models come in eval mode "
            "from from_pretrained(): call .train() on the model where you load it, or remove TrainingModeCheck if "
            "this is what you want"
        )
