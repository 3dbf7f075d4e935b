"""Bottleneck adapters (Houlsby, Pfeiffer, parallel) and MAD-X's language adapters, in any project."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft.callbacks._altering import Altering
from lightning_ft.callbacks._frozen_adapters import FrozenAdapters
from lightning_ft.core.layers import Layers, plain_layers
from lightning_ft.core.report import Report
from lightning_ft.functional.adapter_files import read_adapter, save_adapter
from lightning_ft.functional.adapter_layers import BottleneckConfig, check_hooked
from lightning_ft.functional.adapter_places import AdapterSpec
from lightning_ft.functional.bottleneck import AdapterKind


class BottleneckAdapters(Callback):
    """Freeze the model, and train small layers inside its blocks, y ← y + s·W_up φ(W_down h), and the head.

    What :func:`lightning_ft.functional.bottleneck.add_adapters` does, in ``setup``, or at the end of
    ``configure_model`` for a model that is built late: before a checkpoint is restored and before optimisers are made.
    Adapters are the identity at first. Checkpoints hold adapters and head alone. Adapters learn at higher rates than
    the whole model, 1e-4 to 1e-3.

    MAD-X: train a language adapter on texts of each language, and a task adapter above that of the language which has
    task data; then swap the language (:func:`~lightning_ft.functional.adapter_files.load_adapter`)::

        Trainer(callbacks=[BottleneckAdapters("mad-x", name="lang", save="adapters/en")]).fit(MaskedLM(...), english)
        Trainer(callbacks=[BottleneckAdapters("mad-x", name="lang", save="adapters/de")]).fit(MaskedLM(...), german)
        Trainer(callbacks=[BottleneckAdapters(name="task", below=["adapters/en"])]).fit(task := ..., english_task)
        load_adapter(task, "adapters/de")

    Args:
        kind: ``"pfeiffer"``, ``"houlsby"``, ``"parallel"`` or ``"mad-x"``.
        name: Of the adapters, a part of their parameters' names.
        config: Their shape; what is None in it is what is usual for the kind.
        below: Folders of trained adapters that stay frozen below these, bottom to top.
        train_norms: Train the norms of the blocks, too (as Houlsby does).
        save: Folder for the adapter alone, written at the end of the fit.
        places: Regular expressions on paths of modules inside blocks, where the sub-layers cannot be told by structure.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Attributes:
        report: What was added in this run; None if nothing was.

    Raises:
        ValueError: Whatever :func:`~lightning_ft.functional.bottleneck.add_adapters` refuses; an adapter of ``below``
            was trained in another model; parameters to ``save`` are sharded.
        FileNotFoundError: A folder of ``below`` holds no adapter.
        RuntimeError: Layers with adapters were replaced, by a quantisation.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[BottleneckAdapters("houlsby", train_norms=True)], logger=False)

    Reference:
        Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; Pfeiffer, Vulić, Gurevych and Ruder 2020,
        "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer"; He et al. 2022, "Towards a Unified
        View of Parameter-Efficient Transfer Learning" (parallel).
    """

    def __init__(
        self,
        kind: AdapterKind = "pfeiffer",
        *,
        name: str = "default",
        config: BottleneckConfig | None = None,
        below: Sequence[str | os.PathLike[str]] = (),
        train_norms: bool = False,
        save: str | os.PathLike[str] | None = None,
        places: Sequence[str] | None = None,
        layers: Layers | None = None,
    ) -> None:
        spec = AdapterSpec(name, kind, config or BottleneckConfig(), None if places is None else tuple(places))
        if save is not None and train_norms:
            raise ValueError(
                "save= writes adapters alone, and with train_norms=True they do not work without the norms"
            )
        self.name = name
        self.below = list(below)
        self.folder = save
        self.layers = layers
        settings = {**spec.plain(), "train_norms": train_norms, "layers": plain_layers(layers)}
        self._altering = Altering("bottleneck_adapters", settings)
        self._frozen = FrozenAdapters(layers)

    @property
    def report(self) -> Report | None:
        """What was added in this run."""
        return self._altering.report

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.below:
            self._frozen.setup(trainer, pl_module, [read_adapter(folder) for folder in self.below], use=True)
        self._altering.setup(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_hooked(pl_module)
        if self.report is not None:
            rank_zero_info(f"BottleneckAdapters: {self.report}")
        if self.folder is not None and any(hasattr(p, "placements") for p in pl_module.parameters()):
            raise ValueError(
                "save= needs the whole adapter in each process, and the parameters are sharded: leave it out"
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is not None and trainer.is_global_zero:
            save_adapter(pl_module, self.folder, name=self.name, layers=self.layers)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._altering.release()
        self._frozen.release()
