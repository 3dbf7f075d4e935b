"""Which heads of attention the loss needs, when training has ended; and the others silenced."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.callbacks._training_rows import training_batches
from lightning_ft.core.report import Report
from lightning_ft.core.sharding import is_sharded
from lightning_ft.core.undisturbed import same_randomness
from lightning_ft.functional._batch_rows import row_count
from lightning_ft.functional.fisher import Loss
from lightning_ft.functional.head_importance import HeadScores, check_shares, head_importance, prune_heads


class HeadImportance(Callback):
    """Measure I_h = E_x |∂L(x)/∂ξ_h| of each head when training ends, where ξ_h = 1 multiplies head h; draw it; prune.

    What :func:`lightning_ft.functional.head_importance.head_importance` does, in ``on_train_end``, on training rows
    spread evenly over the set: one more backward pass over each, in eval mode. The ranking is ``scores.report()``;
    where matplotlib is installed (extra ``plot``), a heat map of layers against heads is drawn.

    With ``prune`` the least needed heads are then silenced in rounds, measured anew before each, by zeroing their input
    slices of the output projection (:func:`lightning_ft.functional.head_importance.prune_heads`): exports have them at
    0. The model keeps its shape and is no faster. Put this callback before those that save when training ends
    (ExactResume); checkpoints of epochs have all heads.

    Args:
        prune: Share of all heads to silence, in (0, 1); None measures only.
        per_round: Share of all heads that go in a round; about 0.1 in the paper.
        examples: Number of training rows to measure on.
        heads: Path of each output projection to its number of heads, where they are not found by themselves.
        loss: A function of module and batch that returns the mean loss of its rows; by default what ``training_step``
            returns, where that steps no optimiser itself.
        path: The picture: ``.png``, ``.svg`` or ``.pdf``; by default ``head_importance.png`` in the trainer's
            default_root_dir.

    Attributes:
        scores: The importance, of what is left where some were silenced.
        report: The ranking, or the table of silenced heads.

    Raises:
        ValueError: An argument is out of range; training rows cannot be read twice (an iterable data set); what the
            functions refuse; FSDP, DeepSpeed.
        ImportError: A ``path`` is given, and matplotlib is not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[HeadImportance(prune=0.3)], logger=False)

    Reference:
        Michel, Levy and Neubig 2019, "Are Sixteen Heads Really Better than One?".
    """

    def __init__(
        self,
        prune: float | None = None,
        *,
        per_round: float = 0.1,
        examples: int = 512,
        heads: Mapping[str, int] | None = None,
        loss: Loss | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        if prune is not None:
            check_shares(prune, per_round)
        if examples < 1:
            raise ValueError(f"examples={examples} must be 1 or more")
        self.prune = prune
        self.per_round = per_round
        self.examples = examples
        self.heads = heads
        self.loss = loss
        self.path = None if path is None else Path(path)
        self.scores: HeadScores | None = None
        self.report: Report | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        if any(is_sharded(p) for p in pl_module.parameters()):
            raise ValueError(
                "HeadImportance runs the model by itself, and under FSDP each process holds a part of it: train with "
                "DDP, or call head_importance on the module of the checkpoint"
            )
        if self.path is not None and find_spec("matplotlib") is None:
            raise ImportError(f'path={str(self.path)!r} needs matplotlib: pip install "lightning-ft[plot]"')
        self.scores = self.report = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All processes read the same rows: what is silenced cannot differ.
        with same_randomness():
            rows = list(self._batches(trainer))
        options: dict[str, Any] = {"loss": self.loss, "heads": self.heads, "limit": self.examples}
        if self.prune is None:
            self.scores = head_importance(pl_module, rows, **options)
            self.report = self.scores.report()
        else:
            self.report, self.scores = prune_heads(pl_module, rows, self.prune, per_round=self.per_round, **options)
        rank_zero_info(f"HeadImportance: {self.report}")
        self._draw(trainer)

    def _batches(self, trainer: Trainer) -> Iterator[Any]:
        batches = training_batches(trainer)
        first = None if batches is None else next(batches, None)
        if batches is None or first is None:
            raise ValueError(
                "HeadImportance reads the training rows once more, which an iterable data set, several loaders or "
                "limit_train_batches do not allow: call head_importance on batches of your own"
            )
        wanted = -(-self.examples // max(1, row_count(first) or 1))
        stride = max(1, int(trainer.num_training_batches) * trainer.world_size // wanted)
        yield first
        yield from islice(batches, stride - 1, None, stride)

    def _draw(self, trainer: Trainer) -> None:
        assert self.scores is not None
        dry = not trainer.is_global_zero or trainer.fast_dev_run  # type: ignore[attr-defined]
        if dry or (self.path is None and find_spec("matplotlib") is None):
            return
        path = self.path or Path(trainer.default_root_dir) / "head_importance.png"
        self.scores.plot(path)
        rank_zero_info(f"HeadImportance: {path}")
