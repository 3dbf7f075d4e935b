"""A loud word where weights of half precision swallow their updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.core.sharding import local

_HALF = (torch.float16, torch.bfloat16)
_SAMPLE = 1024  # values of a tensor that are looked at, evenly spread


class PrecisionCheck(Callback):
    """Measure the share of updates that round to nothing, where weights that train are bf16 or fp16.

    A weight changes only by half a unit in its last place or more: at 0.05 that is 1.2e-4 in bf16, while AdamW's
    updates are as large as the learning rate, 2e-5 in fine-tuning. Under ``precision="bf16-true"`` such a run looks
    healthy and learns nothing. Over ``steps`` optimiser steps, some values of each tensor are copied in
    ``on_before_optimizer_step`` and compared after the step: an update is lost where there was a gradient and the value
    is the same. All stays on the device until the last of these steps. Steps at less than half of the optimiser's base
    rate (a warm-up) are not looked at. fp32 weights, and so mixed precision, cost nothing.

    fp16 weights under an Adam whose ε is zero in fp16 (below 3e-8, as the usual 1e-8) are refused: squares of gradients
    are zero there as well, and the update is 0/0.

    Args:
        steps: Optimiser steps that are looked at.
        limit: Share of lost updates from which on it speaks up.
        action: ``"warn"`` or ``"raise"``.
        layers: Where the blocks and the head are, for the table, if they are not found by themselves.

    Attributes:
        report: Lost updates by layer, once they are measured; None where no weight is of half precision.

    Raises:
        ValueError: An argument is out of range; Adam's ε vanishes in fp16.
        RuntimeError: Too many updates are lost, and ``action="raise"``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PrecisionCheck()], logger=False)
    """

    def __init__(
        self,
        steps: int = 10,
        limit: float = 0.5,
        *,
        action: Literal["warn", "raise"] = "warn",
        layers: Layers | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps!r} must be 1 or more")
        if not 0 < limit <= 1:
            raise ValueError(f"limit={limit!r} must be a share of updates in (0, 1]")
        if action not in ("warn", "raise"):
            raise ValueError(f'action={action!r} must be "warn" or "raise"')
        self.steps = steps
        self.limit = limit
        self.action = action
        self.layers = layers or Layers()
        self.report: Report | None = None
        self._release()

    def _release(self) -> None:
        for handle in getattr(self, "_handles", []):
            handle.remove()
        self._handles: list[RemovableHandle] = []
        self._before: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._counts: dict[nn.Parameter, Tensor] = {}
        self._left = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release()
            self.report = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            _refuse_vanishing_eps(pl_module, optimizer)
        if self.report is not None or not any(True for o in trainer.optimizers for _ in _half(o.param_groups)):
            return
        self._left = self.steps
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_step_post_hook"):
                self._handles.append(optimizer.register_step_post_hook(self._stepped))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._left:
            self._before = {
                p: (_sample(p.detach()).clone(), _sample(p.grad) != 0)
                for p in _half([group for group in optimizer.param_groups if _in_earnest(group)])
                if p.grad is not None and not p.grad.is_sparse
            }

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        before, self._before = self._before, {}
        for p, (values, moved) in before.items():
            lost = moved & (values == _sample(p.detach()))
            counts = torch.stack([moved.sum(), lost.sum()])
            self._counts[p] = self._counts[p] + counts if p in self._counts else counts
        self._left -= bool(before)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._counts and not self._left:
            self._conclude(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._counts:
            self._conclude(pl_module)
        if self.report is not None:
            rank_zero_info(str(self.report))

    def _conclude(self, module: LightningModule) -> None:
        device = next(iter(self._counts.values())).device
        counts = torch.stack([count.to(device) for count in self._counts.values()]).tolist()
        by_parameter = dict(zip(self._counts, counts, strict=True))
        looked, dtypes = self.steps - self._left, sorted({str(p.dtype) for p in by_parameter})
        self._release()
        rows = _table(module, self.layers, by_parameter)
        moved, lost = (sum(column) for column in zip(*counts, strict=True))
        share = lost / moved if moved else 0.0
        facts = {"optimiser steps looked at": looked, "updates sampled": moved, "lost": share}
        self.report = Report(f"Updates lost in {' and '.join(dtypes)} weights", facts, rows)
        if share < self.limit:
            return
        worst = max(rows, key=lambda row: row["lost"])
        message = (
            f"PrecisionCheck: {share:.0%} of the updates are smaller than half a unit in the last place of "
            f"{' and '.join(dtypes)} weights and are lost (most in {worst['layer']}: {worst['lost']:.0%}). Use "
            'Trainer(precision="bf16-mixed"), which keeps fp32 weights; or an optimiser that rounds stochastically or '
            "keeps the remainder (Kahan summation); or a higher learning rate"
        )
        if self.action == "raise":
            raise RuntimeError(message)
        rank_zero_warn(message)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"report": None if self.report is None else self.report.to_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.report = None if state_dict["report"] is None else Report(**state_dict["report"])


def _half(groups: Sequence[dict[str, Any]]) -> Iterator[nn.Parameter]:
    return (p for group in groups for p in group["params"] if p.requires_grad and p.dtype in _HALF)


def _sample(tensor: Tensor) -> Tensor:
    values = local(tensor).flatten()
    return values[:: max(1, len(values) // _SAMPLE)]


def _in_earnest(group: dict[str, Any]) -> bool:
    """Whether a group's learning rate is not that of a warm-up. One on the device is not read."""
    rate = group["lr"]
    return isinstance(rate, Tensor) or (rate > 0 and rate >= 0.5 * float(group.get("initial_lr", rate)))


def _table(module: nn.Module, layers: Layers, counts: dict[nn.Parameter, list[int]]) -> list[dict[str, Any]]:
    try:
        groups = layers.of(module)
        label = {p: groups.name_of(p) for p in counts}
        order = [name for name in groups if name in label.values()]
    except ValueError:
        if layers != Layers():
            raise
        names = {id(p): name.rpartition(".")[0] for name, p in module.named_parameters()}
        label = {p: names[id(p)] for p in counts}
        order = list(dict.fromkeys(label.values()))
    rows = []
    for name in order:
        moved, lost = (sum(column) for column in zip(*(c for p, c in counts.items() if label[p] == name), strict=True))
        rows.append({"layer": name, "updates sampled": moved, "lost": lost / moved if moved else 0.0})
    return rows


def _refuse_vanishing_eps(module: nn.Module, optimizer: Optimizer) -> None:
    names = {id(p): name for name, p in module.named_parameters()}
    for group in optimizer.param_groups:
        eps = group.get("eps")
        vanishes = isinstance(eps, float) and eps > 0 and not torch.tensor(eps, dtype=torch.float16)
        half = next((p for p in _half([group]) if p.dtype == torch.float16), None)
        if vanishes and half is not None:
            raise ValueError(
                f"{type(optimizer).__name__}(eps={eps:g}) is zero in fp16, of which {names.get(id(half), 'a weight')} "
                "is, and its updates become 0/0: keep fp32 weights, Trainer(plugins=[FP16()]) or "
                'precision="16-mixed"; or write eps=1e-4'
            )
