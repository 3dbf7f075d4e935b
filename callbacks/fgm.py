"""FGM: one step towards the words that the model handles worst."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ft.callbacks._perturbable import check
from lightning_ft.callbacks._perturbing import Perturbing
from lightning_ft.core.token_inputs import TokenInputs, as_token_inputs
from lightning_ft.functional.fgm import fgm
from lightning_ft.functional.passes import Method
from lightning_ft.functional.r3f import Dropout


class FGM(Callback):
    """Train on L(x) + w · L(x + r), with r = ε g/‖g‖₂ of each example and g = ∂L(x)/∂x.

    x are the embedded tokens. While the fit runs ``training_step`` is stood in for: it runs twice on a batch, the
    second time without logging, and returns the sum, see :class:`~lightning_ft.callbacks.FreeLB`. An example whose
    gradient is 0, or not finite, is not perturbed. Logs ``adversarial_loss`` (without w) where there is a logger.

    The utility of the same name that goes round edits the embedding table by its ``.grad`` between two backward passes:
    under Lightning, which zeroes gradients after ``training_step``, it loses the first; one norm is shared by all words
    of the batch; and a frozen table cannot be perturbed. None of this holds here.

    Args:
        epsilon: ε; 1 in common use. The paper has 5 on embeddings normalised to variance 1.
        weight: w; 1 in the paper.
        dropout: ``"shared"``, so that r is the worst direction of just the network that is perturbed; or
            ``"independent"`` masks in the second pass, as two plain forward passes have.
        inputs: Which embeddings are perturbed, and which tokens are left alone; padding always is.

    Raises:
        ValueError: An argument is out of range; see :class:`~lightning_ft.callbacks.R3F`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FGM(0.5)], logger=False)

    Reference:
        Miyato, Dai and Goodfellow 2017, "Adversarial Training Methods for Semi-Supervised Text Classification".
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        *,
        weight: float = 1.0,
        dropout: Dropout = "shared",
        inputs: TokenInputs | None = None,
    ) -> None:
        check(None, dropout, epsilon=epsilon, weight=weight)
        self.epsilon, self.weight = epsilon, weight
        self.dropout: Dropout = dropout
        self.inputs = as_token_inputs(inputs)
        self._perturbing = Perturbing(self, self._method)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.weight:
            self._perturbing.attach(trainer, pl_module, self.inputs)

    def _method(self) -> Method:
        return fgm(self._perturbing.words, self.epsilon, weight=self.weight, dropout=self.dropout)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._perturbing.release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._perturbing.release()
