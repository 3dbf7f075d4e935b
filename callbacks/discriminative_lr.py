"""Discriminative learning rates: the lower the layer, the smaller its steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ft.callbacks._split_rates import SplitRates
from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.layers import Layers
from lightning_ft.functional.learning_rates import check_rate, depth_multipliers, explicit_multipliers


class DiscriminativeLR(Callback):
    """Multiply each parameter's learning rate by ``decay`` once for each block above it, or by a factor of its own.

    The factors are those of :func:`lightning_ft.functional.depth_multipliers`, and of ``rates`` where it speaks of a
    group. They work on any optimiser and under any scheduler: the optimiser's groups are split by depth only while
    ``step()`` runs (a pre- and a post-hook), so its groups, its state dict and its schedulers stay its own. What a
    learning-rate monitor shows is the rate of the head; the factors are logged once, in ``on_train_start``, as
    ``lr_factor/<group>``. AdamW multiplies its weight decay by the rate, so lower layers decay less, too.

    Embeddings tied to an output layer have the embeddings' factor: ``rates={"embeddings": 1.0}`` gives them another.

    Between the two hooks (in fp32 that includes ``training_step`` and ``on_before_optimizer_step``) code that
    writes to ``optimizer.param_groups`` writes to the split ones: change rates through a scheduler.

    Args:
        decay: Factor from one block to the block below, in (0, 1]: 0.8 to 0.95 for transformers; ULMFiT's is 1/2.6
            (0.3846), for 4 groups; 1 leaves every group that ``rates`` does not name at the optimiser's rate.
        head_gap: Exponent of the top block: 1 (ULMFiT, BEiT) or 2 (ELECTRA's code).
        rates: Factors written out, instead of those of ``decay``: what
            :meth:`~lightning_ft.core.LayerGroups.select` takes (``"embeddings"``, ``"top:2"``,
            ``"block.0..block.3"``) to a factor above 0.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Raises:
        ValueError: An argument is out of range; ``rates`` names no group, or one twice; one block is run at several
            depths (ALBERT), where ``decay`` means nothing; an optimiser holds a parameter that is not the module's.
        TypeError: The optimiser is LBFGS, which has one rate for all.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = DiscriminativeLR(0.9, rates={"embeddings": 0.1, "head": 10.0})
        >>> trainer = Trainer(callbacks=[callback], logger=False)

    Reference:
        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification".
    """

    def __init__(
        self,
        decay: float = 0.9,
        *,
        head_gap: int = 1,
        rates: Mapping[str, float] | None = None,
        layers: Layers | None = None,
    ) -> None:
        depth_multipliers(["head"], decay=decay, head_gap=head_gap)  # refuses bad numbers now
        for what, factor in (rates or {}).items():
            check_rate(what, factor)
        self.decay = decay
        self.head_gap = head_gap
        self.rates = dict(rates or {})
        self.layers = layers or Layers()
        self._factors: dict[str, float] = {}
        self._splits: list[SplitRates] = []

    def groups(self, module: LightningModule) -> LayerGroups:
        """The layer groups of this module, as this callback sees them."""
        return self.layers.of(module)

    def multipliers(self, module: LightningModule, groups: LayerGroups | None = None) -> dict[str, float]:
        """The factor of each layer group of this module, bottom to top. ``groups``: if they are found already."""
        groups = groups or self.groups(module)
        if groups.shared and self.decay != 1:
            raise ValueError(
                f"decay={self.decay} falls from block to block, and this model runs {', '.join(groups.shared)} at "
                "several depths with the same weights: give decay=1 and the factors as rates={'embeddings': ...}"
            )
        factors = depth_multipliers(groups.names, decay=self.decay, head_gap=self.head_gap)
        return factors | explicit_multipliers(groups, self.rates)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        groups = self.groups(pl_module)
        self._factors = self.multipliers(pl_module, groups)
        factors = {id(p): self._factors[name] for name in groups for p in groups.parameters(name)}
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise TypeError("DiscriminativeLR needs an optimiser with parameter groups, and LBFGS has one rate")
            _refuse_strange(optimizer, factors)
            self._splits.append(SplitRates(optimizer, factors))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            factors = {f"lr_factor/{name}": factor for name, factor in self._factors.items()}
            logger.log_metrics(factors, step=trainer.global_step)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for split in self._splits:
            split.remove()
        self._splits.clear()


def _refuse_strange(optimizer: Optimizer, factors: Mapping[int, float]) -> None:
    strange = sum(id(p) not in factors for group in optimizer.param_groups for p in group["params"])
    if strange:
        raise ValueError(
            f"{type(optimizer).__name__} holds {strange} parameters that are not the LightningModule's, so they "
            "have no depth: register their module as an attribute of the LightningModule"
        )
