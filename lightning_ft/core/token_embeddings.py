"""Which embeddings of a model are those of its tokens, read off the data flow of one run on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ft.core.data_flow import meta_run
from lightning_ft.core.sub_layers import modules_above


def token_embeddings(module: nn.Module, blocks: Sequence[str]) -> list[nn.Embedding]:
    """The embeddings that look up the token ids, as they are given, in a run on the meta device.

    Args:
        module: Any module.
        blocks: Paths of its blocks.

    Raises:
        ValueError: None does.
    """
    for owner in map(module.get_submodule, modules_above(blocks)):
        twins: dict[nn.Module, nn.Module] = {}
        lookups = _Lookups()
        # What the run breaks off at comes after the embeddings.
        with suppress(Exception), torch.no_grad(), meta_run(owner, twins) as (twin, ids):
            lookups.ids = {_storage(tensor) for tensor in ids.values()}
            with lookups:
                twin(**ids)
        embeddings = [c for c in owner.modules() if isinstance(c, nn.Embedding) and c in twins]
        if found := [c for c in embeddings if _storage(twins[c].weight) in lookups.tables]:
            return found
    raise ValueError(f"{type(module).__name__} has no nn.Embedding that looks up token ids")


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which tables are looked up at token ids. A view has the storage of what it is a view of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ids: set[int] = set()
        self.tables: set[int] = set()
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default) and _storage(args[0]) in self.ids:
            self.ids.add(_storage(output))
            self.alive.append(output)  # the number of a storage is reused once it is gone
        if func is torch.ops.aten.embedding.default and _storage(args[1]) in self.ids:
            self.tables.add(_storage(args[0]))
        return output


def _storage(tensor: Any) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number
