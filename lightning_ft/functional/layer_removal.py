"""Removal of whole blocks from a model: the list, the configuration and the cache indices together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_ft.core.data_flow import first_fed
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional._hugging_face import hf_models
from lightning_ft.functional._shorter_config import depth_settings, shorter_twin, sync

_MARK = "dropped_layers"


def remove_layers(
    module: nn.Module, drop: str | Sequence[int], *, stack: str | None = None, layers: Layers | None = None
) -> Report:
    """Take blocks out of a model, in place; do it before fine-tuning, and before optimisers are made.

    The kept blocks move up, and settings that count them (``layer_idx``, under which attention finds its part of the
    cache) are renumbered. In a Hugging Face model the configuration is shortened with them: a copy is built on the
    meta device from the new configuration and must have just the kept blocks, so that a saved folder loads again with
    no missing key; else nothing is changed. Elsewhere the forward pass must still run, where it ran before. Embeddings,
    final norm, pooler and head stay as they are.

    Args:
        module: Any module that holds the model.
        drop: Which blocks go, by :func:`layers_to_drop`: ``"top:2"`` (the best on most tasks), ``"bottom:1"``,
            ``"alternate"``, ``"symmetric"``, or their indices from 0.
        stack: Which stack, where there are several: ``"encoder"``, ``"decoder"``, the path of its list, or ``"all"``.
        layers: Where the blocks are, if they are not found by themselves.

    Returns:
        The stacks, with the blocks before, dropped and kept.

    Raises:
        ValueError: ``drop`` or ``stack`` does not fit the model; the model cannot do without these blocks: a T5 without
            block 0, which holds the position bias of all, an ALBERT, whose layers share one block.

    Example:
        >>> class Encoder(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.tokens = nn.Embedding(9, 4)
        ...         self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
        ...     def forward(self, ids):
        ...         hidden = self.tokens(ids)
        ...         for layer in self.layers:
        ...             hidden = layer(hidden)
        ...         return hidden
        >>> model = Encoder()
        >>> print(remove_layers(model, "symmetric"))
        Removed layers
          parameters before: 116
          parameters after: 76
          stack  list    blocks  dropped  kept
          block  layers       4  [1, 2]   [0, 3]

    Reference:
        Sajjad, Dalvi, Durrani and Nakov 2023, "On the Effect of Dropping Layers of Pre-trained Transformer Models".
    """
    before = sum(p.numel() for p in module.parameters())
    plans = {name: _plan(module, path, drop) for name, path in _stacks(module, stack, layers or Layers()).items()}
    for plan in plans.values():
        plan.apply(module)
    rows = []
    for name, plan in plans.items():
        _mark(module, name, plan.path, {"dropped": plan.dropped, "of": plan.count})
        lists = {"dropped": str(plan.dropped), "kept": str(plan.kept)}
        rows.append({"stack": name, "list": plan.path, "blocks": plan.count, **lists})
    after = sum(p.numel() for p in module.parameters())
    return Report("Removed layers", {"parameters before": before, "parameters after": after}, rows)


def layers_to_drop(drop: str | Sequence[int], count: int) -> list[int]:
    """Indices of the blocks that ``drop`` means in a stack of ``count``.

    ``"top:k"`` and ``"bottom:k"``: so many from either end. ``"alternate"``: every second from the top down;
    ``"alternate:k"``: k of them. ``"symmetric:k"``: k from the middle, so that as many stay below as above, or one
    more below; ``"symmetric"``: half of them.

    Raises:
        ValueError: An unknown word, a number out of range, or no block would be left.

    Example:
        >>> [layers_to_drop(drop, 6) for drop in ("top:2", "bottom:1", "alternate", "symmetric", [3, 1])]
        [[4, 5], [0], [1, 3, 5], [2, 3, 4], [1, 3]]
    """
    if isinstance(drop, str):
        word, number = parse_drop(drop)
        k, most = count // 2 if number is None else number, count // 2 if word == "alternate" else count - 1
        if not 1 <= k <= most:
            raise ValueError(f"drop={drop!r} must take 1 to {most} of the {count} blocks away")
        start = {"top": count - k, "bottom": 0, "symmetric": (count - k + 1) // 2, "alternate": count - 2 * k + 1}
        return list(range(start[word], count, 2 if word == "alternate" else 1))[:k]
    indices = sorted(drop)
    if not indices or any(type(i) is not int or not 0 <= i < count for i in indices) or len({*indices}) < len(indices):
        raise ValueError(f"drop={list(drop)!r} must hold distinct indices from 0 to {count - 1}")
    if len(indices) == count:
        raise ValueError(f"drop={list(drop)!r} would take all {count} blocks away: keep one or more")
    return indices


def parse_drop(drop: str) -> tuple[str, int | None]:
    """Word and number of ``drop``; refuses unknown words without knowing the model."""
    match = re.fullmatch(r"(top|bottom|alternate|symmetric)(?::(\d+))?", drop)
    if match is None or (match[2] is None and match[1] in ("top", "bottom")):
        raise ValueError(
            f'drop={drop!r} must be "top:2", "bottom:1", "alternate", "symmetric" (the last two also with a number, '
            'such as "alternate:2"), or a list of indices'
        )
    return match[1], None if match[2] is None else int(match[2])


def layers_removed(
    module: nn.Module, drop: str | Sequence[int], *, stack: str | None = None, layers: Layers | None = None
) -> bool:
    """Whether :func:`remove_layers` did this already to these stacks, here or before the model was saved."""
    for name, path in _stacks(module, stack, layers or Layers()).items():
        blocks, (_, owner) = module.get_submodule(path), _owner(module, path)
        stored = vars(blocks).get(_MARK) or (getattr(owner, "config", None) and _stored(owner.config).get(name))
        if not stored or len(blocks._modules) != stored["of"] - len(stored["dropped"]):
            return False
        try:
            if layers_to_drop(drop, stored["of"]) != stored["dropped"]:
                return False
        except ValueError:
            return False
    return True


def _stored(config: Any) -> dict[str, Any]:
    return dict(getattr(config, _MARK, None) or {})


def _mark(module: nn.Module, name: str, path: str, facts: dict[str, Any]) -> None:
    # In the configuration it travels with the weights: a checkpoint's model is not shortened a second time.
    setattr(module.get_submodule(path), _MARK, facts)
    _, owner = _owner(module, path)
    if owner is not None:
        setattr(owner.config, _MARK, _stored(owner.config) | {name: facts})


def _stacks(module: nn.Module, stack: str | None, layers: Layers) -> dict[str, str]:
    """Name of each chosen stack, and the path of its list."""
    stacks: dict[str, str] = {}
    for group, paths in layers.block_paths(module).items():
        for path in paths:
            name, above = group.rpartition(".")[0], path.rpartition(".")[0]
            stacks.setdefault(name if len(paths) == 1 else f"{name}@{above}", above)
    if (stack is None and len(stacks) > 1) or stack not in (None, "all"):
        chosen = {n: p for n, p in stacks.items() if stack in (n, p, n.removesuffix(".block"))}
        if not chosen:
            names = ", ".join(f"{name.removesuffix('.block')!r} ({path})" for name, path in stacks.items())
            raise ValueError(f"stack={stack!r} must name one of the stacks of blocks: {names}, or 'all'")
        return chosen
    return stacks


@dataclass(frozen=True)
class _Plan:
    """A removal that was proved possible: nothing can fail from here on but a stranger's forward pass."""

    path: str
    count: int
    dropped: list[int]
    kept: list[int]
    twin: nn.Module | None

    def apply(self, module: nn.Module) -> None:
        blocks, (top, owner) = module.get_submodule(self.path), _owner(module, self.path)
        inner = _below(top, self.path)
        settings = depth_settings(list(blocks.children()))
        runs = [] if self.twin is not None else _running(module, self.path)
        originals = dict(blocks._modules)
        _keep(blocks, self.kept)
        if broken := [(name, error) for name in runs if (error := _error(module, name, blocks))]:
            blocks._modules.clear()
            blocks._modules.update(originals)
            raise ValueError(
                f"{type(module.get_submodule(broken[0][0])).__name__}.forward does not run without the blocks "
                f"{self.dropped} of {self.path}: {broken[0][1]!r}; let it loop over the list as it is"
            )
        twins = [None] * len(self.kept) if self.twin is None else list(self.twin.get_submodule(inner).children())
        for place, (block, twin) in enumerate(zip(blocks.children(), twins, strict=True)):
            for (name, key), offset in settings.items():
                if offset is not None:
                    number = place + offset if twin is None else vars(twin.get_submodule(name))[key]
                    setattr(block.get_submodule(name), key, number)
        if self.twin is not None:
            sync(owner, self.twin, inner, self.count)


def _plan(module: nn.Module, path: str, drop: str | Sequence[int]) -> _Plan:
    blocks, (top, owner) = module.get_submodule(path), _owner(module, path)
    _refuse(blocks, path)
    count = len(blocks._modules)
    dropped = layers_to_drop(drop, count)
    kept = [i for i in range(count) if i not in dropped]
    return _Plan(path, count, dropped, kept, owner and shorter_twin(owner, _below(top, path), kept))


def _owner(module: nn.Module, path: str) -> tuple[str, Any]:
    """The outermost Hugging Face model above a list, which is saved as a whole, and its path."""
    return next(iter(hf_models(module, path)), ("", None))


def _below(top: str, path: str) -> str:
    return path[len(top) :].removeprefix(".")


def _keep(blocks: nn.Module, kept: Sequence[int]) -> None:
    items = list(blocks._modules.items())
    numbered = [name for name, _ in items] == [str(i) for i in range(len(items))]
    chosen = [(str(place) if numbered else items[i][0], items[i][1]) for place, i in enumerate(kept)]
    blocks._modules.clear()
    blocks._modules.update(chosen)


def _refuse(blocks: nn.Module, path: str) -> None:
    if len(blocks._modules) < 2:
        raise ValueError(
            f"{path} holds one block alone, so none can go; where all layers share it (ALBERT), the depth is "
            "num_hidden_layers of the configuration and needs no surgery"
        )
    for name, child in blocks.named_modules(prefix=path):
        if type(child).__module__.partition(".")[0] == "peft":
            raise ValueError(f"{name} is an adapter of peft: remove layers before get_peft_model")


def _running(module: nn.Module, path: str) -> list[str]:
    """Paths of the modules above a list whose forward pass runs on token ids."""
    parts = path.split(".")
    above = [".".join(parts[:length]) for length in range(len(parts))]
    return [name for name in above if _error(module, name, module.get_submodule(path)) is None]


def _error(module: nn.Module, name: str, blocks: nn.Module) -> Exception | None:
    return first_fed(module.get_submodule(name), list(blocks.children()))[1]
