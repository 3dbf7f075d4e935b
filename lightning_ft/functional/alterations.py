"""Changes made to a built model, which its checkpoints remember, so that they are made again before one is loaded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_ft.core.base_weights import base_keys, base_names
from lightning_ft.core.report import Report
from lightning_ft.functional.delta import content_hash
from lightning_ft.functional.delta_checkpoint import Base, from_delta

ALTERATIONS = "lightning_ft_alterations"
"""Key of a checkpoint: what was done to the model, in order."""

PART = "lightning_ft_part"
"""Key of a checkpoint whose ``state_dict`` lacks the base: whence that comes, and its hash."""

_Result = TypeVar("_Result")
_DONE = "_lightning_ft_alterations"

# By name, so that a checkpoint names no code that is not here.
_KINDS: dict[str, str] = {
    "quantise": "quantise:quantise_as",
    "adapter_fusion": "adapter_fusion:add_fusion",
    "adapter_stack": "bottleneck:use_adapters",
    "bit_fit": "bit_fit:bit_fit",
    "bottleneck_adapters": "bottleneck:add_adapters",
    "frozen_adapters": "bottleneck:add_frozen_adapters",
    "movement_pruning": "masked_weights:mask_weights",
    "peft": "peft_methods:adapt",
    "diff_pruning": "diff_pruning:diff_prune",
    "intrinsic_dimension": "intrinsic_dimension:restrict_to_subspace",
}
"""Kind to ``module:function``, relative to ``lightning_ft.functional``; the function takes the module and settings."""


def alter(module: nn.Module, kind: str, settings: Mapping[str, Any]) -> Report:
    """Change a built module in place, and let its checkpoints remember how.

    They then leave out what :func:`~lightning_ft.core.base_weights.mark_base` marked, if the base can be had again:
    from the pretrained folder of a lightning_ft module, or from the code of any other one.

    Args:
        module: The LightningModule, before it is wrapped and before its optimisers are made.
        kind: What is done: a name that lightning_ft knows.
        settings: The arguments, of types that a weights-only checkpoint admits.

    Returns:
        What was changed.

    Raises:
        ValueError: There is no such kind; or what the change itself refuses.
    """
    report = _function(kind)(module, **settings)
    remember(module, kind, settings)
    return report


def remember(module: nn.Module, kind: str, settings: Mapping[str, Any]) -> None:
    """Let checkpoints remember a change that was made by other means than :func:`alter`, which would make it again."""
    vars(module)[_DONE] = [*alterations(module), {"kind": kind, "settings": dict(settings)}]
    if hasattr(module, "on_save_checkpoint") and "on_save_checkpoint" not in vars(module):
        # On the instance, and with the module as an argument: a copy of the module has hooks of its own.
        vars(module)["on_save_checkpoint"] = partial(_on_save_checkpoint, module)
        vars(module)["on_load_checkpoint"] = partial(_on_load_checkpoint, module)


def forget(module: nn.Module, kind: str) -> None:
    """Let checkpoints forget the changes of a kind, which were undone or are part of the plain weights now."""
    vars(module)[_DONE] = [record for record in alterations(module) if record["kind"] != kind]


def alterations(module: nn.Module) -> list[dict[str, Any]]:
    """What was done to a module, in order: ``{"kind": ..., "settings": {...}}``."""
    return list(vars(module).get(_DONE, ()))


def altered(module: nn.Module, kind: str, settings: Mapping[str, Any]) -> bool:
    """Whether just this was done to a module."""
    return {"kind": kind, "settings": dict(settings)} in alterations(module)


def restore(module: nn.Module, checkpoint: Mapping[str, Any], *, source: str = "the checkpoint") -> None:
    """Alter a freshly built module as the checkpoint's was, and load its weights.

    Args:
        module: With its pretrained weights.
        checkpoint: Its content.
        source: What to call it in errors.

    Raises:
        ValueError: The base is another one; the module was altered otherwise; a kind is unknown.
    """
    wanted = checkpoint.get(ALTERATIONS, [])
    done = alterations(module)
    if done != wanted[: len(done)]:
        raise ValueError(f"{source} holds a model changed by {_names(wanted)}, and this one by {_names(done)}")
    for record in wanted[len(done) :]:
        alter(module, record["kind"], record["settings"])
    module.load_state_dict(_whole(module, checkpoint, source))


def load_altered(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Alter a fresh module as a checkpoint's was, and load the checkpoint's weights over its base.

    A lightning_ft module needs none of this: :func:`lightning_ft.modules.load_checkpoint` builds it, too.

    Args:
        module: As its own code builds it, with the pretrained weights.
        path: A checkpoint that a trainer wrote; read with ``weights_only=True``.

    Raises:
        ValueError: The base is another one; the module was altered otherwise.
    """
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    restore(module, from_delta(loaded, source=str(path)), source=str(path))


def check_alterations(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """See that a module was changed as the checkpoint's was.

    Raises:
        ValueError: It was not.
    """
    _quantise_now(module)
    wanted, done = checkpoint.get(ALTERATIONS, []), alterations(module)
    if wanted != done:
        raise ValueError(
            f"the checkpoint holds a model changed by {_names(wanted)}, and this one is changed by {_names(done)}: use "
            "the same callbacks with the same arguments, in the same order"
        )


def _quantise_now(module: nn.Module) -> None:
    """Let the trainer's precision plugin do what it would do only after the checkpoint was restored."""
    try:
        trainer = module.trainer
    except (AttributeError, RuntimeError):  # no LightningModule, or none that a trainer runs
        return
    quantise = getattr(getattr(trainer, "precision_plugin", None), "quantise", None)
    if quantise is not None:
        quantise(module)


def _function(kind: str) -> Callable[..., Report]:
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is no change that this version of lightning_ft makes: it has {sorted(_KINDS)}")
    file, _, name = _KINDS[kind].partition(":")
    function: Callable[..., Report] = getattr(importlib.import_module(f"lightning_ft.functional.{file}"), name)
    return function


def _names(records: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{record['kind']}({record['settings']})" for record in records) or "nothing"


# ---- hooks of the module


def _on_save_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    type(module).on_save_checkpoint(module, checkpoint)
    checkpoint[ALTERATIONS] = alterations(module)
    base = getattr(module, "base_weights", "")
    if base is None or any(hasattr(p, "placements") for p in module.parameters()):
        return  # the base could not be had again; or each process holds a shard of it
    state = checkpoint["state_dict"]
    keys = base_keys(module, state)
    if base:
        keys = _found(module, base, {key: state[key] for key in keys})
    if keys:
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key not in keys}
        checkpoint[PART] = {"base": base or None, "keys": sorted(keys), "sha256": _hash(module, keys, state)}


def _on_load_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    check_alterations(module, checkpoint)
    checkpoint["state_dict"] = _whole(module, checkpoint, "the checkpoint")
    type(module).on_load_checkpoint(module, checkpoint)


# ---- the base


def _whole(module: nn.Module, checkpoint: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The checkpoint's weights, with the module's own where it holds none."""
    state: dict[str, Tensor] = checkpoint["state_dict"]
    part = checkpoint.get(PART)
    if part is None:
        return state
    own = module.state_dict()
    if missing := [key for key in part["keys"] if key not in own]:
        raise ValueError(f"{source} takes {', '.join(missing[:3])} from the base, and {type(module).__name__} has none")
    keys = set(part["keys"])
    if (found := _hash(module, keys, own)) != part["sha256"]:
        raise ValueError(
            f"{source} was trained over base weights with sha256 {part['sha256'][:16]}…, and those of this "
            f"{type(module).__name__} have {found[:16]}…: build it from the same pretrained weights"
            + (f" (then in {part['base']})" if part["base"] else "")
        )
    return {**{key: own[key] for key in keys}, **state}


def _hash(module: nn.Module, keys: set[str], state: Mapping[str, Tensor]) -> str:
    """Of the base in floating point; what is quantised depends on the device that did it."""
    chosen = {key: state[key] for key in _floating(module, keys)}
    return _once(module, "_lightning_ft_base_hash", chosen, lambda: content_hash(chosen))


def _found(module: nn.Module, base: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """The keys whose tensors the pretrained files hold: not what an earlier training or a new draw made of them."""

    def search() -> set[str]:
        floating = _floating(module, tensors)
        dtypes = {tensors[key].dtype for key in floating}
        known = {_digest(value.to(dtype)) for value in Base(base).tensors.values() for dtype in dtypes}
        return tensors.keys() - {key for key in floating if _digest(tensors[key]) not in known}

    return _once(module, "_lightning_ft_base_found", tensors, search)


def _floating(module: nn.Module, keys: Iterable[str]) -> set[str]:
    """The base's parameters among the keys that are not quantised."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {key for key in base_names(module).intersection(keys) if parameters[key].is_floating_point()}


def _digest(tensor: Tensor) -> str:
    return content_hash({"": tensor})


def _once(module: nn.Module, slot: str, tensors: Mapping[str, Tensor], compute: Callable[[], _Result]) -> _Result:
    """What was computed of these tensors at an earlier save, if none was written to since."""
    state = {key: (tensor.data_ptr(), tensor._version) for key, tensor in tensors.items()}
    known = vars(module).get(slot)
    if known is None or known[0] != state:
        known = vars(module)[slot] = (state, compute())
    result: _Result = known[1]
    return result
