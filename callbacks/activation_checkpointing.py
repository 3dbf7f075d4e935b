"""Less memory for activations: blocks are computed again in backward, their inputs kept in main memory if wished."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional.activation_checkpointing import CheckpointedBlocks, chosen_blocks


class ActivationCheckpointing(Callback):
    """Keep of each block its inputs alone for backward, and run it again there.

    Of L blocks with activations of A bytes and inputs of I, L·I + A are held in place of L·A, for one more forward pass
    of the blocks: a third more arithmetic. Gradients are the same to the bit, dropout included. With ``offload`` the
    inputs wait in main memory, and A is left. From ``on_fit_start`` to the end of the fit; the module tree, state dicts
    and checkpoints are as without. It does not matter whether the blocks are in train or eval mode, as it does for
    transformers' own ``gradient_checkpointing_enable()``. Frozen blocks below all that trains keep nothing anyway.

    Works with Mixout (the same units are drawn again), FrozenPrefixCache (what is cached is not run), DDP and FSDP2.
    A model under ``torch.compile`` is compiled anew; ``torch.compile`` can itself recompute within what it compiles.

    Args:
        blocks: Which blocks: ``"all"``, or groups as ``"top:2"``, ``"block.0..block.5"`` or a list of these.
        offload: Keep the inputs of blocks in main memory.
        layers: Where the blocks are, if they are not found by themselves.

    Attributes:
        report: How many blocks it wraps.

    Raises:
        ValueError: ``blocks`` names no block; the model recomputes by itself; in training, a block reads keys and
            values from a cache (prefix tuning).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ActivationCheckpointing()], logger=False)

    Reference:
        Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """

    def __init__(
        self, blocks: str | Sequence[str] = "all", *, offload: bool = False, layers: Layers | None = None
    ) -> None:
        self.blocks = blocks
        self.offload = offload
        self.layers = layers or Layers()
        self.report: Report | None = None
        self._wrapped: CheckpointedBlocks | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        paths = chosen_blocks(pl_module, self.blocks, self.layers)
        blocks = [pl_module.get_submodule(path) for path in paths]
        for path, block in zip(paths, blocks, strict=True):
            # transformers' layers hold a switch of their own.
            if getattr(block, "gradient_checkpointing", False):
                raise ValueError(
                    f"ActivationCheckpointing: {path} recomputes already, and would be run three times: call "
                    "gradient_checkpointing_disable() on the model, or remove this callback"
                )
        self._wrapped = CheckpointedBlocks(blocks, offload=self.offload)
        facts = {"blocks": len(blocks), "inputs kept": "in main memory" if self.offload else "on the device"}
        self.report = Report("Blocks that are computed again in backward", facts)
        rank_zero_info(str(self.report))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._wrapped is not None:
            self._wrapped.remove()
            self._wrapped = None
