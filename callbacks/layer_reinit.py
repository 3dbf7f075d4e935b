"""Re-initialisation of the top layers before fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_ft.callbacks._surgery import when_built
from lightning_ft.callbacks._trainer import run_seed
from lightning_ft.core.fresh import mark_fresh
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional.reinit import reinit_layers, reinit_targets


class LayerReinit(Callback):
    """Draw the weights of the top blocks, and of the pooler, anew before training starts.

    What :func:`lightning_ft.functional.reinit.reinit_layers` does, in ``setup("fit")``, or at the end of
    ``configure_model`` for a model that is built or loaded late: before a checkpoint is restored, before the model is
    wrapped and before optimisers are made. A resumed run has the weights of its checkpoint, and a trainer that goes on
    training draws nothing. No number is taken from the global generators, and all ranks draw the same.

    ``L2SP`` does not pull the new layers towards the values that they lost: it counts them as part of the head.

    Args:
        top: Number of blocks from the top; the paper tries 1 to 6. 0 for none.
        groups: Instead of ``top``, group names, ranges or patterns, as ``"block.2..block.5"``; in an encoder-decoder
            ``top`` counts in the decoder.
        pooler: Also the pooler, where there is one, as the paper does; or the path of the module that is it.
        init: Draws the parameters that a module itself holds; instead of the model's own scheme.
        seed: Seed of the draw; that of ``seed_everything`` by default, else 0.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Attributes:
        report: What was drawn in this fit; None where a checkpoint took its place.

    Raises:
        ValueError: Whatever :func:`lightning_ft.functional.reinit.reinit_layers` refuses.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LayerReinit(top=2)], logger=False)

    Reference:
        Zhang, Wu, Katiyar, Weinberger and Artzi 2021, "Revisiting Few-sample BERT Fine-tuning".
    """

    def __init__(
        self,
        top: int = 1,
        *,
        groups: str | Sequence[str] | None = None,
        pooler: bool | str = True,
        init: Callable[[nn.Module], None] | None = None,
        seed: int | None = None,
        layers: Layers | None = None,
    ) -> None:
        if top < 0:
            raise ValueError(f"top={top} must be a number of blocks, 0 or more")
        self.top = top
        self.groups = groups
        self.pooler = pooler
        self.init = init
        self.seed = seed
        self.layers = layers or Layers()
        self.report: Report | None = None
        self._fresh: list[nn.Module] = []
        self._forget: Callable[[], None] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.report = None
            self._forget = when_built(pl_module, lambda: self._reinit(trainer, pl_module))

    def _reinit(self, trainer: Trainer, module: LightningModule) -> None:
        chosen: dict[str, Any] = {"groups": self.groups, "pooler": self.pooler, "layers": self.layers}
        if trainer.global_step == 0:
            seed = run_seed(self.seed)
            self.report = reinit_layers(module, self.top, **chosen, init=self.init, seed=seed)
        self._fresh = [module.get_submodule(path) for path in reinit_targets(module, self.top, **chosen)]
        mark_fresh(self._fresh)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.report = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.report is not None:
            rank_zero_info(f"LayerReinit: {self.report}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        # Trained, they are an anchor for the next fit like any other layer.
        mark_fresh(self._fresh, False)
        self._fresh = []
        if self._forget is not None:
            self._forget()
            self._forget = None
