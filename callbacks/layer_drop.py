"""LayerDrop: train with random blocks left out, so that blocks can be removed afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_ft.callbacks._trainer import refuse_asleep, refuse_deepspeed, run_seed
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.core.sharding import named_plain_modules, unwrapped
from lightning_ft.functional.layer_drop import DroppableBlocks, draw_dropped


class LayerDrop(Callback):
    """Drop each block with probability p in training: h ← h in place of h ← block(h). None is dropped in eval mode.

    For each batch, in ``on_train_batch_start``, one draw a block, from (seed, epoch, batch, block) alone: the same on
    all ranks, in all calls of that batch, when activation checkpointing runs a block again, and after a resume. Dropped
    blocks have gradients of zero. Nothing is rescaled, as in the paper. The model keeps its structure and the names of
    its parameters.

    Blocks are wrapped as they are, of whichever family
    (:class:`lightning_ft.functional.layer_drop.DroppableBlocks`). One that makes something which all others need, as
    the lowest of a T5, always runs; ``report`` names it. DDP needs no ``find_unused_parameters``; FSDP works, too.

    After training any number of blocks can go with no further tuning, best every other one:
    ``LayerRemoval("alternate")``, or :func:`lightning_ft.functional.layer_removal.remove_layers`.

    Args:
        p: Probability in [0, 1), 0.1 to 0.2 in the paper; or one for each of some groups, up to 1:
            ``{"top:2": 0.2, "block.1": 1.0}``, in what :meth:`~lightning_ft.core.LayerGroups.select` takes.
        seed: Of the draws; that of ``seed_everything`` by default, else 0. A resumed run keeps its checkpoint's.
        layers: Where the blocks are, if they are not found by themselves.

    Attributes:
        report: How often each block was called and dropped, when training has ended.

    Raises:
        ValueError: ``p`` is out of range, or names no block, or one twice; one block stands at all depths (ALBERT); a
            compiled model; a filled cache in train mode; DeepSpeed.
        RuntimeError: A block that trains is in eval mode; no block is called, or none can be dropped.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LayerDrop(0.1)], logger=False)

    Reference:
        Fan, Grave and Joulin 2020, "Reducing Transformer Depth on Demand with Structured Dropout".
    """

    def __init__(
        self, p: float | Mapping[str, float] = 0.1, *, seed: int | None = None, layers: Layers | None = None
    ) -> None:
        if isinstance(p, Mapping):
            if not p or not all(0 <= value <= 1 for value in p.values()):
                raise ValueError(f"p={dict(p)!r} must name groups with a probability in [0, 1] each")
        elif not 0 <= p < 1:
            raise ValueError(f"p={p!r} must be a probability in [0, 1): 0.1 to 0.2 in the paper")
        self.p = p
        self.seed = seed
        self.layers = layers or Layers()
        self.report: Report | None = None
        self._blocks: dict[str, nn.Module] = {}
        self._probabilities: dict[str, float] = {}
        self._dropping: DroppableBlocks | None = None
        self._checked = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in pl_module.modules()):
            raise ValueError("LayerDrop drops other blocks in each batch, and a compiled model runs one graph")
        self._release()
        self.report = None
        modules = {name: unwrapped(child) for name, child in named_plain_modules(pl_module, remove_duplicate=False)}
        probabilities = self._by_group(pl_module)
        paths = self.layers.block_paths(pl_module)
        self._probabilities = {path: probabilities[group] for group, several in paths.items() for path in several}
        self._blocks = {path: modules[path] for path in self._probabilities}

    def _by_group(self, module: LightningModule) -> dict[str, float]:
        groups = self.layers.of(module)
        blocks = groups.select("blocks")
        if groups.shared:
            raise ValueError(
                f"LayerDrop: this model runs {', '.join(groups.shared)} at several depths with the same weights "
                "(ALBERT): no depth can be left out by itself"
            )
        if not isinstance(self.p, Mapping):
            return dict.fromkeys(blocks, self.p)
        chosen: dict[str, float] = {}
        for what, p in self.p.items():
            for name in groups.select(what):
                if name not in blocks or name in chosen:
                    raise ValueError(f"p[{what!r}] must name blocks, and none twice: {name} is no block, or has a p")
                chosen[name] = p
        return dict.fromkeys(blocks, 0.0) | chosen

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seed = run_seed(self.seed)
        self._dropping = DroppableBlocks(self._blocks)
        self._checked = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._dropping is not None
        assert self.seed is not None
        if not self._checked:
            self._check_modes()
        self._dropping.dropped = draw_dropped(self._probabilities, self.seed, trainer.current_epoch, batch_idx)

    def _check_modes(self) -> None:
        asleep = [n for n, b in self._blocks.items() if not b.training and any(p.requires_grad for p in b.parameters())]
        refuse_asleep(self, asleep, "blocks")
        self._checked = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._dropping is not None
        self._dropping.dropped = ()
        if not any(called for called, _ in self._dropping.calls.values()):
            raise RuntimeError(f"LayerDrop: {type(pl_module).__name__} called no block in a training batch")
        reasons = self._dropping.needed
        if len(reasons) == len(self._blocks):
            raise RuntimeError(
                f"LayerDrop can drop none of the blocks: {'; '.join(f'{n}: {why}' for n, why in reasons.items())} "
                "(output_attentions=True in training asks for what only a run gives)"
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._dropping is not None
        rows = [
            {"block": name, "p": self._probabilities[name], "called": called, "dropped": dropped}
            for name, (called, dropped) in self._dropping.calls.items()
        ]
        needed = {"always run": [f"{name}: {why}" for name, why in self._dropping.needed.items()]}
        self.report = Report("Dropped blocks", needed if self._dropping.needed else {}, rows)
        rank_zero_info(f"LayerDrop: {self.report}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._dropping is not None:
            self._dropping.remove()
            self._dropping = None
        self._blocks = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]
