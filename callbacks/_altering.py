"""A change of the model that a callback makes once, at the right moment of every stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_ft.callbacks._surgery import when_built
from lightning_ft.core.report import Report
from lightning_ft.functional.alterations import alter, altered


class Altering:
    """Alter the module when it is built, unless just that was done to it already.

    It acts at every stage, since a checkpoint of the altered model is to be loaded before validation, test and
    prediction, too. The model stays altered after the fit. A precision plugin that quantises does so before, so that
    what is added finds the layers that will run. Checkpoints are the module's own matter, see
    :func:`lightning_ft.functional.alterations.alter`.

    Args:
        kind: What :func:`~lightning_ft.functional.alterations.alter` knows it as.
        settings: Its plain arguments.
        quantised: Whether it acts on quantised weights, where there are any; else the plugin quantises what it leaves.

    Attributes:
        report: Of the change; None where it was made before.
    """

    def __init__(self, kind: str, settings: Mapping[str, Any], *, quantised: bool = True) -> None:
        self.kind = kind
        self.quantised = quantised
        self.settings = dict(settings)
        self.report: Report | None = None
        self._forget: Callable[[], None] | None = None

    def setup(self, trainer: Trainer, module: LightningModule, then: Callable[[], object] | None = None) -> None:
        """Call in ``setup``, at any stage.

        Args:
            trainer: The trainer.
            module: The module.
            then: What else to do once it is altered, or was before.
        """
        self.release()
        self.report = None

        def act() -> None:
            quantise = getattr(trainer.precision_plugin, "quantise", None)
            if quantise is not None and self.quantised:
                quantise(module)
            if not altered(module, self.kind, self.settings):
                self.report = alter(module, self.kind, self.settings)
            if then is not None:
                then()

        self._forget = when_built(module, act)

    def release(self) -> None:
        """Call in ``teardown`` and ``on_exception``."""
        if self._forget is not None:
            self._forget()
            self._forget = None
