"""AdapterFusion: use what adapters of several tasks have learnt, for another task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft.callbacks._altering import Altering
from lightning_ft.callbacks._frozen_adapters import FrozenAdapters
from lightning_ft.core.layers import Layers, plain_layers
from lightning_ft.functional.adapter_files import AdapterFile, read_adapter
from lightning_ft.functional.adapter_layers import check_hooked

_Folders = Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]


class AdapterFusion(Callback):
    """Train an attention over frozen adapters at each of their places, and the head: y ← y + Σₙ αₙ V zₙ.

    What :func:`lightning_ft.functional.adapter_fusion.add_fusion` does, in ``setup``, or at the end of
    ``configure_model`` for a model that is built late. α = softmaxₙ(Q h · K zₙ), of the adapters' input h and of what
    each would add, zₙ; V is the identity at first. Checkpoints hold adapters, fusion and head, and need the adapters'
    folders no more. Weight decay pulls V to the identity, which is the paper's penalty.

    Args:
        adapters: Folders of adapters (:func:`~lightning_ft.functional.adapter_files.save_adapter`), two or more,
            of one kind; or name to folder, where the adapters were saved under the same name.
        below: Folders of adapters at work below the fusion, such as a language's.
        seed: Of the first weights of queries and keys.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Raises:
        ValueError: There are fewer than two adapters, or two of one name; they are at different places; an adapter was
            trained in another model.
        FileNotFoundError: A folder holds no adapter.
        RuntimeError: Layers with adapters were replaced, by a quantisation.

    Example:
        >>> AdapterFusion({"mnli": "adapters/mnli", "sst2": "adapters/sst2"}).seed
        0

    Reference:
        Pfeiffer, Kamath, Rücklé, Cho and Gurevych 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer
        Learning".
    """

    def __init__(
        self,
        adapters: _Folders,
        *,
        below: Sequence[str | os.PathLike[str]] = (),
        seed: int = 0,
        layers: Layers | None = None,
    ) -> None:
        if isinstance(adapters, str) or len(adapters) < 2:
            raise ValueError(f"adapters={adapters!r} must be the folders of two adapters or more, or names to folders")
        self.adapters = adapters
        self.below = list(below)
        self.seed = seed
        self.layers = layers
        self._frozen = FrozenAdapters(layers)
        self._altering: Altering | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        below, fused = [read_adapter(folder) for folder in self.below], _read(self.adapters)
        names = [file.spec.name for file in fused]
        if len({*names, *(file.spec.name for file in below)}) < len(names) + len(below):
            raise ValueError(f"adapters: the names {', '.join(names)} must differ: pass them as {{name: folder}}")
        self._frozen.setup(trainer, pl_module, [*below, *fused], use=False)
        settings = {"names": names, "below": [file.spec.name for file in below], "seed": self.seed}
        self._altering = Altering("adapter_fusion", {**settings, "layers": plain_layers(self.layers)})
        self._altering.setup(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_hooked(pl_module)
        if self._altering is not None and self._altering.report is not None:
            rank_zero_info(f"AdapterFusion: {self._altering.report}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._frozen.release()
        if self._altering is not None:
            self._altering.release()


def _read(adapters: _Folders) -> list[AdapterFile]:
    if isinstance(adapters, Mapping):
        return [read_adapter(folder, name) for name, folder in adapters.items()]
    return [read_adapter(folder) for folder in adapters]
