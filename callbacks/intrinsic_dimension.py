"""Fine-tuning in a random subspace of few dimensions."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._altering import Altering
from lightning_ft.callbacks._split_rates import SplitRates, own_rates
from lightning_ft.callbacks._trainer import WindowTracker, refuse_deepspeed, refuse_sharded, run_seed
from lightning_ft.core.layers import Layers, plain_layers
from lightning_ft.functional.intrinsic_dimension import Subspace, subspace_of


class IntrinsicDimension(Callback):
    """Train θ = θ⁰ + λₜ Pₜ v: frozen weights, and a short vector v that a fixed random P spreads over all of them.

    See :func:`lightning_ft.functional.intrinsic_dimension.restrict_to_subspace` for what is altered, at ``setup`` or at
    the end of ``configure_model``, and :class:`~lightning_ft.functional.intrinsic_dimension.FastFood` for P. Just
    ``dimension`` values train, and the head; with SAID, m of them are scales λ of the m tensors. A checkpoint holds
    these, the seed and the head. The smallest dimension that reaches 90 % of the full score, d₉₀, is what
    ``lightning-ft intrinsic_dimension`` looks for.

    P keeps lengths, E‖Pv‖² = ‖v‖²: a step of η in each of d values moves each of a tensor's D weights by η √(d/D) or
    so, and v wants a learning rate that is larger by √(D/d) than that of full fine-tuning. Weights are computed once an
    optimiser step, also where gradients are accumulated or layers read a weight twice, and once a validation.

    The authors' code differs: its backward pass scales the gradient by 1/n, another factor for each size of tensor, and
    it cuts off what a tensor smaller than v has no room for.

    Args:
        dimension: d, the values that train outside the head.
        said: Structure-aware (SAID): a scale for each tensor; d must exceed their number.
        rate: Highest learning rate of v and λ, which follows the optimiser's schedule, without weight decay; None for
            the optimiser's own.
        seed: Of the projections; that of ``seed_everything`` by default, else 0.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Raises:
        ValueError: An argument is out of range; sharded weights.

    Example:
        >>> IntrinsicDimension(1000).dimension
        1000

    Reference:
        Aghajanyan, Gupta and Zettlemoyer 2021, "Intrinsic Dimensionality Explains the Effectiveness of Language Model
        Fine-Tuning".
    """

    def __init__(
        self,
        dimension: int,
        *,
        said: bool = True,
        rate: float | None = None,
        seed: int | None = None,
        layers: Layers | None = None,
    ) -> None:
        if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 1:
            raise ValueError(f"dimension={dimension!r} must be a whole number of 1 or more: how many values train")
        if rate is not None and not rate > 0:
            raise ValueError(f"rate={rate!r} must be a learning rate above 0, or None for the optimiser's own")
        self.dimension = dimension
        self.said = said
        self.rate = rate
        self.seed = seed
        self.layers = layers
        self._altering: Altering | None = None
        self._subspace: Subspace | None = None
        self._window = WindowTracker()
        self._handles: list[RemovableHandle | SplitRates] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        settings = {
            "dimension": self.dimension,
            "said": self.said,
            "seed": run_seed(self.seed),
            "layers": plain_layers(self.layers),
        }
        self._release()
        self._altering = Altering("intrinsic_dimension", settings)
        self._altering.setup(trainer, pl_module, lambda: self._found(pl_module))

    def _found(self, module: LightningModule) -> None:
        self._subspace = subspace_of(module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        refuse_sharded(trainer, self)
        assert self._subspace is not None
        self._window = WindowTracker()
        moment = self._subspace.moment
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_step_post_hook"):
                self._handles.append(optimizer.register_step_post_hook(lambda *_: moment.drop()))
        if self.rate is not None:
            rates = dict.fromkeys(self._subspace.parameters(), self.rate)
            self._handles += own_rates("IntrinsicDimension", trainer.optimizers, rates)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._altering is not None and self._altering.report is not None:
            rank_zero_info(str(self._altering.report))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._window.begins(trainer, batch_idx):
            self._begin()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self._subspace is not None
        self._subspace.moment.drop()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # Here, when whoever exchanges weights for a validation has done so.
        if batch_idx == 0:
            self._begin()

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._begin()

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._begin()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In the middle of an accumulation window the next batch computes for itself.
        self._begin()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _begin(self) -> None:
        assert self._subspace is not None
        self._subspace.moment.begin()

    def _end(self) -> None:
        if self._subspace is not None:
            self._subspace.moment.end()

    def _release(self) -> None:
        self._end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._altering is not None:
            self._altering.release()
        self._subspace = None
