"""Where the blocks of a model are as modules, and which module above them runs on token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_ft.core.data_flow import first_fed
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.functional.prefix_rows import Unsuited

_OTHERS = ("embeddings", "tail", "head")


@dataclass(frozen=True)
class PrefixLayout:
    """The modules that a cache of a frozen prefix has to do with.

    Args:
        blocks: The blocks, bottom to top.
        owner: The innermost module above them that runs on token ids.
        above: The modules above the owner, innermost first.
        around: The owner and what lies between it and the blocks: all that a block's own run is part of.
    """

    blocks: Sequence[nn.Module]
    owner: nn.Module
    above: Sequence[nn.Module]
    around: Sequence[nn.Module]

    @classmethod
    def of(cls, module: nn.Module, groups: LayerGroups) -> PrefixLayout:
        """Find them in ``module``.

        Raises:
            Unsuited: The model has no single stack of blocks under a module that runs on token ids, or is sharded or
                compiled.
        """
        path = _block_list(module, groups)
        parts = path.split(".") if path else []
        lineage = [module.get_submodule(".".join(parts[:i])) for i in reversed(range(len(parts)))]
        blocks = list(module.get_submodule(path).children())
        _refuse_wrappers(module, lineage)
        for i, ancestor in enumerate(lineage):
            inside = set(module.get_submodule(path).modules())
            embeds = any(isinstance(m, nn.Embedding) and m not in inside for m in ancestor.modules())
            if embeds and first_fed(ancestor, blocks)[0]:
                return cls(blocks, ancestor, lineage[i + 1 :], [*lineage[: i + 1], module.get_submodule(path)])
        raise Unsuited(f"no module above {path!r} runs on token ids alone")


def frozen_depth(groups: LayerGroups) -> int:
    """How many of the lowest blocks are frozen together with the embeddings: 0 if the embeddings train."""
    depth = 0
    for name in groups:
        if name in _OTHERS[1:] or any(p.requires_grad for p in groups.parameters(name)):
            break
        depth += name != "embeddings"
    return depth


def parameters_of(groups: LayerGroups, depth: int) -> list[nn.Parameter]:
    """The parameters of the embeddings and of the lowest ``depth`` blocks."""
    names = [name for name in ("embeddings", *blocks_of(groups)[:depth]) if name in groups]
    return [parameter for name in names for parameter in groups.parameters(name)]


def blocks_of(groups: LayerGroups) -> list[str]:
    """Names of the groups that are blocks, bottom to top."""
    return [name for name in groups if name not in _OTHERS]


def _block_list(module: nn.Module, groups: LayerGroups) -> str:
    """Path of the one list whose children hold the parameters of the blocks, in order."""
    names = blocks_of(groups)
    owned = [set(groups.parameters(name)) for name in names]
    found: list[str] = []
    for path, child in module.named_modules():
        if not isinstance(child, (nn.ModuleList, nn.Sequential)) or any(f"{path}.".startswith(f"{f}.") for f in found):
            continue
        blocks = [set(block.parameters()) for block in child.children()]
        if len(blocks) == len(owned) and all(b and b <= o for b, o in zip(blocks, owned, strict=True)):
            found.append(path)
    if len(found) != 1:
        raise Unsuited(f"the {len(names)} blocks are not the children of one list ({len(found)} lists fit)")
    return found[0]


def _refuse_wrappers(module: nn.Module, lineage: Sequence[nn.Module]) -> None:
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in lineage):
        raise Unsuited("the model is compiled")
    if torch.distributed.is_available() and _is_sharded(module):
        raise Unsuited("the model is sharded")


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    wrapped = any(isinstance(m, FullyShardedDataParallel) for m in module.modules())
    return wrapped or any(isinstance(p, DTensor) for p in module.parameters())
