"""Gradients of the mean over all tokens of an optimiser step, however they fall into batches and processes."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

# A constant, so that all ranks and a resumed run divide by the same number; a power of two, so that dividing by it
# changes no bit of the result; about the tokens of a small batch, so that fp16's range serves.
_REFERENCE = 1024.0


class TokenMean:
    """Weighs micro-batches by their number of items, so that accumulation and DDP average over items.

    Lightning averages micro-batches, and DDP ranks: a batch with two tokens then counts as much as one with two
    thousand, and a last window of fewer batches counts less. Here the backward pass runs on Σ lossₜ / 1024, and after
    the last one of a window the gradients are multiplied by 1024·N·W / (items of the window on all ranks), with N
    micro-batches and W processes. With one batch to a step and one process the mean loss is used as it is.

    Example:
        >>> weights = TokenMean()
        >>> weights.loss(LightningModule(), torch.tensor(2.0), torch.tensor(512), 0)  # without a trainer
        tensor(2.)
    """

    def __init__(self) -> None:
        self._items: Tensor | None = None
        self._earlier: Tensor | None = None
        self._batch_idx = -1
        self._last = False
        self.factor: Tensor | float = 1.0
        """What the last mean loss was multiplied by."""

    def loss(self, module: LightningModule, mean: Tensor, items: Tensor | int, batch_idx: int) -> Tensor:
        """What ``training_step`` must return, for the ``mean`` loss over ``items`` tokens or rows."""
        if not _averages(module):
            self.factor = 1.0
            return mean
        items = torch.as_tensor(items, device=mean.device, dtype=torch.float32)
        # A fit that was interrupted may have left a window unfinished.
        begins = batch_idx % module.trainer.accumulate_grad_batches == 0
        # A perturbation method runs the step several times on a batch, whose items count once.
        if begins or batch_idx != self._batch_idx:
            self._earlier, self._batch_idx = None if begins else self._items, batch_idx
        self._items = items if self._earlier is None else self._earlier + items
        self._last = _ends_window(module, batch_idx)
        self.factor = items / _REFERENCE
        return mean * self.factor

    def rescale(self, module: LightningModule) -> None:
        """Call in ``on_after_backward``: turns a window's gradients into those of the mean over its items.

        There, and not in ``on_before_optimizer_step``, because callbacks add their own gradients in that hook, and
        before the module's runs. fp16's scale is still in the gradients, which a factor does not mind.
        """
        if self._items is None or not self._last:
            return
        trainer = module.trainer
        items, self._items = self._items, None
        total = trainer.strategy.reduce(items, reduce_op="sum")
        assert isinstance(total, Tensor)
        factor = _REFERENCE * trainer.accumulate_grad_batches * trainer.world_size / total.clamp(min=1)
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)


def _averages(module: LightningModule) -> bool:
    """Whether Lightning would average over several micro-batches or processes."""
    trainer = module._trainer
    return trainer is not None and (trainer.accumulate_grad_batches > 1 or trainer.world_size > 1)


def _ends_window(module: LightningModule, batch_idx: int) -> bool:
    trainer = module.trainer
    last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    return last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
