"""FourBit and EightBit with lightning_ft's own modules and with changes that checkpoints remember."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_ft.callbacks import Freeze
from lightning_ft.callbacks._altering import Altering
from lightning_ft.export.bake import baked, core_model
from lightning_ft.functional.alterations import PART, alterations
from lightning_ft.functional.quantise import quantised_layers
from lightning_ft.functional.quantised_tensor import QuantisedTensor
from lightning_ft.plugins.eight_bit import EightBit
from lightning_ft.plugins.four_bit import FourBit
from tests.alteration import KIND, make_known
from tests.methods import Cell, Method


class Adapters(Callback):
    """Adapters put in at the usual moment, after quantisation or before."""

    def __init__(self, early: bool) -> None:
        self.altering = Altering(KIND, {"seed": 1}, quantised=early)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.altering.setup(trainer, pl_module)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self.altering.release()


@pytest.mark.parametrize(("kind", "plugin"), [("bert", FourBit), ("gpt2", FourBit), ("t5", EightBit)])
def test_a_head_over_a_quantised_backbone(kind: Any, plugin: Any, tmp_path: Path) -> None:
    tolerance = 1e-6 if plugin is FourBit else 0.05
    method = Method(lambda: ([Freeze("head")], [plugin()]), freezes=False, tolerance=tolerance)
    cell = Cell(method, kind, tmp_path)
    assert len(quantised_layers(cell.trained)) >= 12
    cell.trains()
    cell.resumes()
    cell.reloads()
    cell.merges()
    plain, done = baked(core_model(cell.trained.model))
    assert not quantised_layers(plain)
    assert "quantised weights as floats" in done
    assert len(quantised_layers(cell.trained)) >= 12  # left as it was
    stored = torch.load(cell.checkpoint, weights_only=True)["state_dict"]
    assert sum(isinstance(value, QuantisedTensor) for value in stored.values()) == len(quantised_layers(cell.trained))


@pytest.mark.parametrize("early", [True, False])
def test_adapters_over_a_quantised_base(early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base stays out of the checkpoint and is quantised anew, to the same bits."""
    make_known(monkeypatch)
    cell = Cell(Method(lambda: ([Adapters(early)], [FourBit()])), "bert", tmp_path)
    kinds = [record["kind"] for record in alterations(cell.trained)]
    assert kinds == (["quantise", KIND] if early else [KIND, "quantise"])
    assert len(quantised_layers(cell.trained)) == 19
    packed = {f"{path}.weight" for path in quantised_layers(cell.trained)}
    saved = torch.load(cell.checkpoint, weights_only=True)
    assert packed <= set(saved[PART]["keys"])
    assert not packed & saved["state_dict"].keys()
    assert all("base" not in name for name in saved["state_dict"])
    cell.resumes()
    cell.reloads()
