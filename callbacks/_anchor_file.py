"""Anchors on disk: memory-mapped from the pretrained checkpoint itself where it holds them, else from our own file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_ft.core.anchor import Anchor
from lightning_ft.core.files import atomic_file


def anchor_on_disk(trainer: Trainer, module: LightningModule, parameters: Mapping[str, nn.Parameter]) -> Anchor:
    """The present values of ``parameters``, of which no copy stays in memory.

    Values that stand bit for bit in the safetensors file from which a model of ``transformers`` was loaded are mapped
    from there. All others are written to ``anchors/`` in the trainer's ``default_root_dir``. Call on all processes.

    Raises:
        ValueError: The parameters are sharded.
    """
    from safetensors.torch import save_file

    if sharded := next((name for name, p in parameters.items() if hasattr(p, "placements")), None):
        raise ValueError(
            f'storage="disk" does not serve {sharded}, which is sharded over processes: each holds its own part of '
            'the anchor only, so keep it there ("device", or "bf16" at half the size)'
        )
    exact = Anchor({name: parameter.detach() for name, parameter in parameters.items()})
    kept = _pretrained(module, parameters)
    rest = {name: p.detach() for name, p in parameters.items() if name not in kept}
    if rest:
        total = exact.select(rest).fingerprint()
        file = Path(trainer.default_root_dir) / "anchors" / f"{len(rest)}-{total['sum_of_squares'].hex()}.safetensors"
        if trainer.local_rank == 0:
            with atomic_file(file) as path:
                # Tied or sliced parameters share memory, which the format refuses.
                save_file({name: value.cpu().clone() for name, value in rest.items()}, path)
        trainer.strategy.barrier()
        kept |= dict(_read(file))
        mapped = len(parameters) - len(rest)
        rank_zero_info(f"Pretrained weights: {mapped} mapped from their checkpoint, {len(rest)} in {file}")
    return Anchor({name: kept[name] for name in parameters}, "disk", exact.squares)


def _pretrained(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Those parameters whose values stand in a checkpoint that a part of the module was loaded from."""
    found: dict[str, Tensor] = {}
    for folder in dict.fromkeys(_folders(module)):
        stored = dict(item for file in _files(folder) for item in _read(file))
        tails: dict[str, list[str]] = {}
        for key in stored:
            for tail in _tails(key):
                tails.setdefault(tail, []).append(key)
        for name, parameter in parameters.items():
            # A head keeps its backbone under an attribute, and a checkpoint may, too: the longest common end counts.
            keys = next((tails[tail] for tail in _tails(name) if tail in tails), [])
            if len(keys) == 1 and _same(stored[keys[0]], parameter.detach()):
                found[name] = stored[keys[0]]
    return found


def _same(stored: Tensor, value: Tensor) -> bool:
    if stored.shape != value.shape or not stored.is_floating_point():
        return False
    return torch.equal(stored.to(value.dtype), value.cpu())


def _tails(name: str) -> Iterator[str]:
    parts = name.split(".")
    # A bare "weight" or "dense.weight" names nothing.
    yield from (".".join(parts[i:]) for i in range(max(1, len(parts) - 2)))


def _folders(module: nn.Module) -> Iterator[Path]:
    for child in module.modules():
        place = getattr(child, "name_or_path", None)  # of a model of transformers
        if isinstance(place, str) and place:
            if Path(place).is_dir():
                yield Path(place)
            elif isinstance(cached := _from_hub(place), str):
                yield Path(cached).parent


def _from_hub(name: str) -> object:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):  # not the name of a repository
        return try_to_load_from_cache(name, "config.json")
    return None


def _files(folder: Path) -> list[Path]:
    if (single := folder / "model.safetensors").is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in dict.fromkeys(names)]


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are views of the mapped file: pages are read when used, and forgotten when memory is short."""
    from safetensors import safe_open

    with safe_open(file, framework="pt", device="cpu") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            yield name, tensors.get_tensor(name)
