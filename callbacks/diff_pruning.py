"""Diff pruning: learn which few weights must differ for a task, and train those."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._altering import Altering
from lightning_ft.callbacks._quadratic_pull import pending_scale
from lightning_ft.callbacks._split_rates import SplitRates, own_rates
from lightning_ft.callbacks._trainer import (
    WindowTracker,
    refuse_deepspeed,
    refuse_sharded,
    rewrap_ddp,
    run_seed,
    training_progress,
)
from lightning_ft.core.layers import Layers, plain_layers
from lightning_ft.core.report import Report
from lightning_ft.core.schedule import Duration
from lightning_ft.functional.diff_pruning import SparseOffset, check_share, compact, prune_offsets, sparse_offsets
from lightning_ft.functional.hard_concrete import ExpectedL0, HardConcrete


class DiffPruning(Callback):
    """Train θ = θ⁰ + z⊙δ with frozen θ⁰ until few z⊙δ remain, then only those: ``share`` of all weights.

    Three phases in one fit. In the first, z is drawn for each micro-batch (hard concrete gates with parameter a, the
    same on all ranks), δ and a train, and λ E‖z‖₀ makes gates shut; its gradient is added in
    ``on_before_optimizer_step``, once an optimiser step whatever the accumulation. At ``relaxed`` the ``share`` of all
    z⊙δ that is largest in magnitude, over all tensors together, is kept, and the rest is zero. From then on the mask is
    fixed, a is frozen, and the kept δ train on; what the optimiser remembers of δ (momentum of other gradients)
    is dropped. See :func:`lightning_ft.functional.diff_pruning.diff_prune` for what is altered, at ``setup`` or at the
    end of ``configure_model``; the head trains densely in all phases.

    While an optimiser steps, a has the learning rate ``gate_rate`` times the schedule, and no weight decay; δ has the
    optimiser's own, whose decay pulls it to zero, which is to θ⁰. Validation and export see z without noise. A full
    checkpoint after the second phase holds kept values with their places, and the optimiser's state of all;
    :func:`lightning_ft.functional.sparse_delta.save_sparse_delta` writes what is needed to use the model.

    Differs from the authors' code: each micro-batch's gradient belongs to its own z; the price is that of values whose
    gate and group gate are both open (they add the two counts); the schedule of a's rate is really stepped.

    Logs ``diff_pruning/open``, the expected share of open gates, where the trainer has a logger. It needs about eleven
    numbers a weight: for small models.

    Args:
        share: The part of all weights outside the head that may differ in the end, in (0, 1].
        relaxed: Length of the first phase: ``0.5`` (half of the training), ``"3 epochs"``, ``"500 steps"``.
        penalty: λ, the price of one open gate; 1.25e-7 in the authors' code.
        gate_rate: Highest learning rate of a; 0.1 there.
        structured: One more gate for each tensor.
        gates: The gates' distribution; l = -1.5, r = 1.5, β = 1, a = 5 there.
        seed: Of the draws; that of ``seed_everything`` by default, else 0.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Attributes:
        report: What was kept, once it is.

    Raises:
        ValueError: An argument is out of range; ``relaxed`` is a fraction of a training without end; sharded weights.

    Example:
        >>> DiffPruning(0.005, relaxed="3 epochs").share
        0.005

    Reference:
        Guo, Rush and Kim 2021, "Parameter-Efficient Transfer Learning with Diff Pruning".
    """

    def __init__(
        self,
        share: float = 0.005,
        *,
        relaxed: float | str = 0.5,
        penalty: float = 1.25e-7,
        gate_rate: float = 0.1,
        structured: bool = True,
        gates: HardConcrete | None = None,
        seed: int | None = None,
        layers: Layers | None = None,
    ) -> None:
        check_share(share)
        if not gate_rate > 0:
            raise ValueError(f"gate_rate={gate_rate!r} must be a learning rate above 0, such as 0.1")
        self.share = share
        self.relaxed = Duration.parse(relaxed, "relaxed")
        self.gate_rate = gate_rate
        self.structured = structured
        self.gates = gates or HardConcrete()
        self.seed = seed
        self.layers = layers
        self.report: Report | None = None
        self._penalty = ExpectedL0(self.gates, penalty)
        self._altering: Altering | None = None
        self._offsets: list[SparseOffset] = []
        self._fixed = False
        self._window = WindowTracker()
        self._flags: list[tuple[torch.nn.Parameter, bool]] = []
        self._handles: list[RemovableHandle | SplitRates] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        settings = {
            "gates": asdict(self.gates),
            "structured": self.structured,
            "seed": run_seed(self.seed),
            "layers": plain_layers(self.layers),
        }
        self._release()
        self._altering = Altering("diff_pruning", settings)
        self._altering.setup(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        refuse_sharded(trainer, self)
        self._offsets = sparse_offsets(pl_module)
        if any(offset.delta.dtype in (torch.bfloat16, torch.float16) for offset in self._offsets):
            rank_zero_warn(
                "DiffPruning on weights of half precision: small steps of δ and a are lost. Use "
                'Trainer(precision="bf16-mixed"), which keeps fp32 weights'
            )
        self._window, self.report = WindowTracker(), None
        moment = self._offsets[0].moment
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_step_post_hook"):
                self._handles.append(optimizer.register_step_post_hook(lambda *_: moment.drop()))
        rates = {gate: self.gate_rate for offset in self._offsets for gate in _gates(offset)}
        self._handles += own_rates("DiffPruning", trainer.optimizers, rates)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.relaxed.share(training_progress(trainer, 0))  # refuses a fraction of an endless training
        if self._altering is not None and self._altering.report is not None:
            rank_zero_info(str(self._altering.report))
        for offset in self._offsets:
            offset.train()  # models come from from_pretrained() in eval mode; validation puts this back
        self._fixed = self._offsets[0].fixed
        if self._fixed:
            self._freeze_gates(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        begins = self._window.begins(trainer, batch_idx)
        if begins and not self._fixed and self.relaxed.count(training_progress(trainer, batch_idx)) >= 1:
            self._fix(trainer, pl_module)
        # A function of the batch: the same after a resume, on all ranks, and where a block is computed again.
        self._offsets[0].moment.begin(trainer.current_epoch, batch_idx)

    def _fix(self, trainer: Trainer, module: LightningModule) -> None:
        self.report = prune_offsets(module, self.share)
        rank_zero_info(str(self.report))
        self._fixed = True
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.Adagrad):  # makes its state once, when it is built
                continue
            for offset in self._offsets:
                for parameter in offset.parameters():
                    optimizer.state.pop(parameter, None)
        self._freeze_gates(trainer)

    def _freeze_gates(self, trainer: Trainer) -> None:
        for gate in (gate for offset in self._offsets for gate in _gates(offset)):
            self._flags.append((gate, gate.requires_grad))
            gate.requires_grad_(False)
            gate.grad = None
        rewrap_ddp(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._offsets[0].moment.drop()  # their memory is free for the step
        if self._fixed:
            return
        held = {p for group in optimizer.param_groups for p in group["params"]}
        own = [offset for offset in self._offsets if offset.log_alpha in held]
        elements, groups = [offset.log_alpha for offset in own], [offset.group_log_alpha for offset in own]
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if own and trainer.loggers and (trainer.global_step + 1) % every == 0:
            with torch.no_grad():
                count = ExpectedL0(self.gates, 1.0).value(elements, groups)
            pl_module.log("diff_pruning/open", count / sum(element.numel() for element in elements))
        self._penalty.add_grad_(elements, groups, scale=pending_scale(trainer, optimizer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._offsets[0].moment.end()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._fixed:
            rank_zero_warn(
                f"DiffPruning: training ended within its first phase (relaxed={self.relaxed}), so that no weight was "
                "pruned and the difference is dense: train longer, or make relaxed shorter"
            )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = compact(pl_module, checkpoint["state_dict"])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._altering is not None:
            self._altering.release()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for gate, flag in self._flags:
            gate.requires_grad_(flag)
        self._flags.clear()
        for offset in self._offsets[:1]:
            offset.moment.end()
        self._offsets, self._fixed = [], False


def _gates(offset: SparseOffset) -> list[torch.nn.Parameter]:
    return [gate for gate in (offset.log_alpha, offset.group_log_alpha) if gate is not None]
