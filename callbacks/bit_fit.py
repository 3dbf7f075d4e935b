"""BitFit: fine-tune less than a thousandth of a model, its biases."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ft.callbacks._altering import Altering
from lightning_ft.core.layers import Layers
from lightning_ft.functional.adapter_files import plain_layers
from lightning_ft.functional.bit_fit import named_biases

_LOW = 1e-4


class BitFit(Callback):
    """Freeze the model but for its biases, those of norms among them, and train these and the head.

    What :func:`lightning_ft.functional.bit_fit.bit_fit` does, in ``setup``, or at the end of ``configure_model`` for a
    model that is built late. Checkpoints hold biases and head alone. In BERT-base these are 102,912 values, 0.094%.

    Biases learn at rates of 1e-4 to 1e-2 (1e-3 in the authors' code), two orders above those of full fine-tuning: a
    lower one is warned of. They are not decayed: where an optimiser's group decays them, they are a group of their own
    for the duration of each ``step()``, without decay.

    ``Freeze("head", parameters=r"(^|\\.)bias$")`` trains the same, and saves the whole model.

    Args:
        layers: Where the head is, if it is not found by itself.

    Raises:
        ValueError: The model has no biases (Llama, T5, ModernBERT); another callback froze it before.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BitFit()], logger=False)

    Reference:
        Ben Zaken, Goldberg and Ravfogel 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
        Masked Language-models".
    """

    def __init__(self, *, layers: Layers | None = None) -> None:
        self.layers = layers
        self._altering = Altering("bit_fit", {"layers": plain_layers(layers)})
        self._undecayed: list[_WithoutDecay] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        self._altering.setup(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._altering.report is not None:
            rank_zero_info(f"BitFit: {self._altering.report}")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Later than others' hooks on the same step, which split groups, too, and join them after these are joined.
        biases = {id(p) for _, p in named_biases(pl_module) if p.requires_grad}
        self._undecayed = [_WithoutDecay(optimizer, biases) for optimizer in trainer.optimizers]
        rates = [
            group.get("initial_lr", group["lr"])
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            if any(id(p) in biases for p in group["params"])
        ]
        if rates and max(rates) < _LOW:
            rank_zero_warn(
                f"BitFit trains biases at a learning rate of {max(rates):g}, which is one for all weights: biases "
                "alone need 1e-4 to 1e-2 (1e-3 in the authors' code)"
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._altering.release()
        for undecayed in self._undecayed:
            undecayed.remove()
        self._undecayed.clear()


class _WithoutDecay:
    """Two hooks on an optimiser that take parameters out of decaying groups for the duration of one ``step()``.

    For good it could not be done: the groups of a stranger's optimiser are counted by its schedulers and checkpoints.
    """

    def __init__(self, optimizer: Optimizer, parameters: set[int]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._taken: list[tuple[dict[str, Any], list[nn.Parameter], dict[str, Any]]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._take),
            optimizer.register_step_post_hook(self._give_back),
        ]

    def _take(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._give_back(optimizer, args, kwargs)  # a step that raised left them out
        for group in list(optimizer.param_groups):
            own = group["params"]
            chosen = [p for p in own if id(p) in self._parameters]
            if chosen and group.get("weight_decay"):
                apart = {**group, "params": chosen, "weight_decay": 0.0}
                self._taken.append((group, own, apart))
                group["params"] = [p for p in own if id(p) not in self._parameters]
                optimizer.param_groups.append(apart)

    def _give_back(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, own, _ in self._taken:
            group["params"] = own
        added = {id(apart) for _, _, apart in self._taken}
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if id(group) not in added]
        self._taken.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        self._give_back(self._optimizer, (), {})
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
