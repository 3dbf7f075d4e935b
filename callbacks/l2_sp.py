"""L2-SP: pull the weights towards the pretrained ones instead of towards zero."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ft.callbacks._anchoring import Anchoring, pretrained_and_new, warn_without_head
from lightning_ft.callbacks._quadratic_pull import Mode, QuadraticPull, Term
from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.core.anchor import Storage
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report


class L2SP(Callback):
    """Penalise the distance to the pretrained weights: Ω = (α/2) ‖θ − θ⁰‖² + (β/2) ‖θ_head‖².

    θ are the weights of embeddings, blocks and tail that train when the fit starts, θ⁰ their values before any
    checkpoint is restored, θ_head the new head. ``coupled``, the paper's form, adds the gradient of Ω in
    ``on_before_optimizer_step``: once an optimiser step whatever the accumulation, after unscaling and DDP's
    reduction, before clipping (which sees it). ``decoupled`` moves θ beside the optimiser, θ ← θ − ηα(θ − θ⁰), only
    when it really stepped. Under plain SGD both differ by η²α times the gradient only, since θ is pulled where the
    step left it; under Adam the coupled gradient is rescaled by 1/√v, and the decoupled pull per step is ηα: at
    η = 2e-5 the paper's α = 0.1 does nothing, and 50 matches its 1e-3 a step. ``pull_rate=1e-3`` says that directly.

    Under FSDP2 (ModelParallelStrategy) each process anchors and pulls its own part of the weights.

    AdamW's own weight decay pulls towards zero at the same time: set it to 0 for a pure pull.

    Logs ``l2_sp`` (Ω) every ``log_every_n_steps`` steps where the trainer has a logger. When training ends,
    ``report`` and a line tell the mean pull per step and the total contraction Π(1 − ηα): what is left of a distance
    that nothing else changed. (For ``coupled`` that is SGD's; Adam rescales it.)

    Args:
        strength: α.
        mode: ``"coupled"`` or ``"decoupled"``.
        pull_rate: Instead of ``strength``, for ``"decoupled"``: the share of the way back to θ⁰ that one step goes at
            the optimiser's base learning rate, ηα; it follows the schedule. The paper's is 1e-3.
        head_strength: β; 0 leaves the head to the optimiser's weight decay. The paper takes α = 0.1, β = 0.01.
        kernels_only: Leave out biases and norms (tensors of fewer than two dimensions), as the paper does.
        layers: Where the blocks and the head are, if they are not found by themselves; ``Layers(head=[])`` where there
            is no new head, as in a language model with a tied one. The group named ``head`` has no anchor, and neither
            have layers that LayerReinit drew anew: they count as head.
        storage: Where θ⁰ is kept: ``"device"`` (beside θ: the fastest), ``"bf16"`` (there, at half the size, rounded),
            ``"cpu"`` (main memory), ``"disk"`` (memory-mapped, from the pretrained checkpoint itself where it is
            known). Callbacks that need θ⁰ share it: say it in one of them; by default ``"device"``.

    Raises:
        ValueError: An argument is out of range; the pull ηα is 1 or more; nothing is there to anchor; on resume,
            the model does not start from the weights that the interrupted run was anchored to; FSDP1 or DeepSpeed.

    Example:
        >>> L2SP(0.01).mode
        'coupled'
        >>> L2SP(pull_rate=1e-3, mode="decoupled").strength
        0.001

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks".
    """

    def __init__(
        self,
        strength: float | None = None,
        mode: Mode = "coupled",
        *,
        pull_rate: float | None = None,
        head_strength: float = 0.0,
        kernels_only: bool = True,
        layers: Layers | None = None,
        storage: Storage | None = None,
    ) -> None:
        if (strength is None) == (pull_rate is None):
            raise ValueError(
                f"strength={strength!r} and pull_rate={pull_rate!r}: give one of them, strength=0.01 (α) or "
                'pull_rate=1e-3 (ηα, for mode="decoupled")'
            )
        if pull_rate is not None and mode != "decoupled":
            raise ValueError(
                f'pull_rate={pull_rate!r} is of a pull beside the step: write mode="decoupled", or strength instead'
            )
        for argument, value in {"strength": strength, "pull_rate": pull_rate, "head_strength": head_strength}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{argument}={value!r} must be 0 or more")
        self.strength: float = pull_rate if strength is None else strength  # type: ignore[assignment]
        self.mode = mode
        self.per_step = strength is None
        self.head_strength = head_strength
        self.kernels_only = kernels_only
        self.layers = layers or Layers()
        self.report: Report | None = None
        self._pull = QuadraticPull("L2SP", mode)
        self._anchoring = Anchoring(self, lambda module: self._split(module)[0], storage)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._pull.reset()
            self._anchoring.watch(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._anchoring.restoring()

    def _split(self, module: LightningModule) -> tuple[list[tuple[str, nn.Parameter]], list[nn.Parameter]]:
        body, head = pretrained_and_new(self, module, self.layers)
        kept = [(name, p) for name, p in body if p.ndim >= 2 or not self.kernels_only]
        return kept, [p for _, p in head if p.ndim >= 2 or not self.kernels_only]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        body, head = self._split(pl_module)
        warn_without_head(self, pl_module, self.layers)
        references = self._anchoring.take(body).like(body)
        pull = Term([p for _, p in body], self.strength, references, per_step=self.per_step)
        self._pull.start(trainer, [pull, Term(head, self.head_strength)])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._anchoring.recheck(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._pull.before_step(trainer, pl_module, optimizer, "l2_sp")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = self._pull.report()
        rank_zero_info(str(self.report))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._pull.release()
        self._anchoring.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._anchoring.fingerprint, "pull": self._pull.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._anchoring.fingerprint = state_dict["fingerprint"]
        self._pull.load(state_dict["pull"])
