"""One adapter as a small folder: its weights by place, not by name, so that they fit under any head."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.core.files import atomic_folder
from lightning_ft.core.layers import Layers, plain_layers
from lightning_ft.core.report import Report
from lightning_ft.functional.adapter_layers import Adapters, all_adapters
from lightning_ft.functional.adapter_places import AdapterSpec, adapter_names
from lightning_ft.functional.alterations import alter
from lightning_ft.functional.delta import content_hash
from lightning_ft.functional.invertible_adapter import all_couplings

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter.safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """What a folder holds.

    Args:
        spec: How the adapter is built, and its name.
        tensors: ``block.3.0.down.weight``: of the first place in block 3; ``embeddings.first.up.bias``.
        base: SHA-256 of the blocks that it was trained in.
    """

    spec: AdapterSpec
    tensors: dict[str, Tensor]
    base: str


def save_adapter(
    module: nn.Module, folder: str | os.PathLike[str], *, name: str = "default", layers: Layers | None = None
) -> Report:
    """Write one adapter, its configuration and a hash of the blocks that it was trained in.

    Args:
        module: A module that has it.
        folder: Replaced if an adapter lies there; the old one is kept beside it, as ``<folder>.previous``.
        name: Of the adapter.
        layers: Where the blocks are, if they are not found by themselves.

    Raises:
        ValueError: There is no such adapter; norms train, which belong to the model and not to an adapter.
        FileExistsError: Something else is in the folder.
    """
    from safetensors.torch import save_file

    if name not in adapter_names(module):
        raise ValueError(f"name={name!r} must be one of the adapters {', '.join(adapter_names(module)) or '(none)'}")
    if trained := _trained_in_blocks(module, layers or Layers()):
        raise ValueError(
            f"{trained[0]} trains beside the adapters, and an adapter's folder holds adapters alone: save the "
            "checkpoint, or train without train_norms"
        )
    held = {key: p.detach().cpu().clone() for key, p in _parameters(module, name, layers or Layers())}
    facts = {**_spec(module, name).plain(), "base_sha256": _base_hash(module, layers or Layers())}
    with atomic_folder(folder, replace=lambda path: (path / _CONFIG).is_file()) as target:
        save_file(held, target / _WEIGHTS)
        (target / _CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        size = (target / _WEIGHTS).stat().st_size
    return Report("Saved adapter", {"name": name, "tensors": len(held), "bytes": size, "folder": os.fspath(folder)})


def load_adapter(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    check: bool = True,
    layers: Layers | None = None,
) -> Report:
    """Add a saved adapter, frozen; :func:`~lightning_ft.functional.bottleneck.use_adapters` puts it to work.

    Where the module has an adapter of this name and shape, its weights are replaced: a language is swapped for
    another, and nothing else changes.

    Args:
        module: Any module around the same pretrained model.
        folder: What :func:`save_adapter` wrote.
        name: Another name for it.
        check: Refuse an adapter that was trained in other blocks; a base in another dtype counts as one.
        layers: Where the blocks are, if they are not found by themselves.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: It was trained in another model; there is another adapter of this name.
    """
    file = read_adapter(folder, name)
    if check:
        check_base(module, file, layers)
    if file.spec.name not in adapter_names(module):
        settings: dict[str, Any] = {"adapters": [file.spec.plain()], "use": False, "layers": plain_layers(layers)}
        alter(module, "frozen_adapters", settings)
    fill_adapter(module, file, layers=layers)
    return Report("Loaded adapter", {"name": file.spec.name, "kind": file.spec.kind, "tensors": len(file.tensors)})


def read_adapter(folder: str | os.PathLike[str], name: str | None = None) -> AdapterFile:
    """What :func:`save_adapter` wrote.

    Raises:
        FileNotFoundError: There is no adapter.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    if not (path / _CONFIG).is_file():
        raise FileNotFoundError(f"{path} holds no adapter ({_CONFIG} and {_WEIGHTS}): write one with save_adapter")
    facts = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    spec = AdapterSpec.of({**facts, "name": name or facts["name"]})
    return AdapterFile(spec, load_file(path / _WEIGHTS), facts["base_sha256"])


def fill_adapter(module: nn.Module, file: AdapterFile, *, layers: Layers | None = None) -> None:
    """Load the weights of an adapter into one of its name and shape.

    Raises:
        ValueError: The module's adapter has another shape.
    """
    own = dict(_parameters(module, file.spec.name, layers or Layers()))
    wrong = sorted(own.keys() ^ file.tensors.keys())
    wrong += [key for key in own if key not in wrong and own[key].shape != file.tensors[key].shape]
    if wrong:
        raise ValueError(f"the adapter {file.spec.name!r} in the model is another one than in the file: {wrong[0]}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(file.tensors[key])


def check_base(module: nn.Module, file: AdapterFile, layers: Layers | None = None) -> None:
    """See that an adapter was trained in the blocks of this module.

    Raises:
        ValueError: It was not.
    """
    if (found := _base_hash(module, layers or Layers())) != file.base:
        raise ValueError(
            f"the adapter {file.spec.name!r} was trained in blocks with sha256 {file.base[:16]}…, and those of "
            f"{type(module).__name__} have {found[:16]}…: build it from the same pretrained weights (or load it with "
            "check=False, where they differ in no more than their dtype)"
        )


def _parameters(module: nn.Module, name: str, layers: Layers) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of an adapter by where they are: a stranger's module has other names for the same places."""
    for group, paths in layers.block_paths(module).items():
        found = [a for path in paths for _, a in all_adapters(module.get_submodule(path)) if name in a.names()]
        for index, adapters in enumerate(found):
            for key, parameter in adapters.adapter(name).named_parameters():
                yield f"{group}.{index}.{key}", parameter
    for couplings in all_couplings(module):
        if name in couplings.names():
            for key, parameter in couplings.get_submodule(name).named_parameters():
                yield f"embeddings.{key}", parameter


def _spec(module: nn.Module, name: str) -> AdapterSpec:
    first: Adapters = next(a for _, a in all_adapters(module) if name in a.names())
    return AdapterSpec.of(first.specs[name])


def _inside(module: nn.Module, layers: Layers) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the blocks that are no adapter's."""
    own = {p for _, adapters in all_adapters(module) for p in adapters.parameters()}
    for paths in layers.block_paths(module).values():
        for path in paths:
            yield from ((f"{path}.{n}", p) for n, p in module.get_submodule(path).named_parameters() if p not in own)


def _trained_in_blocks(module: nn.Module, layers: Layers) -> list[str]:
    return [name for name, parameter in _inside(module, layers) if parameter.requires_grad]


def _base_hash(module: nn.Module, layers: Layers) -> str:
    """Of the blocks' weights that are not quantised, by their order: names may differ."""
    tensors = (p for _, p in _inside(module, layers) if p.is_floating_point())
    return content_hash({f"{index:06}": tensor for index, tensor in enumerate(tensors)})
