"""How far each layer has moved from the pretrained weights, through the training and as a picture."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_ft.callbacks._anchoring import Anchoring, pretrained_and_new
from lightning_ft.callbacks._trainer import refuse_deepspeed, training_progress
from lightning_ft.core.anchor import Storage
from lightning_ft.core.fresh import fresh_parameters
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.core.schedule import Duration
from lightning_ft.core.sharding import squares_over_processes
from lightning_ft.functional.drift import distances
from lightning_ft.functional.plot_drift import plot_drift


class DriftReport(Callback):
    """Measure ‖θ − θ⁰‖ and ‖θ − θ⁰‖ / ‖θ⁰‖ of each layer group, log them, and draw them when the fit ends.

    θ⁰ are the pretrained weights, before any checkpoint is restored; they are shared with L2SP and others that need
    them. In the ``on_train_batch_end`` after each stretch of ``every``, :func:`lightning_ft.functional.distances` takes
    the norms of all groups. They stay on the device; the host reads them where a logger or a checkpoint asks for them.
    Logs ``drift/<group>`` (relative) and ``drift/total`` (of all but the head) to the trainer's loggers. The table is
    part of the callback's state: a resumed run goes on with it. When the fit ends, or breaks off, a heat map of groups
    against steps is drawn, where matplotlib is installed (extra ``plot``).

    Left out, and named in the report: layers that LayerReinit drew anew, which have no pretrained values. Left out,
    too: what is frozen when the fit starts, and the head, whose start means nothing, unless ``head``. Under FSDP2 each
    process measures its own part, and sums are taken over all.

    Args:
        every: Time between two measurements: ``"50 steps"`` (optimiser steps), ``"1 epoch"``, or a share of training.
        path: The picture: ``.png``, ``.svg`` or ``.pdf``; by default ``drift.png`` in the trainer's default_root_dir.
        head: Also the head, against its own start, as a row of its own.
        points: Measurements kept at most; where there are more, every second one is left out.
        layers: Where the blocks and the head are, if they are not found by themselves.
        storage: Where θ⁰ is kept, as in :class:`~lightning_ft.callbacks.L2SP`.

    Raises:
        ValueError: An argument is out of range; nothing pretrained trains; on resume, the model does not start from the
            weights that the interrupted run started from; FSDP1 or DeepSpeed; ``head`` with a sharded one.
        ImportError: A ``path`` is given, and matplotlib is not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DriftReport("100 steps")], logger=False)
    """

    def __init__(
        self,
        every: float | str = 0.01,
        *,
        path: str | os.PathLike[str] | None = None,
        head: bool = False,
        points: int = 400,
        layers: Layers | None = None,
        storage: Storage | None = None,
    ) -> None:
        if points < 2:
            raise ValueError(f"points={points} must be 2 or more")
        self.every = Duration.parse(every, "every")
        self.path = None if path is None else Path(path)
        self.head = head
        self.points = points
        self.layers = layers or Layers()
        self._anchoring = Anchoring(self, lambda module: pretrained_and_new(self, module, self.layers)[0], storage)
        self._reset()

    def _reset(self) -> None:
        self._groups: list[str] = []
        self._steps: list[int] = []
        self._rows: list[Tensor] = []
        self._done = self._step = 0
        self._norms = torch.empty(0)
        self._left_out: list[str] = []
        self._start: dict[str, Tensor] = {}
        self._pairs: list[tuple[list[nn.Parameter], list[Tensor]]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()
            self._anchoring.watch(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._anchoring.restoring()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        if self.path is not None and find_spec("matplotlib") is None:
            raise ImportError(f'path={str(self.path)!r} needs matplotlib: pip install "lightning-ft[plot]"')
        body = pretrained_and_new(self, pl_module, self.layers)[0]
        anchor = self._anchoring.take(body)
        self._body = dict(zip((name for name, _ in body), anchor.like(body), strict=True))
        self._squares = anchor.squares

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._anchoring.recheck(trainer)
        self.every.count(training_progress(trainer, 0))  # refuses a share of an endless training
        # Only here are callbacks restored under every strategy.
        members, references = self._members(pl_module)
        if self._groups and self._groups != list(members):
            raise ValueError(
                f"DriftReport measured the groups {self._groups} in the interrupted run, and would measure "
                f"{list(members)} now: keep head=, layers= and what is frozen as they were"
            )
        self._groups = list(members)
        named = list(members.values())
        self._pairs = [([p for _, p in group], [references[n] for n, _ in group]) for group in named]
        squares = {**self._squares, **{n: t.cpu().double().square().sum() for n, t in self._start.items()}}
        each = [squares_over_processes([squares[n] for n, _ in g], like=[references[n] for n, _ in g]) for g in named]
        self._norms = torch.tensor(each, dtype=torch.float64).sqrt().float()
        kept = [i for i, step in enumerate(self._steps) if step <= trainer.global_step]
        self._steps, self._rows = [self._steps[i] for i in kept], [self._rows[i] for i in kept]
        self._step = trainer.global_step

    def _members(self, module: LightningModule) -> tuple[dict[str, list[tuple[str, nn.Parameter]]], dict[str, Tensor]]:
        """The groups that are measured, and the references of their parameters by name."""
        groups, fresh, references = self.layers.of(module), fresh_parameters(module), dict(self._body)
        named = {group: list(groups.named_parameters(group)) for group in groups}
        self._left_out = [name for pairs in named.values() for name, p in pairs if p in fresh]
        members = {group: [pair for pair in pairs if pair[0] in self._body] for group, pairs in named.items()}
        if self.head and "head" in named:
            head = [(name, p) for name, p in named["head"] if p.requires_grad and p not in fresh]
            if any(hasattr(p, "placements") for _, p in head):
                raise ValueError("head=True does not serve a sharded head: its start is kept whole, leave it out")
            # Its start is drawn anew in each process, so that only a checkpoint tells a resumed run what it was.
            self._start = {n: self._start.get(n, p.detach().clone()).to(p.device) for n, p in head}
            references |= self._start
            members["head"] = head
        return {group: pairs for group, pairs in members.items() if pairs}, references

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            due = self.every.count(training_progress(trainer, batch_idx + 1))
            if due > self._done:
                self._measure(trainer)
            self._done = due

    def _measure(self, trainer: Trainer) -> None:
        self._rows.append(distances(self._pairs))
        self._steps.append(trainer.global_step)
        if len(self._steps) > self.points:
            del self._steps[-2::-2], self._rows[-2::-2]
        if trainer.loggers:
            values = self._relative()[-1:].tolist()[0]
            numbers = {f"drift/{name}": value for name, value in zip(self._groups, values, strict=True)}
            numbers["drift/total"] = self._total()
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

    def _absolute(self) -> Tensor:
        self._rows = [row.cpu() for row in self._rows]  # once for each
        return torch.stack(self._rows) if self._rows else torch.empty(0, len(self._groups))

    def _relative(self) -> Tensor:
        return self._absolute() / self._norms

    def _total(self) -> float:
        body = [i for i, name in enumerate(self._groups) if name != "head"]
        moved: Tensor = torch.linalg.vector_norm(self._absolute()[-1, body])
        return float(moved / torch.linalg.vector_norm(self._norms[body]))

    def report(self) -> Report:
        """The last measurement, and how far each group was at its farthest."""
        if not self._rows:
            return Report("Drift from the pretrained weights")
        absolute, relative = self._absolute(), self._relative()
        facts: dict[str, Any] = {"optimiser step": self._steps[-1], "measurements": len(self._steps)}
        facts["total, relative"] = self._total()
        if self._left_out:
            facts["left out, drawn anew"] = f"{len(self._left_out)} tensors from {self._left_out[0]}"
        columns = absolute[-1].tolist(), relative[-1].tolist(), relative.amax(0).tolist()
        rows = [
            {"group": name, "absolute": a, "relative": r, "farthest": f}
            for name, a, r, f in zip(self._groups, *columns, strict=True)
        ]
        return Report("Drift from the pretrained weights", facts, rows)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps[-1:] != [trainer.global_step] and trainer.global_step > 0:
            self._measure(trainer)
        rank_zero_info(str(self.report()))
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        dry = not trainer.is_global_zero or trainer.fast_dev_run  # type: ignore[attr-defined]
        if dry or not (self._steps and self._pairs) or (self.path is None and find_spec("matplotlib") is None):
            return
        path = self.path or Path(trainer.default_root_dir) / "drift.png"
        table = self._relative().tolist()
        plot_drift(self._groups, self._steps, table, path, title=f"{type(module).__name__}: drift from the start")
        rank_zero_info(f"DriftReport: {path}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._draw(trainer, pl_module)
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        self._pairs, self._body = [], {}
        self._anchoring.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        table = {"groups": list(self._groups), "steps": list(self._steps), "absolute": self._absolute()}
        start = {name: tensor.cpu() for name, tensor in self._start.items()}
        return {"fingerprint": self._anchoring.fingerprint, "done": self._done, "head": start, **table}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._anchoring.fingerprint = state_dict["fingerprint"]
        self._done, self._start = state_dict["done"], dict(state_dict["head"])
        self._groups, self._steps = list(state_dict["groups"]), list(state_dict["steps"])
        self._rows = list(state_dict["absolute"].unbind())
