"""The configuration of a Hugging Face model from which some blocks were taken, found by building it and comparing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lightning_ft.functional._hugging_face import is_config

Entry = tuple[tuple[str, ...], str]
"""Where a setting is: the path of the sub-configuration, and the setting's name."""


def shorter_twin(owner: Any, path: str, kept: Sequence[int]) -> nn.Module:
    """A model on the meta device with the configuration that ``owner`` has without its other blocks.

    Which setting counts the blocks is no matter of names: each that equals their number is tried, the one that
    transformers calls ``num_hidden_layers`` first, and the model built from it must have the kept blocks, with the
    same parameters, buffers, classes and settings that vary with depth. Lists as long as the blocks are many are cut
    if their name speaks of layers, and others only if the blocks do not come out right without it (``eos_token_id``
    may be such a list, too).

    Args:
        owner: A Hugging Face model.
        path: Path of the list of blocks in it.
        kept: Indices of the blocks that stay.

    Raises:
        ValueError: No setting gives the kept blocks.
    """
    config = owner.config
    count = len(owner.get_submodule(path)._modules)
    depths = [e for e in _entries(config) if type(_value(config, e)) is int and _value(config, e) == count]
    preferred = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    depths.sort(key=lambda entry: (entry[1] != preferred, "layer" not in entry[1], entry))
    lists = {e for e in _entries(config) if isinstance(_value(config, e), list) and len(_value(config, e)) == count}
    by_name = {entry for entry in lists if "layer" in entry[1]}
    reasons = []
    for depth in depths:
        for cut in (by_name, lists) if lists != by_name else (by_name,):
            twin, reason = _attempt(owner, path, kept, depth, cut)
            if twin is None:
                reasons.append(f"with {depth[1]}={len(kept)} {reason}")
                continue
            for entry in sorted(cut - by_name):
                fewer, _ = _attempt(owner, path, kept, depth, cut - {entry})
                if fewer is not None:
                    twin, cut = fewer, cut - {entry}
            return twin
    remedy = "" if 0 in kept else "; keep block 0, which often holds what the others use"
    raise ValueError(
        f"a {type(owner).__name__} cannot be saved without these blocks: no setting of its configuration that equals "
        f"{count} gives the others ({'; '.join(dict.fromkeys(reasons)) or 'there is none'}){remedy}"
    )


def sync(owner: Any, twin: nn.Module, path: str, count: int) -> None:
    """Give ``owner``, outside its blocks, the configuration and the depth settings of its shorter twin.

    Args:
        owner: The model.
        twin: What :func:`shorter_twin` built.
        path: Path of the list of blocks.
        count: How many blocks there were.
    """
    twins = dict(twin.named_modules())
    for name, module in owner.named_modules():
        # What a stranger added to the model (a probe, a second head) is not in the twin, and has no depth.
        if f"{name}.".startswith(f"{path}.") or name not in twins:
            continue
        other = vars(twins[name])
        for key, value in list(vars(module).items()):
            if type(value) is int and value == count and type(other.get(key)) is int:
                setattr(module, key, other[key])
            elif is_config(value) and is_config(other.get(key)):
                _sync_config(value, other[key], count)


def _sync_config(config: Any, other: Any, count: int) -> None:
    for key, value in list(vars(config).items()):
        new = vars(other).get(key)
        if is_config(value) and is_config(new):
            _sync_config(value, new, count)
        elif (type(value) is int and value == count and type(new) is int) or (
            isinstance(value, list) and len(value) == count and isinstance(new, list)
        ):
            setattr(config, key, copy.copy(new))


def _attempt(owner: Any, path: str, kept: Sequence[int], depth: Entry, cut: set[Entry]) -> tuple[nn.Module | None, str]:
    """The twin that one guess at the configuration gives, or why it is none."""
    config = copy.deepcopy(owner.config)
    _set(config, depth, len(kept))
    for entry in cut:
        _set(config, entry, [_value(config, entry)[i] for i in kept])
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            warnings.simplefilter("ignore")
            # Through the dictionary, as in a saved folder: what is derived is derived anew, and checked.
            twin: nn.Module = type(owner)(type(config).from_dict(config.to_dict()))
        blocks = list(twin.get_submodule(path).children())
    except Exception as error:  # noqa: BLE001 - any architecture's constructor
        return None, f"it cannot be built: {error!r}"[:300]
    originals = list(owner.get_submodule(path).children())
    if len(blocks) != len(kept):
        return None, f"it has {len(blocks)} blocks"
    varying = depth_settings(originals)
    for place, index in enumerate(kept):
        if reason := _difference(originals[index], blocks[place], varying, place):
            return None, f"block {index} in place {place} {reason}"
    return twin, ""


def _difference(block: nn.Module, other: nn.Module, varying: dict[tuple[str, str], int | None], place: int) -> str:
    ours, theirs = _signature(block), _signature(other)
    if ours != theirs:
        changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        return f"differs in {', '.join(changed[:4])}"
    for (name, key), offset in varying.items():
        value, rebuilt = (vars(b.get_submodule(name)).get(key) for b in (block, other))
        # Widths such as 4, 5, 6 count the blocks by accident: then they are right as they are.
        if value != rebuilt and (offset is None or rebuilt != place + offset):
            return f"has {f'{name}.{key}'.strip('.')}={value!r}, and would be rebuilt with {rebuilt!r}"
    return ""


def _signature(block: nn.Module) -> dict[str, Any]:
    tensors = [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]
    return {name: tuple(t.shape) for name, t in tensors} | {f"{n}:": type(m) for n, m in block.named_modules()}


def depth_settings(blocks: Sequence[nn.Module]) -> dict[tuple[str, str], int | None]:
    """Settings (submodule, attribute) that differ between blocks; with an offset where they count the blocks.

    A setting counts the blocks if it is the block's index plus one offset in all of them: ``layer_idx``, under which
    attention finds its part of the cache. Sizes that torch's own layers hold do not.
    """
    values: dict[tuple[str, str], dict[int, Any]] = {}
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, (bool, int, float, str, list, tuple, type(None))) and key not in _INTERNAL:
                    values.setdefault((name, key), {})[index] = value
    found: dict[tuple[str, str], int | None] = {}
    for place, by_block in values.items():
        torchs_own = type(blocks[min(by_block)].get_submodule(place[0])).__module__.startswith("torch.")
        everywhere = len(by_block) == len(blocks) > 1 and not torchs_own
        if everywhere and all(type(v) is int and v - i == by_block[0] for i, v in by_block.items()):
            found[place] = by_block[0]
        elif any(value != next(iter(by_block.values())) for value in by_block.values()):
            found[place] = None
    return found


_INTERNAL = {"training", "_is_hf_initialized", "_lightning_ft_fresh", "gradient_checkpointing"}


def _entries(config: Any, path: tuple[str, ...] = ()) -> Iterator[Entry]:
    for key, value in vars(config).items():
        if is_config(value):
            yield from _entries(value, (*path, key))
        elif not key.startswith("_"):
            yield path, key


def _holder(config: Any, entry: Entry) -> Any:
    for key in entry[0]:
        config = getattr(config, key)
    return config


def _value(config: Any, entry: Entry) -> Any:
    return getattr(_holder(config, entry), entry[1])


def _set(config: Any, entry: Entry, value: Any) -> None:
    setattr(_holder(config, entry), entry[1], value)
