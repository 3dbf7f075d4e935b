"""Tensors as what differs from a base, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Entry = dict[str, Any]
"""How one tensor is kept: its kind, the base's name for it, and what differs."""


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever the order of the names.

    Example:
        >>> content_hash({"b": torch.zeros(2), "a": torch.ones(1)})[:12]
        '3fc05831b81e'
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode_delta(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Keep of each tensor what differs from the base, in the smallest of five forms.

    - ``base``: nothing, where all bits are the base's (converted to the tensor's dtype).
    - ``rows``: changed rows and their numbers, 4 bytes each: embeddings of which few tokens were met.
    - ``elements``: changed values and their places, 4 bytes each (8 beyond 2³¹ values): pays below 1/32 changed.
    - ``mask``: changed values and one bit for each value: pays below 31/32 (fp32) or 15/16 (bf16) changed.
    - ``whole``: the tensor.

    Names need not be equal: the base's is the one with the longest common end, of the same shape. Bits are compared, so
    that -0.0 and NaN come back as they were.

    Args:
        tensors: Names and tensors, on any device; kept on the CPU.
        base: Names and tensors of the base, on the CPU.

    Example:
        >>> encode_delta({"model.top.bias": torch.ones(3)}, {"top.bias": torch.ones(3)})
        {'model.top.bias': {'kind': 'base', 'name': 'top.bias', 'dtype': 'float32'}}
    """
    partners = _Partners(base)
    known: dict[Any, Entry] = {}
    result = {}
    for name, tensor in tensors.items():
        partner = partners.of(name, tensor)
        # Tied weights are encoded once, and saved once.
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, partner)
        if key not in known or tensor.numel() == 0:
            known[key] = _encode(tensor.detach(), partner, base)
        result[name] = known[key]
    return result


def decode_delta(entries: Mapping[str, Entry], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that :func:`encode_delta` was given, bit for bit, on the CPU; none shares memory with the base.

    Raises:
        ValueError: An entry is of no known kind.
    """
    return {name: _decode(entry, base) for name, entry in entries.items()}


def delta_bytes(entries: Mapping[str, Entry]) -> int:
    """Size of all that entries keep; what is tied counts once."""
    distinct = {id(entry): entry for entry in entries.values()}
    parts = (part for entry in distinct.values() for part in entry.values() if isinstance(part, Tensor))
    return sum(part.numel() * part.element_size() for part in parts)


class _Partners:
    """The base's names by their ends."""

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self.base = base
        self.ends: dict[str, list[str]] = {}
        for name in base:
            for end in _ends(name):
                self.ends.setdefault(end, []).append(name)

    def of(self, name: str, tensor: Tensor) -> str | None:
        found = next((self.ends[end] for end in _ends(name) if end in self.ends), [])
        alike = len(found) == 1 and self.base[found[0]].shape == tensor.shape and tensor.element_size() in _INTEGERS
        return found[0] if alike and not hasattr(tensor, "placements") else None


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    # A bare "weight" names nothing, unless it is the whole name.
    yield from (".".join(parts[i:]) for i in range(max(1, len(parts) - 1)))


def _encode(tensor: Tensor, partner: str | None, base: Mapping[str, Tensor]) -> Entry:
    value = tensor if hasattr(tensor, "placements") else tensor.cpu()
    if partner is None:
        return {"kind": "whole", "value": value}
    known = {"name": partner, "dtype": str(tensor.dtype).removeprefix("torch.")}
    changed = _bits(value) != _bits(base[partner].to(value.dtype))
    count = int(changed.sum())
    if count == 0:
        return {"kind": "base", **known}
    rows = changed.flatten(1).any(1) if value.ndim > 1 else changed.new_zeros(0)
    size, total = value.element_size(), value.numel()
    index = 4 if total < 2**31 else 8
    costs = {
        "whole": total * size,
        "elements": count * (size + index),
        "mask": count * size + -(-total // 8),
        "rows": int(rows.sum()) * (total // max(1, len(value)) * size + 4) if len(rows) else total * size,
    }
    kind = min(costs, key=costs.__getitem__)
    if kind == "whole":
        return {"kind": kind, "value": value}
    if kind == "rows":
        numbers = rows.nonzero().flatten()
        return {"kind": kind, **known, "index": numbers.int(), "values": value[numbers].clone()}
    places = changed.flatten().nonzero().flatten()
    values = value.reshape(-1)[places].clone()
    if kind == "mask":
        return {"kind": kind, **known, "mask": _packed(changed.flatten()), "values": values}
    return {"kind": kind, **known, "index": places.int() if index == 4 else places, "values": values}


def _decode(entry: Entry, base: Mapping[str, Tensor]) -> Tensor:
    kind = entry["kind"]
    if kind == "whole":
        value: Tensor = entry["value"]
        return value
    if kind not in ("base", "rows", "elements", "mask"):
        raise ValueError(f"the checkpoint keeps a tensor as {kind!r}, which this version of lightning_ft does not know")
    tensor = base[entry["name"]].to(getattr(torch, entry["dtype"]), copy=True, memory_format=torch.contiguous_format)
    if kind == "rows":
        tensor[entry["index"].long()] = entry["values"]
    elif kind == "elements":
        tensor.view(-1)[entry["index"].long()] = entry["values"]
    elif kind == "mask":
        tensor.view(-1)[_unpacked(entry["mask"], tensor.numel())] = entry["values"]
    return tensor


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _packed(flags: Tensor) -> Tensor:
    """Eight flags a byte, the first in the lowest bit."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, length: int) -> Tensor:
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[:length].bool()
