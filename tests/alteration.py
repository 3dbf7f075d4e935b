"""A change of any model that tests make: beside each linear layer outside the head a path of rank 1 that trains."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from lightning_ft.core.base_weights import mark_base
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional import alterations

KIND = "beside"


class Beside(nn.Module):
    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(1, base.in_features, generator=generator) / base.in_features)
        self.up = nn.Parameter(torch.zeros(base.out_features, 1))

    @property
    def weight(self) -> Tensor:  # nn.TransformerEncoderLayer asks for it before it decides not to compute by itself
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def add_beside(module: nn.Module, *, seed: int = 0) -> Report:
    groups = Layers().of(module)
    head = set(groups.parameters("head"))
    mark_base(module, [p for p in module.parameters() if p not in head])
    generator = torch.Generator().manual_seed(seed)
    for path, child in list(module.named_modules()):
        # Not within nn.MultiheadAttention, which never calls it.
        if type(child) is nn.Linear and child.weight not in head:
            setattr(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], Beside(child, generator))
    return Report("Beside")


def make_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lightning_ft know it; and torch's encoder call its layers in eval mode, too."""
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    file = ModuleType("lightning_ft.functional.beside")
    file.add_beside = add_beside  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setitem(alterations._KINDS, KIND, "beside:add_beside")
