"""Several predictors from one run: the weights at the end of each cycle, and their mean answer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._trainer import training_length, training_progress
from lightning_ft.core.files import atomic_file
from lightning_ft.core.schedule import Duration
from lightning_ft.functional.snapshots import (
    Answer,
    apply_delta,
    cycle_length,
    delta,
    each_member,
    logits_of,
    mean_answer,
)

_BASE = "base.safetensors"


class SnapshotEnsemble(Callback):
    """Keep the weights at the ends of M cycles; the mean *probability* of the last m answers in test and predict.

    p̄ = (1/m) Σ softmax(z(x; θᵢ)), with z the logits of an input x and θᵢ the weights at the end of a cycle.

    Give the optimiser :class:`lightning_ft.schedulers.CyclicCosine` with the same ``cycles``. A member is written in
    ``on_train_batch_end`` after a cycle's last step (and in ``on_train_end``), as safetensors of what differs from the
    weights θ⁰ that the fit began from before any restore, each tensor whole: θ⁰ + (θ − θ⁰) would not be θ to the bit,
    and under LoRA only the adapters differ. ``base.safetensors`` holds θ⁰ of what differs in any member: a layer may
    begin to train in a later cycle.

    In ``trainer.validate``, ``test`` and ``predict`` (not in the fit's own validation, which sees the weights that
    train) each call of the module's ``forward`` runs once for each member, with the member's tensors in the place of
    the module's; logits come back whose softmax (sigmoid, value) is the mean, so that every loss, metric and decoding
    after them is that of the ensemble. The members lie on the device. Their mean *weights* would be another thing:
    cycles end in different basins.

    Args:
        cycles: M, as in the scheduler: a cycle has ⌈T / M⌉ optimiser steps.
        last: m; None for all.
        every: Instead of ``cycles``, the length of one: ``"500 steps"`` or ``"1 epoch"``. Needed under manual
            optimisation.
        answer: What the logits mean: ``"single_label"`` (softmax over the last dimension), ``"multi_label"`` (sigmoid)
            or ``"regression"`` (the mean of the values).
        through: Path of the module inside whose ``forward`` returns the logits (a tensor, or an output with
            ``.logits``); by default the LightningModule itself.
        dirpath: Folder of the members; ``snapshots`` in the trainer's ``default_root_dir`` by default. The next run of
            the same folder replaces them: give each run a folder of its own, as the command line does. A checkpoint of
            the run names its members, too.

    Raises:
        ValueError: A number is out of range; the members are of another module; a step never called ``forward``; the
            model is sharded.
        FileNotFoundError: A member is gone.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SnapshotEnsemble(cycles=4, last=3)], max_epochs=8, logger=False)

    Reference:
        Huang et al. 2017, "Snapshot Ensembles: Train 1, Get M for Free".
    """

    def __init__(
        self,
        cycles: int = 5,
        *,
        last: int | None = None,
        every: float | str | None = None,
        answer: Answer = "single_label",
        through: str = "",
        dirpath: str | os.PathLike[str] | None = None,
    ) -> None:
        cycle_length(1, cycles)  # refuses a bad number now
        if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 1):
            raise ValueError(f"last={last!r} must be a number of members, 1 or more, or None for all of them")
        if answer not in ("single_label", "multi_label", "regression"):
            raise ValueError(f'answer={answer!r} must be "single_label", "multi_label" or "regression"')
        self.cycles = cycles
        self.last = last
        self.every = None if every is None else Duration.parse(every, "every")
        self.answer: Answer = answer
        self.through = through
        self.dirpath = None if dirpath is None else Path(dirpath)
        self._base: dict[str, Tensor] = {}
        self._restored = False
        self._paths: list[str] = []
        self._changed: set[str] = set()
        self._taken = 0
        self._step = 0
        self._length = 0
        self._handles: list[RemovableHandle] = []
        self._forward: _EnsembleForward | None = None

    def folder(self, trainer: Trainer) -> Path:
        """The folder of the members that this trainer writes."""
        return (self.dirpath or Path(trainer.default_root_dir) / "snapshots").absolute()

    # ---- members

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._restored, self._taken, self._base, self._changed = False, 0, {}, set()

        def capture(*_: Any) -> None:
            self._base = _copy(pl_module)

        # The module may load its pretrained weights only in `configure_model`, and a checkpoint is restored before
        # `on_fit_start`: what the members differ from is what was there just before the last load.
        self._handles.append(pl_module.register_load_state_dict_pre_hook(capture))  # type: ignore[no-untyped-call]

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = True

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        sharded = any(hasattr(p, "placements") for p in pl_module.parameters())
        if sharded or trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError(
                "SnapshotEnsemble keeps whole models and does not run where they are sharded: use DDP or one device"
            )
        if not self._restored:
            self._base, self._paths = _copy(pl_module), []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self.every is not None:
            self.every.count(training_progress(trainer, 0))  # refuses a fraction of an endless training
            return
        total = training_length(trainer)[1]
        if math.isnan(total) and trainer.max_steps is not None and trainer.max_steps > 0:
            total = trainer.max_steps
        if not total < math.inf:
            raise ValueError(
                f"cycles={self.cycles} are shares of a number of optimiser steps that is not known here (manual "
                'optimisation, or a training without end): give every="500 steps" or every="1 epoch"'
            )
        self._length = cycle_length(max(total, 1), self.cycles)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of an accumulation window
        self._step = trainer.global_step
        done = (
            self._step // self._length
            if self.every is None
            else self.every.count(training_progress(trainer, batch_idx + 1))
        )
        if done > self._taken:
            self._take(trainer, pl_module, done)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The last cycle may be shorter.
        if self.every is None and trainer.global_step > self._taken * self._length:
            self._take(trainer, pl_module, self._taken + 1)
        self._keep_base(trainer, delta(_named(pl_module), self._base).keys())
        kept = self._kept()
        rank_zero_info(
            f"SnapshotEnsemble: {len(self._paths)} members in {self.folder(trainer)}, {len(kept)} will answer"
        )

    def _take(self, trainer: Trainer, module: LightningModule, number: int) -> None:
        if trainer.is_global_zero and not self._paths:
            for file in [*self.folder(trainer).glob("cycle_*.safetensors"), self.folder(trainer) / _BASE]:
                file.unlink(missing_ok=True)  # of an earlier run: mixed with this one's they would be no ensemble
        self._taken = number
        path = self.folder(trainer) / f"cycle_{number:03d}.safetensors"
        changed = delta(_named(module), self._base)
        if trainer.is_global_zero:
            _save(path, changed)
        self._keep_base(trainer, changed.keys())
        self._paths = [known for known in self._paths if known != str(path)] + [str(path)]

    def _keep_base(self, trainer: Trainer, changed: Iterable[str]) -> None:
        before = len(self._changed)
        self._changed.update(changed)
        if trainer.is_global_zero and (len(self._changed) > before or not (self.folder(trainer) / _BASE).exists()):
            _save(self.folder(trainer) / _BASE, {n: t for n, t in self._base.items() if n in self._changed})

    def _kept(self) -> list[str]:
        return self._paths if self.last is None else self._paths[-self.last :]

    # ---- answers

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._wrap(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wrap(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wrap(trainer, pl_module)

    def _wrap(self, trainer: Trainer, module: LightningModule) -> None:
        from safetensors.torch import load_file

        paths = self._kept() or self._found(trainer)
        if not paths:
            rank_zero_info("SnapshotEnsemble: there are no members yet, so the module answers by itself")
            return
        base = Path(paths[-1]).parent / _BASE
        for path in [*(Path(p) for p in paths), base]:
            if not path.is_file():
                raise FileNotFoundError(f"{path} of the ensemble is gone: put it back, or predict without the ensemble")
        device = str(module.device)
        original = load_file(base, device=device)
        members = [apply_delta(load_file(path, device=device), original) for path in paths]
        self._forward = _EnsembleForward(module, module.get_submodule(self.through), members, self.answer)

    def _found(self, trainer: Trainer) -> list[str]:
        files = sorted(str(path) for path in self.folder(trainer).glob("cycle_*.safetensors"))
        return files if self.last is None else files[-self.last :]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish("validation_step")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish("test_step")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish("predict_step")

    def _finish(self, step: str) -> None:
        if self._forward is None:
            return
        called, through = self._forward.called, self.through or "the LightningModule"
        self._release()
        if not called:
            raise ValueError(
                f"{step} never called forward of {through}, so one model answered and no ensemble: name the module "
                "that returns the logits, through=..."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        self._base = {}

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._forward is not None:
            self._forward.remove()
            self._forward = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken, "members": list(self._paths), "changed": sorted(self._changed)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._taken, self._paths = state_dict["taken"], list(state_dict["members"])
        self._changed = set(state_dict["changed"])


class _EnsembleForward:
    """Stands in for a module's ``forward``: runs it for each member and returns the logits of their mean answer."""

    def __init__(
        self, owner: nn.Module, module: nn.Module, members: Sequence[Mapping[str, Tensor]], answer: Answer
    ) -> None:
        self._module = module
        self.called = False
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.called = True
            outputs = list(each_member(owner, members, lambda: original(*args, **kwargs)))
            mean = mean_answer([logits_of(output) for output in outputs], answer)
            if isinstance(outputs[-1], Tensor):
                return mean.to(outputs[-1].dtype)
            # An output of several parts: only its logits are those of the ensemble.
            outputs[-1].logits = mean.to(outputs[-1].logits.dtype)
            return outputs[-1]

        vars(module)["forward"] = forward

    def remove(self) -> None:
        """Leave the module as it was."""
        vars(self._module).pop("forward", None)


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    return {name: t.detach() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in _named(module).items()}


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
