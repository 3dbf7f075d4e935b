"""SMART: the same answer in the worst direction nearby, and small steps from one iterate to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._perturbable import answer_of, check
from lightning_ft.callbacks._perturbing import Perturbing
from lightning_ft.callbacks._trainer import refuse_sharded, training_progress
from lightning_ft.callbacks._weight_average import WeightAverage
from lightning_ft.core.schedule import Duration
from lightning_ft.core.token_inputs import TokenInputs, as_token_inputs
from lightning_ft.core.undisturbed import eval_mode
from lightning_ft.functional.found_logits import Logits
from lightning_ft.functional.passes import Method
from lightning_ft.functional.r3f import Dropout
from lightning_ft.functional.smart import Ascent, smart, uncached_no_grad
from lightning_ft.functional.snapshots import Answer, holding


class SMART(Callback):
    """Train on L + λ · mean max ℓ(f(x + δ), f(x)) over ‖δ‖_∞ ≤ ε, + μ · mean ℓ(f(x; θ), f(x; θ̃)).

    ℓ is the symmetric KL of two answers (the squared difference for regression), x are the embedded tokens. δ starts
    from N(0, σ²) and climbs δ ← clip(δ + η g/‖g‖_∞, ±ε), ‖·‖_∞ over an example, by ∂ℓ/∂δ alone. θ̃ is a moving average
    of the weights, θ̃ ← βθ̃ + (1 − β)θ after each real optimiser step (an fp16 overflow is none), with β = 0.99 in the
    first tenth of training and 0.999 after it; it lives in fp32 beside the model, outside the optimiser, and travels in
    the callback's state, so that a resumed run goes on exactly. What no optimiser holds is the same in both.

    While the fit runs ``training_step`` is stood in for, see :class:`~lightning_ft.callbacks.R3F`: it runs as it is,
    and the calls that it made of the model are repeated: with δ for the ascent, with the worst δ, and without gradients
    under θ̃. That is steps + 2 more forward passes and as many backward passes as there are steps.

    Logs ``smart`` and ``bregman`` (without λ and μ) where the trainer has a logger.

    Args:
        weight: λ; the paper takes 1 to 5.
        mu: μ; 1 in the paper, and the default; 0, the default with ``mtdnn_compat``, keeps no θ̃.
        ascent: ε, σ, η and the number of steps: 1e-5, 1e-5, 1e-3 and 1 in the paper.
        betas: β before and after ``switch``.
        switch: When β changes: a fraction of training, ``"500 steps"`` or ``"1 epochs"``.
        dropout: ``"independent"``: new masks in each further pass, none (eval mode) under θ̃; ``"shared"``: those of the
            step itself in all of them.
        mtdnn_compat: Run what the authors' mt-dnn repository runs: δ ← (δ + η g)/max|δ + η g| of each token, which is
            near 1 and not near ε, up a divergence that is not KL; each side of the final KL a constant target of the
            other; no θ̃. (Its padding is perturbed, too; here it is not.)
        logits: Where they are, see :class:`~lightning_ft.callbacks.R3F`.
        answer: What they mean, see there.
        inputs: Which embeddings are perturbed, and which tokens are left alone; padding always is.

    Raises:
        ValueError: An argument is out of range; see :class:`~lightning_ft.callbacks.R3F`; weights are sharded, with μ
            above 0; on resume, other parameters train.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SMART(3.0)], max_epochs=3, logger=False)

    Reference:
        Jiang et al. 2020, "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through
        Principled Regularized Optimization".
    """

    def __init__(
        self,
        weight: float = 1.0,
        mu: float | None = None,
        *,
        ascent: Ascent | None = None,
        betas: tuple[float, float] = (0.99, 0.999),
        switch: float | str = 0.1,
        dropout: Dropout = "independent",
        mtdnn_compat: bool = False,
        logits: Logits = None,
        answer: Answer | None = None,
        inputs: TokenInputs | None = None,
    ) -> None:
        self.ascent = ascent or Ascent()
        self.mtdnn_compat = mtdnn_compat
        self.mu = (0.0 if mtdnn_compat else 1.0) if mu is None else mu
        check(answer, dropout, weight=weight, mu=self.mu)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas!r} must be two numbers in [0, 1): (0.99, 0.999) in the paper")
        self.weight = weight
        self.betas = tuple(betas)
        self.switch = Duration.parse(switch, "switch")
        self.dropout: Dropout = dropout
        self.logits = logits
        self.answer = answer
        self.inputs = as_token_inputs(inputs)
        self._perturbing = Perturbing(self, self._method)
        self._average: WeightAverage | None = None
        self._loaded: dict[str, Tensor] | None = None
        self._beta = self.betas[0]
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._average, self._loaded = None, None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mu:
            refuse_sharded(trainer, self)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        self._answer = answer_of(pl_module, self.answer)
        if self.mu:
            self.switch.share(training_progress(trainer, 0))  # refuses a fraction of an endless training
            self._start_average(trainer, pl_module)
        if self.weight or self.mu:
            self._perturbing.attach(trainer, pl_module, self.inputs, reads_logits=True, logits=self.logits)

    def _start_average(self, trainer: Trainer, module: LightningModule) -> None:
        self._average = average = WeightAverage(trainer, module)
        average.update(1.0, None if self._loaded is None else average.parts(self._loaded))
        self._loaded = None
        index = {parameter: i for i, parameter in enumerate(average.parameters)}
        for optimizer in trainer.optimizers:
            held = [index[p] for group in optimizer.param_groups for p in group["params"] if p in index]
            self._handles.append(optimizer.register_step_post_hook(self._hook(held)))

    def _hook(self, held: list[int]) -> Any:
        def update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # Fused optimisers under an fp16 scaler run a step that overflowed, too, and skip it inside, by this flag.
            overflow = getattr(optimizer, "found_inf", None)
            if self._average is not None and not (overflow is not None and bool(overflow)):
                self._average.update(1 - self._beta, members=held)

        return update

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.mu:
            late = self.switch.share(training_progress(trainer, batch_idx)) >= 1
            self._beta = self.betas[late]

    def _method(self) -> Method:
        return smart(
            self._perturbing.words,
            self.weight,
            self.mu,
            ascent=self.ascent,
            average=self._averaged,
            dropout=self.dropout,
            answer=self._answer,
            mtdnn_compat=self.mtdnn_compat,
        )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        average, module = self._average, self._perturbing.module
        assert average is not None
        assert average.mean is not None
        assert module is not None
        values = {name: mean for names, mean in zip(average.names, average.mean, strict=True) for name in names[:1]}
        modes = nullcontext() if self.dropout == "shared" else eval_mode(module.modules())
        with holding(module, values), modes, uncached_no_grad(module.device):
            yield

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._perturbing.release()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._average is None or self._average.mean is None:
            return {"mean": self._loaded}
        return {"mean": self._average.whole(self._average.mean)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["mean"]
