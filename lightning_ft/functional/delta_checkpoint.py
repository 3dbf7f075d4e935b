"""Checkpoints without the weights that a pretrained model's own files hold already."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ft.core.files import atomic_file
from lightning_ft.core.report import Report
from lightning_ft.functional.delta import content_hash, decode_delta, delta_bytes, encode_delta

DELTA = "lightning_ft_delta"
"""Key of a checkpoint under which it keeps its weights as differences, in place of ``state_dict``."""


class Base:
    """The weights that checkpoints are differences to: read when first needed, memory-mapped.

    Args:
        path: A ``.safetensors`` file, or a pretrained folder that holds ``model.safetensors``, whole or in parts.

    Raises:
        FileNotFoundError: There is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files = _files(self.path)
        self._tensors: dict[str, Tensor] | None = None
        self._hash: str | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        if self._tensors is None:
            from safetensors.torch import load_file

            self._tensors = {name: tensor for file in self._files for name, tensor in load_file(file).items()}
        return self._tensors

    @property
    def sha256(self) -> str:
        """The hash of its content: names, types, shapes and bytes."""
        self._hash = self._hash or content_hash(self.tensors)
        return self._hash


def save_base(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a module's weights as a base, where no pretrained file holds them: call it before the training.

    Args:
        tensors: ``module.state_dict()``.
        path: The ``.safetensors`` file; written whole or not at all.
    """
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        # Tied weights share memory, which the format refuses.
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, temporary)


def to_delta(checkpoint: Mapping[str, Any], base: Base) -> tuple[dict[str, Any], Report]:
    """A checkpoint whose ``state_dict`` is kept as what differs from the base, and its sizes.

    All else (optimisers, callbacks, loops) stays as it is. The base's path and the hash of its content go along.
    """
    state = checkpoint["state_dict"]
    entries = encode_delta(state, base.tensors)
    stored = {"base": str(base.path.absolute()), "sha256": base.sha256, "tensors": entries}
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    storages = {t.data_ptr(): t.numel() * t.element_size() for t in state.values()}
    kinds = [entry["kind"] for entry in entries.values()]
    facts = {
        "weights, bytes": sum(storages.values()),
        "kept, bytes": delta_bytes(entries),
        **{f"tensors kept as {kind}": kinds.count(kind) for kind in dict.fromkeys(kinds)},
    }
    return {**rest, DELTA: stored}, Report("Delta checkpoint", facts)


def from_delta(checkpoint: Mapping[str, Any], base: Base | None = None, *, source: str = "the checkpoint") -> Any:
    """The checkpoint with its whole ``state_dict``; one that is no delta as it is.

    Args:
        checkpoint: What was loaded.
        base: The base; by default the one whose path it names.
        source: What to call the checkpoint in errors.

    Raises:
        FileNotFoundError: The base is not where it was.
        ValueError: It is another base.
    """
    if DELTA not in checkpoint:
        return checkpoint
    stored = checkpoint[DELTA]
    if base is None:
        try:
            base = Base(stored["base"])
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{source} keeps only what differs from {stored['base']}, which is not there any more: say where it is "
                "now, by lightning_ft.functional.restore_delta(checkpoint, base, out=...), which writes a whole one, "
                "or by Trainer(plugins=DeltaCheckpointIO(base))"
            ) from error
    if base.sha256 != stored["sha256"]:
        raise ValueError(
            f"{source} keeps what differs from weights with sha256 {stored['sha256'][:16]}… (then in {stored['base']}),"
            f" and those in {base.path} have {base.sha256[:16]}…: give the base that it was saved with"
        )
    rest = {key: value for key, value in checkpoint.items() if key != DELTA}
    return {**rest, "state_dict": decode_delta(stored["tensors"], base.tensors)}


def restore_delta(
    checkpoint: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """A delta checkpoint's file as the whole checkpoint, bit for bit; read without running any code in it.

    Args:
        checkpoint: The file.
        base: Its base, a pretrained folder or ``.safetensors`` file; by default where it was when it was saved.
        out: Where to write the whole checkpoint, if anywhere.

    Raises:
        FileNotFoundError: The base is not there.
        ValueError: It is another base.
    """
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    whole: dict[str, Any] = from_delta(loaded, None if base is None else Base(base), source=str(checkpoint))
    if out is not None:
        with atomic_file(out) as temporary:
            torch.save(whole, temporary)
    return whole


def _files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if (single := path / "model.safetensors").is_file():
        return [single]
    if (index := path / "model.safetensors.index.json").is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [path / name for name in sorted(set(names))]
    raise FileNotFoundError(
        f"base={str(path)!r} must be a .safetensors file, or a folder that holds model.safetensors (or its index)"
    )
