"""FreeLB: adversarial training that learns from every step of the ascent."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ft.callbacks._perturbable import check
from lightning_ft.callbacks._perturbing import Perturbing
from lightning_ft.core.token_inputs import TokenInputs, as_token_inputs
from lightning_ft.functional.free_lb import free_lb
from lightning_ft.functional.passes import Method


class FreeLB(Callback):
    """Train on 1/K Σₖ L(x + δₖ), with δₖ₊₁ = Π(δₖ + α gₖ/‖gₖ‖_F) and gₖ = ∂L(x + δₖ)/∂δₖ.

    x are the embedded tokens, δ₀ ~ U(−1, 1)·m/√(Ld) on the L real tokens of an example (d wide, padding 0), ‖·‖_F is
    over an example's whole sequence and Π projects to the ball of radius ``max_norm``. All K passes have the same
    dropout masks.

    While the fit runs ``training_step`` is stood in for: it runs K times on a batch, after the first time without
    logging (what it logs is the loss at δ₀), and returns the mean of its losses. As the authors do, each pass is
    differentiated once, for δ and the weights together, before the next one runs: K forward and K backward passes, the
    memory of one, and a second set of gradients. Those of the weights are handed on when the mean is differentiated, in
    the one backward pass that accumulation, clipping and DDP see. Where gradients are better not taken ahead of time
    (fp16, FSDP2, weights with hooks on their gradient) all K graphs are kept, and K − 1 backward passes more go as far
    as δ. In manual optimisation the first loss that is given to ``manual_backward`` is replaced.

    Logs ``adversarial_loss`` (of the last pass) where the trainer has a logger.

    Args:
        step_size: α; in the authors' scripts 0.1 for SST-2 and STS-B, 0.04 for CoLA and MNLI, 0.03 for MRPC and RTE.
        steps: K; 2 for SST-2, 3 or 4 elsewhere.
        magnitude: m; 0.6 for SST-2, 0.2 for STS-B, 0.08 for MNLI, 0.05 for CoLA, 0 for MRPC.
        max_norm: Radius of the ball; 0 for none, as in most scripts.
        inputs: Which embeddings are perturbed, and which tokens are left alone; padding always is.

    Raises:
        ValueError: An argument is out of range; see :class:`~lightning_ft.callbacks.R3F`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FreeLB(0.03, 4, magnitude=0.0)], logger=False)

    Reference:
        Zhu et al. 2020, "FreeLB: Enhanced Adversarial Training for Natural Language Understanding".
    """

    def __init__(
        self,
        step_size: float = 0.1,
        steps: int = 2,
        *,
        magnitude: float = 0.6,
        max_norm: float = 0.0,
        inputs: TokenInputs | None = None,
    ) -> None:
        check(step_size=step_size, magnitude=magnitude, max_norm=max_norm)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} must be a whole number, 1 or more")
        self.step_size, self.steps = step_size, steps
        self.magnitude, self.max_norm = magnitude, max_norm
        self.inputs = as_token_inputs(inputs)
        self._perturbing = Perturbing(self, self._method)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._perturbing.attach(trainer, pl_module, self.inputs)

    def _method(self) -> Method:
        return free_lb(
            self._perturbing.words, self.step_size, self.steps, magnitude=self.magnitude, max_norm=self.max_norm
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._perturbing.release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._perturbing.release()
