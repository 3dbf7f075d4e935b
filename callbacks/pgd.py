"""PGD: several steps towards the words that the model handles worst."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ft.callbacks._perturbable import check
from lightning_ft.callbacks._perturbing import Perturbing
from lightning_ft.core.token_inputs import TokenInputs, as_token_inputs
from lightning_ft.functional.fgm import pgd
from lightning_ft.functional.passes import Method
from lightning_ft.functional.r3f import Dropout


class PGD(Callback):
    """Train on L(x) + w · L(x + r_K), with rₖ₊₁ = Π(rₖ + α gₖ/‖gₖ‖₂), gₖ = ∂L(x + rₖ)/∂rₖ and r₀ = 0.

    x are the embedded tokens, norms are those of each example, Π projects to the ball of radius ε. Only the first and
    the last pass teach the model; :class:`~lightning_ft.callbacks.FreeLB` learns from all of them. While the fit runs
    ``training_step`` is stood in for: it runs K + 1 times on a batch, see :class:`~lightning_ft.callbacks.FGM`, which
    is this with K = 1 and α = ε. Logs ``adversarial_loss`` (without w) where the trainer has a logger.

    Args:
        epsilon: ε; 1 in common use.
        step_size: α; 0.3 in common use.
        steps: K; 3 in common use.
        weight: w.
        dropout: ``"shared"`` masks in all passes, or ``"independent"`` ones.
        inputs: Which embeddings are perturbed, and which tokens are left alone; padding always is.

    Raises:
        ValueError: An argument is out of range; see :class:`~lightning_ft.callbacks.R3F`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PGD(0.5, 0.2)], logger=False)

    Reference:
        Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks".
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        step_size: float = 0.3,
        *,
        steps: int = 3,
        weight: float = 1.0,
        dropout: Dropout = "shared",
        inputs: TokenInputs | None = None,
    ) -> None:
        check(None, dropout, epsilon=epsilon, step_size=step_size, weight=weight)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} must be a whole number, 1 or more")
        self.epsilon, self.step_size, self.steps, self.weight = epsilon, step_size, steps, weight
        self.dropout: Dropout = dropout
        self.inputs = as_token_inputs(inputs)
        self._perturbing = Perturbing(self, self._method)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.weight:
            self._perturbing.attach(trainer, pl_module, self.inputs)

    def _method(self) -> Method:
        return pgd(
            self._perturbing.words,
            self.epsilon,
            self.step_size,
            self.steps,
            weight=self.weight,
            dropout=self.dropout,
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._perturbing.release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._perturbing.release()
