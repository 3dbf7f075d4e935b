"""R-Drop: two dropout masks, one answer."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ft.callbacks._perturbable import answer_of, check
from lightning_ft.callbacks._perturbing import Perturbing
from lightning_ft.callbacks._trainer import refuse_asleep
from lightning_ft.core.token_inputs import TokenInputs, as_token_inputs
from lightning_ft.functional.found_logits import Logits
from lightning_ft.functional.passes import Method
from lightning_ft.functional.r_drop import r_drop
from lightning_ft.functional.snapshots import Answer


class RDrop(Callback):
    """Train on (L₁ + L₂)/2 + α · mean ½ [KL(p₁‖p₂) + KL(p₂‖p₁)] of two passes, each with dropout masks of its own.

    While the fit runs ``training_step`` is stood in for: it runs twice on each batch, the second time without logging,
    see :class:`~lightning_ft.callbacks.R3F`, with which it shares how logits are found. For logits of tokens the mean
    is over those that the loss reads (labels other than −100); for regression ½ of the squared difference takes the
    place of KL. Costs a second forward pass, and its activations. Logs ``r_drop`` (without α) where the trainer has a
    logger.

    The authors' code for GLUE adds L₁ + L₂ and sums KL over the batch with α = 0.5 before it: that is α = batch / 4
    here, where KL is the mean, so that α means the same for every batch size.

    Args:
        weight: α; the paper has 0.1 to 1 for classification, 5 for translation.
        logits: Where they are, see :class:`~lightning_ft.callbacks.R3F`.
        answer: What they mean, see there.
        inputs: Which embeddings the model reads, by which its calls are known, if they are not found.

    Raises:
        ValueError: An argument is out of range; see :class:`~lightning_ft.callbacks.R3F`.
        RuntimeError: A module that trains is in eval mode, where there is no dropout.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RDrop(4.0)], logger=False)

    Reference:
        Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks".
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        logits: Logits = None,
        answer: Answer | None = None,
        inputs: TokenInputs | None = None,
    ) -> None:
        check(answer, weight=weight)
        self.weight = weight
        self.logits = logits
        self.answer = answer
        self.inputs = as_token_inputs(inputs)
        self._perturbing = Perturbing(self, self._method)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trains = [
            name
            for name, child in pl_module.named_modules()
            if not child.training and any(p.requires_grad for p in child.parameters(recurse=False))
        ]
        refuse_asleep(self, trains, "modules")
        self._answer = answer_of(pl_module, self.answer)
        self._perturbing.attach(trainer, pl_module, self.inputs, reads_logits=True, logits=self.logits)

    def _method(self) -> Method:
        return r_drop(self.weight, answer=self._answer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._perturbing.release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._perturbing.release()
