"""A file of made-up Fisher information that fits every stranger: what F really is has tests of its own."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch

from lightning_ft.core.fisher import Fisher
from lightning_ft.core.layers import Layers
from tests.strangers import STRANGERS


@cache
def fisher_file() -> Path:
    """Its values are in [0, 1]; the same in every process."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for stranger in STRANGERS:
        module = stranger.module()
        if stranger.name == "late":
            module.configure_model()
        groups = Layers().of(module)
        for name, parameter in (pair for group in groups if group != "head" for pair in groups.named_parameters(group)):
            tensors.setdefault(name, torch.rand(parameter.shape, generator=generator))
    path = Path(tempfile.mkdtemp()) / "fisher.safetensors"
    Fisher(tensors, 7, "exact").save(path)
    return path
