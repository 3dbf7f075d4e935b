"""What diff pruning made of a task, as a small file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_ft.core.files import atomic_file
from lightning_ft.core.report import Report
from lightning_ft.functional.delta import Entry, content_hash, decode_delta, delta_bytes, encode_delta
from lightning_ft.functional.diff_pruning import SparseOffset, named_offsets, sparse_offsets

_META = "lightning_ft_sparse_delta"


@torch.no_grad()
def save_sparse_delta(module: nn.Module, path: str | os.PathLike[str]) -> Report:
    """Write what differs from the base, and the head: places (4 bytes; 8 beyond 2³¹ values) and values.

    Of each tensor the smallest of the forms of :func:`~lightning_ft.functional.delta.encode_delta`; 8 bytes for each
    value that was kept are the most it takes in fp32. The file holds a hash of the base's content.

    Args:
        module: After :func:`~lightning_ft.functional.diff_pruning.prune_offsets`.
        path: The ``.safetensors`` file; written whole or not at all.

    Raises:
        ValueError: The module is not pruned.
    """
    from safetensors.torch import save_file

    named = list(named_offsets(module))
    if not named or not named[0][1].fixed:
        raise ValueError(
            f"{type(module).__name__} is not pruned yet, so its difference is dense: call prune_offsets first, or let "
            "DiffPruning come to its fixed phase"
        )
    base = {name: weight.detach().cpu() for name, _, weight in named}
    now = {name: _sparse_value(offset, weight).cpu() for name, offset, weight in named}
    kept = sum(int(offset.log_alpha.isposinf().sum()) for _, offset, _ in named)
    entries = encode_delta(now, base)
    changed = sum(int((now[name] != base[name]).sum()) for name in base)
    assert changed <= kept, f"{changed} values differ, and {kept} were kept"
    size = delta_bytes(entries)
    widest = max(4 + value.element_size() for value in now.values())
    assert size <= kept * max(widest, 8), f"{size} bytes for {kept} values"
    owned = {id(p) for _, offset, weight in named for p in (weight, *offset.parameters())}
    head = {n: p.detach().cpu().contiguous() for n, p in module.named_parameters() if id(p) not in owned}
    tensors = {f"head//{name}": tensor.clone() for name, tensor in head.items()}
    plain: dict[str, Entry] = {}
    for name, entry in entries.items():
        plain[name] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        tensors |= {f"{key}//{name}": value for key, value in entry.items() if isinstance(value, Tensor)}
    values = sum(weight.numel() for weight in base.values())
    told = {"sha256": content_hash(base), "entries": plain, "kept": kept, "values": values}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={_META: json.dumps(told)})
    facts = {
        "values": values,
        "kept": kept,
        "share": kept / values,
        "changed": changed,
        "difference, bytes": size,
        "head, bytes": sum(t.numel() * t.element_size() for t in head.values()),
        "file": os.fspath(path),
    }
    return Report("Sparse difference", facts)


@torch.no_grad()
def load_sparse_delta(module: nn.Module, path: str | os.PathLike[str]) -> Report:
    """Change a freshly built module's plain weights, in place, to those that :func:`save_sparse_delta` was given.

    Args:
        module: With the pretrained weights that the difference is to.
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file; the base is another one; the module is altered, or has other tensors.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if sparse_offsets(module):
        raise ValueError("module is altered by diff pruning: a sparse difference is loaded into a freshly built one")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    if _META not in metadata:
        raise ValueError(f"{path} is no sparse difference: save_sparse_delta writes one")
    told = json.loads(metadata[_META])
    entries: dict[str, Entry] = told["entries"]
    own = dict(module.named_parameters(remove_duplicate=False))
    head = {key.removeprefix("head//"): t for key, t in tensors.items() if key.startswith("head//")}
    if missing := [name for name in (*entries, *head) if name not in own]:
        raise ValueError(f"{path} changes {', '.join(missing[:3])}, and {type(module).__name__} has no such parameter")
    base = {name: own[name].detach().cpu() for name in entries}
    if (found := content_hash(base)) != told["sha256"]:
        raise ValueError(
            f"{path} is a difference to weights with sha256 {told['sha256'][:16]}…, and those of this "
            f"{type(module).__name__} have {found[:16]}…: build it from the same pretrained weights"
        )
    for key, tensor in tensors.items():
        part, _, name = key.partition("//")
        if part != "head":
            entries[name][part] = tensor
    for name, value in {**decode_delta(entries, base), **head}.items():
        if own[name].shape != value.shape:
            raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}, the module's {tuple(own[name].shape)}")
        own[name].copy_(value)
    facts = {"values": told["values"], "kept": told["kept"], "share": told["kept"] / told["values"]}
    return Report("Sparse difference loaded", facts)


def _sparse_value(offset: SparseOffset, weight: Tensor) -> Tensor:
    """θ, with the base's own bits where nothing is added: -0.0 + 0 would be another zero."""
    added = offset.gate() * offset.delta
    return torch.where(added != 0, (weight.to(added.dtype) + added).to(weight.dtype), weight)
