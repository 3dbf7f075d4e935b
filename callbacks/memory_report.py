"""What memory a run will need, said before it is short of it, and what it took."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional.activation_fit import count_saved
from lightning_ft.functional.live_memory import PARTS, state_tensors, storage_bytes
from lightning_ft.functional.memory import predict_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryReport(Callback):
    """Predict the peak of memory by part on the first batch, speak up if it is not there, and measure it.

    The prediction runs in ``on_train_batch_start`` of the first batch, without allocating anything; see
    :func:`~lightning_ft.functional.memory_use.predict_memory_use`. If more is needed than is there, a warning (or an
    error) names the biggest part, and how much checkpointed blocks, a halved batch, bf16 or an 8-bit optimiser would
    save. In the next optimiser steps the parts are measured: weights, gradients and optimiser states by their storages,
    activations by what autograd saves, the peak by the accelerator's allocator, or by the resident set of the process
    on a CPU, where the system tells it. The table of both is printed when the fit ends, and logged where it is measured
    (``memory/peak_gib``). A resident set is rough: it holds what the allocator keeps of freed memory, and does not grow
    where that is used again. Batches after the first may be larger, and are not predicted. Of DDP's buckets, as large
    as the gradients, nothing is known before.

    Args:
        steps: Optimiser steps over which it measures.
        limit: GiB that are there, in place of what the device or the system says.
        strict: Raise in place of warning.
        predict: Whether to predict; measuring alone costs nothing.
        layers: Where the blocks are, if they are not found by themselves.

    Attributes:
        report: The table: after the first batch with what was predicted, later with what was measured.

    Raises:
        ValueError: An argument is out of range.
        MemoryError: More is needed than is there, and ``strict``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MemoryReport()], logger=False)
    """

    def __init__(
        self,
        steps: int = 3,
        *,
        limit: float | None = None,
        strict: bool = False,
        predict: bool = True,
        layers: Layers | None = None,
    ) -> None:
        if steps < 2:
            raise ValueError(f"steps={steps!r} must be 2 or more: in the first the optimiser has no state yet")
        if limit is not None and not limit > 0:
            raise ValueError(f"limit={limit!r} must be above 0 GiB, or None for what there is")
        self.steps = steps
        self.limit = limit
        self.strict = strict
        self.predict = predict
        self.layers = layers or Layers()
        self.report: Report | None = None
        self._forward = ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._forward.close()
        self._predicted: Report | None = None
        self._why_not = ""
        self._saved: list[int] = []
        self._gradients = 0
        self._base = 0
        self._begin: int | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()
            self.report = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.report is not None:
            return
        if self._begin is None:
            self._begin = trainer.global_step
            if self.predict:
                self._tell(trainer, pl_module, batch)
            self._base = storage_bytes(_kept(trainer, pl_module))
            self._base -= _reset_peak(pl_module.device)
        self._forward.close()
        self._forward.enter_context(count_saved((*pl_module.parameters(), *pl_module.buffers()), self._saved))

    def _tell(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        options: dict[str, Any] = {"optimizer": optimizer, "precision": trainer.precision}
        try:
            self._predicted = predict_memory(module, batch, **options, layers=self.layers, switches=False)
        except ValueError as error:
            self._why_not = str(error)
            return
        needed: int = self._predicted.facts["peak bytes"]
        there = self._there(trainer, module)
        if there is None or needed <= there:
            return
        better = predict_memory(module, batch, **options, layers=self.layers).facts["with"]
        ways = ", ".join(f"{name} saves {row['saves %']:g} %" for name, row in better.items())
        biggest = self._predicted.facts["biggest part"]
        size = next(row["at the peak"] for row in self._predicted.rows if row["part"] == biggest)
        message = (
            f"MemoryReport: a training step of this batch will take {needed / 2**30:.3g} GiB, and {there / 2**30:.3g} "
            f"are there. Most of it are {biggest} ({size / 2**30:.3g} GiB). Of the peak, {ways}"
        )
        if self.strict:
            raise MemoryError(message)
        rank_zero_warn(message)

    def _there(self, trainer: Trainer, module: LightningModule) -> int | None:
        if self.limit is not None:
            return int(self.limit * 2**30)
        if module.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(module.device)
            return int(free + torch.cuda.memory_reserved(module.device))
        available = _proc(Path("/proc/meminfo"), "MemAvailable") if module.device.type == "cpu" else None
        return None if available is None else available + storage_bytes(_kept(trainer, module))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._forward.close()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.report is None:
            grads = (p.grad for p in pl_module.parameters() if p.grad is not None)
            self._gradients = max(self._gradients, storage_bytes(grads))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._forward.close()
        if self.report is None and self._begin is not None and trainer.global_step - self._begin >= self.steps:
            self._conclude(trainer, pl_module)

    def _conclude(self, trainer: Trainer, module: LightningModule) -> None:
        measured: dict[str, int | None] = {
            "weights": storage_bytes((*module.parameters(), *module.buffers())),
            "gradients": self._gradients,
            "optimiser": storage_bytes(t for o in trainer.optimizers for t in state_tensors(o.state)),
            "activations": max(self._saved, default=0),
        }
        peak = _peak(module.device)
        total = None if peak is None else peak + self._base
        known = sum(size for size in measured.values() if size is not None)
        measured["workspace"] = None if total is None else max(0, total - known)
        facts: dict[str, Any] = {"measured peak GiB": "unknown" if total is None else total / 2**30}
        rows = [{"part": part, "predicted": None, "at the peak": None, "measured": measured[part]} for part in PARTS]
        if self._predicted is not None:
            facts = {"predicted peak GiB": self._predicted.facts["peak GiB"], **facts}
            for row, said in zip(rows, self._predicted.rows, strict=True):
                row |= {"predicted": said["bytes"], "at the peak": said["at the peak"]}
        elif self._why_not:
            facts["not predicted"] = self._why_not
        self.report = Report("Memory of a training step, bytes", facts, rows)
        if total is not None:
            for logger in trainer.loggers:
                logger.log_metrics({"memory/peak_gib": total / 2**30}, step=trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.report is None and self._begin is not None:
            self._conclude(trainer, pl_module)
        if self.report is not None:
            rank_zero_info(str(self.report))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forward.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forward.close()


def _kept(trainer: Trainer, module: LightningModule) -> list[Tensor]:
    """Weights and optimiser states, which are there before the step."""
    states = [tensor for optimizer in trainer.optimizers for tensor in state_tensors(optimizer.state)]
    return [*module.parameters(), *module.buffers(), *states]


def _reset_peak(device: torch.device) -> int:
    """Begin a new peak. What the measure of it has now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
        _CLEAR.write_text("5")
    return _proc(_STATUS, "VmRSS") or 0


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _proc(_STATUS, "VmHWM")


def _proc(path: Path, name: str) -> int | None:
    """A size that Linux tells in kB, in bytes; None elsewhere."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
