"""WiSE-FT: the fit ends between the pretrained and the fine-tuned weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_ft.callbacks._anchoring import Anchoring, pretrained_and_new
from lightning_ft.callbacks._beside import BesideValidation
from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.core.anchor import Storage
from lightning_ft.core.files import replace
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional.plot_interpolation import plot_interpolation
from lightning_ft.functional.wise_ft import interpolate_weights

GRID = tuple(i / 10 for i in range(11))


class WiSEFT(Callback):
    """Leave the module at θ = (1 − α) θ⁰ + α θ_ft when the fit ends, with the α of the best validation.

    θ⁰ are the pretrained weights, before any checkpoint is restored; they are shared with L2SP and others that need
    them. In ``on_train_end``, as the last of all callbacks whatever its place in the list, every α is written into the
    module and the fit's own validation runs, unheard by other callbacks and loggers; the module keeps the best, and
    ``wise_ft.ckpt`` (weights without optimisers) is written beside the other checkpoints, by one rename. Those, with
    ``last.ckpt`` of ExactResume and ModelCheckpoint, were written before and hold the fine-tuned weights: a run is
    prolonged from them. A run that breaks off is left as it is. ``fast_dev_run`` writes nothing.

    The head is new and has no pretrained weights: it stays as trained, and so do layers that LayerReinit drew anew. The
    paper starts from a head that is valid in θ⁰ (zero-shot, or LPFT before). Integer weights and all buffers stay as
    trained; running statistics (BatchNorm) then belong to other weights, of which a warning tells. α is chosen on the
    validation data: report on test data.

    Args:
        alphas: The values of α to choose from, each in [0, 1]; by default 0, 0.1, … 1. One number is taken as it is,
            without any validation: 0.5 is the paper's choice where there is nothing to choose by.
        monitor: Name of the logged value that decides.
        mode: Whether a small (``"min"``) or a large (``"max"``) value is good; of equal values the first counts.
        dirpath: Folder of ``wise_ft.ckpt``; by default that of ModelCheckpoint, else ``checkpoints`` in the trainer's
            ``default_root_dir``.
        path: The picture of the value against α: ``.png``, ``.svg`` or ``.pdf``; by default ``wise_ft.png`` in the
            trainer's ``default_root_dir`` where matplotlib is installed.
        layers: Where the blocks and the head are, if they are not found by themselves.
        storage: Where θ⁰ is kept, as in :class:`~lightning_ft.callbacks.L2SP`; not in ``"bf16"``.

    Attributes:
        report: What was found at each α and which was taken; None before.

    Raises:
        ValueError: An argument is out of range; there is no validation to choose by, or ``monitor`` is not logged; the
            model has adapters; on resume, the model does not start from the weights that the interrupted run started
            from; FSDP1 or DeepSpeed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[WiSEFT(monitor="val_accuracy", mode="max")], logger=False)

    Reference:
        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models".
    """

    def __init__(
        self,
        alphas: float | Sequence[float] = GRID,
        monitor: str = "val_loss",
        *,
        mode: Literal["min", "max"] = "min",
        dirpath: str | os.PathLike[str] | None = None,
        path: str | os.PathLike[str] | None = None,
        layers: Layers | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.fixed = isinstance(alphas, int | float)
        self.alphas = [float(alphas)] if isinstance(alphas, int | float) else sorted(map(float, alphas))
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"alphas={alphas!r} must be in [0, 1], one or more")
        if mode not in ("min", "max"):
            raise ValueError(f'mode={mode!r} must be "min" or "max"')
        if storage == "bf16":
            raise ValueError('storage="bf16" rounds θ⁰, and α=0 is to give it back: use "device", "cpu" or "disk"')
        self.monitor = monitor
        self.mode = mode
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.path = None if path is None else Path(path)
        self.layers = layers or Layers()
        self.report: Report | None = None
        self._anchoring = Anchoring(self, self._body, storage)
        self._parameters: list[nn.Parameter] = []
        self._pretrained: list[Tensor] = []

    def _body(self, module: LightningModule) -> list[tuple[str, nn.Parameter]]:
        # What is frozen now may be thawed later, by whomever.
        return pretrained_and_new(self, module, self.layers, training=False)[0]

    def checkpoint(self, trainer: Trainer) -> Path:
        """The checkpoint file that this trainer writes."""
        beside = getattr(trainer.checkpoint_callback, "dirpath", None)
        return (self.dirpath or Path(beside or Path(trainer.default_root_dir) / "checkpoints")) / "wise_ft.ckpt"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.report = None
            self._anchoring.watch(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._anchoring.restoring()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        _check(pl_module)
        body = self._body(pl_module)
        if self.layers == Layers() and "head" not in self.layers.of(pl_module):
            rank_zero_warn(
                f"WiSEFT found no head in {type(pl_module).__name__} and interpolates every layer. If one of them is "
                'new, its random start is no pretrained weight: name it, layers=Layers(head="classifier"). If there is '
                "none (a tied LM head), layers=Layers(head=[])"
            )
        anchor = self._anchoring.take(body)
        if anchor.storage == "bf16":
            raise ValueError('WiSEFT needs θ⁰ unrounded, and another callback says storage="bf16": say "cpu" there')
        self._parameters, self._pretrained = [p for _, p in body], anchor.like(body)
        # What others save in on_train_end is to be the fine-tuned weights. (A new list: the old one is iterated.)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [*(c for c in callbacks if c is not self), self]  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._anchoring.recheck(trainer)
        if not self.fixed and not trainer.enable_validation:
            raise ValueError(
                "WiSEFT chooses α on validation data, and this fit has none: give validation data and a "
                "validation_step, or one number: alphas=0.5"
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tuned = [parameter.detach().clone() for parameter in self._parameters]
        try:
            rows = [] if self.fixed else self._measure(trainer, pl_module, tuned)
            chosen = self._choose(rows)
            interpolate_weights(self._parameters, self._pretrained, tuned, chosen)
        except BaseException:
            interpolate_weights(self._parameters, tuned, tuned, 1.0)
            raise
        kept = sum(1 for p in pl_module.parameters()) - len(self._parameters)
        facts: dict[str, Any] = {"chosen alpha": chosen, "interpolated tensors": len(tuned), "kept as trained": kept}
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            facts["checkpoint"] = str(self._save(trainer))
        self.report = Report("WiSE-FT", facts, rows)
        rank_zero_info(str(self.report))
        self._tell(trainer, rows, chosen)

    def _measure(self, trainer: Trainer, module: LightningModule, tuned: list[Tensor]) -> list[dict[str, float]]:
        beside = BesideValidation(trainer, module)
        rows = []
        for alpha in self.alphas:
            interpolate_weights(self._parameters, self._pretrained, tuned, alpha)
            logged = beside.logged()
            if self.monitor not in logged:
                raise ValueError(
                    f"WiSEFT: monitor={self.monitor!r} was not logged; logged were: {', '.join(logged) or 'none'}. "
                    f"Name one of these, or log it: self.log({self.monitor!r}, ...) in validation_step"
                )
            rows.append({"alpha": alpha, **logged})
        beside.release()
        # Ranks that decide each for itself would part.
        found: list[dict[str, float]] = trainer.strategy.broadcast(rows)
        return found

    def _choose(self, rows: list[dict[str, float]]) -> float:
        if self.fixed:
            return self.alphas[0]
        sign = 1 if self.mode == "min" else -1
        finite = [row for row in rows if math.isfinite(row[self.monitor])]
        if not finite:
            raise ValueError(f"WiSEFT: monitor={self.monitor!r} was finite at no α: {rows}")
        return min(finite, key=lambda row: sign * row[self.monitor])["alpha"]

    def _save(self, trainer: Trainer) -> Path:
        target = self.checkpoint(trainer)
        temporary = target.with_name(f".{target.name}.tmp")
        trainer.save_checkpoint(temporary, weights_only=True)
        if trainer.is_global_zero:
            replace(temporary, target)
        trainer.strategy.barrier("wise_ft.ckpt")
        return target

    def _tell(self, trainer: Trainer, rows: list[dict[str, float]], chosen: float) -> None:
        numbers = {"wise_ft/alpha": chosen}
        numbers |= {f"wise_ft/{self.monitor}": row[self.monitor] for row in rows if row["alpha"] == chosen}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        dry = not trainer.is_global_zero or trainer.fast_dev_run  # type: ignore[attr-defined]
        if dry or not rows or (self.path is None and find_spec("matplotlib") is None):
            return
        path = self.path or Path(trainer.default_root_dir) / "wise_ft.png"
        values = [row[self.monitor] for row in rows]
        plot_interpolation(self.alphas, values, path, label=self.monitor, chosen=chosen)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._parameters, self._pretrained = [], []
        self._anchoring.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._anchoring.fingerprint}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._anchoring.fingerprint = state_dict["fingerprint"]


def _check(module: nn.Module) -> None:
    for path, child in module.named_modules():
        # A product of two adapters does not move on a line when both do.
        if any(kind.__module__.startswith("peft.tuners.tuners_utils") for kind in type(child).__mro__):
            raise ValueError(
                f"WiSEFT interpolates weights, and {path!r} is an adapter of peft: scale or merge it instead "
                "(merge_and_unload), or fine-tune the weights themselves"
            )
    running = [path for path, child in module.named_modules() if getattr(child, "running_mean", None) is not None]
    if running:
        rank_zero_warn(
            f"WiSEFT leaves running statistics as trained ({len(running)} layers, such as {running[0]!r}), and they do "
            "not belong to weights between: estimate them anew on training batches (torch.optim.swa_utils.update_bn)"
        )
