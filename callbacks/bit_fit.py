"""BitFit: fine-tune less than a thousandth of a model, its biases."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_ft.callbacks._altering import Altering
from lightning_ft.callbacks._split_rates import SplitRates
from lightning_ft.core.layers import Layers, plain_layers
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
        self._undecayed: list[SplitRates] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        self._altering.setup(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._altering.report is not None:
            rank_zero_info(f"BitFit: {self._altering.report}")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        biases = {id(p) for _, p in named_biases(pl_module) if p.requires_grad}
        self._undecayed = [SplitRates(optimizer, {}, undecayed=biases) for optimizer in trainer.optimizers]
        rates = [
            group.get("initial_lr", group["lr"])
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            if group.get("lr") is not None and any(id(p) in biases for p in group["params"])
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
