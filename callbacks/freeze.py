"""Train a part of the model for the whole fit: the head alone, the top blocks, the biases; or freeze a part."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_ft.callbacks._freezing import Freezing
from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.callbacks.gradual_unfreezing import GradualUnfreezing
from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.layer_groups import LayerGroups, Named
from lightning_ft.core.layers import Layers

_MATCHED = "matching parameters"


class Freeze(Callback):
    r"""Keep a part of the model from training, from the first step to the last.

    Say what goes on training (``keep``) or what does not (``groups``), and beside it which parameters of the frozen
    groups train all the same (``parameters``):

    - the last layer only, or linear probing by gradient descent: ``Freeze("head")``;
    - the last k blocks: ``Freeze(["top:2", "tail", "head"])``;
    - embeddings fixed: ``Freeze(groups="embeddings")``;
    - BitFit, biases and the head: ``Freeze("head", parameters=r"(^|\.)bias$")``. The last component of the name must
      be exactly ``bias``: T5's ``relative_attention_bias.weight`` is a matrix of position weights.

    It freezes in ``on_train_start``, when the optimisers exist, so that also an optimiser built from the trainable
    parameters alone holds all of them, and wraps a DDP model anew. A frozen parameter gets no gradient and no
    optimiser state. What was frozen before stays frozen; after the fit, what this callback froze is trainable again.
    Listed before :class:`GradualUnfreezing`, it takes what it froze out of that one's phases.

    Args:
        keep: Layer groups that train: what :meth:`~lightning_ft.core.LayerGroups.select` takes.
        groups: Layer groups that freeze, in place of ``keep``.
        parameters: Regular expressions (``re.search``) on names as in ``module.named_parameters()``: what matches one
            of them trains, whichever group it is in. Alone, nothing else trains.
        eval_mode: Put modules whose parameters are all frozen into eval mode, so that they drop nothing: their outputs
            then depend on their inputs alone. By default they keep their mode, and with it their dropout.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Raises:
        ValueError: Not exactly one way to say what trains; a selection or an expression matches nothing; nothing is
            left that trains; ``GradualUnfreezing`` is listed before it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Freeze("head", parameters=r"(^|\.)bias$")], logger=False)

    Reference:
        Ben Zaken, Goldberg and Ravfogel 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
        Masked Language-models" (``parameters``).
    """

    def __init__(
        self,
        keep: str | Sequence[str] | None = None,
        *,
        groups: str | Sequence[str] | None = None,
        parameters: str | Sequence[str] | None = None,
        eval_mode: bool = False,
        layers: Layers | None = None,
    ) -> None:
        if (keep is not None and groups is not None) or (keep is None and groups is None and parameters is None):
            raise ValueError(
                f'keep={keep!r}, groups={groups!r}: say either what trains, Freeze(keep="head"), or what freezes, '
                'Freeze(groups="embeddings"); parameters= may stand beside either, or alone'
            )
        self.keep = keep
        self.frozen = groups
        self.patterns = [re.compile(p) for p in ([parameters] if isinstance(parameters, str) else parameters or ())]
        self.eval_mode = eval_mode
        self.layers = layers or Layers()
        self._freezing: Freezing | None = None
        self._modes: list[nn.Module] = []

    def groups(self, module: LightningModule) -> LayerGroups:
        """The layer groups of this module, as this callback sees them."""
        return self.layers.of(module)

    def plan(self, module: LightningModule, groups: LayerGroups | None = None) -> FreezePlan:
        """What trains, as one phase; what ``parameters`` picks out is a group of its own. Nothing is frozen yet.

        Args:
            module: The module.
            groups: Its layer groups, if they are found already.
        """
        groups = groups or self.groups(module)
        trains = self._trains(groups)
        matched = self._matched(module)
        parts: dict[str, list[Named]] = {
            name: [pair for pair in groups.named_parameters(name) if name in trains or pair[1] not in matched]
            for name in groups
        }
        parts[_MATCHED] = [
            pair
            for name in groups
            if name not in trains
            for pair in groups.named_parameters(name)
            if pair[1] in matched
        ]
        split = LayerGroups(module, parts)
        return FreezePlan(split, [[name for name in split if name in (*trains, _MATCHED)]])

    def _trains(self, groups: LayerGroups) -> Sequence[str]:
        if self.frozen is not None:
            fixed = groups.select(self.frozen)
            return [name for name in groups if name not in fixed]
        return [] if self.keep is None else groups.select(self.keep)

    def _matched(self, module: nn.Module) -> set[nn.Parameter]:
        # Under every name of a tied weight. Parameters hash and compare by identity in a set.
        named = list(module.named_parameters(remove_duplicate=False))
        for pattern in self.patterns:
            if not any(pattern.search(name) for name, _ in named):
                some = ", ".join(name for name, _ in named[:5])
                raise ValueError(f"parameters: {pattern.pattern!r} matches no parameter; there are: {some}, ...")
        return {p for name, p in named if any(pattern.search(name) for pattern in self.patterns)}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        if trainer.strategy.restore_checkpoint_after_setup and trainer.ckpt_path is not None:
            # Sharded strategies refuse the optimiser states of a run in which other parameters trained.
            self._freezing = Freezing(type(self).__name__, self.plan(pl_module))
            self._freezing.plan.apply(0)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, GradualUnfreezing) for callback in callbacks[: callbacks.index(self)]):
            raise ValueError(
                "GradualUnfreezing, listed before Freeze, would thaw what Freeze freezes: list Freeze before it"
            )
        # GradualUnfreezing, listed behind, freezes more.
        self._freezing = Freezing(type(self).__name__, self.plan(pl_module), shared=True)
        self._freezing.enter(trainer, 0)
        if self.eval_mode:
            self._modes = [m for top in _frozen_modules(pl_module) for m in top.modules() if m.training]
            for module in self._modes:
                module.training = False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._freezing is not None:
            self._freezing.finish(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for module in self._modes:
            module.training = True
        self._modes.clear()
        if self._freezing is not None:
            self._freezing.release()
            self._freezing = None


def _frozen_modules(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that have parameters, none of which trains."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return [module]
    return [found for child in module.children() for found in _frozen_modules(child)]
