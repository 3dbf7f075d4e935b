"""Adapters of peft as folders: saved, loaded beside others, switched, combined, each with its head."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ft.core.files import atomic_folder
from lightning_ft.core.layers import Layers, as_layers, plain_layers
from lightning_ft.core.report import Report
from lightning_ft.functional.alterations import alter, alterations, remember
from lightning_ft.functional.peft_config import import_peft, plain_config, read_config
from lightning_ft.functional.peft_files import (
    FACTS,
    PREFIX,
    adapter_tensors,
    base_digests,
    check_base,
    fill,
    head_in_adapter_file,
    part_of_head,
    path_of,
    to_use,
)
from lightning_ft.functional.peft_parts import (
    adapter_parameters,
    find_transformer,
    head_parameters,
    is_adapter_layer,
    tuner_of,
)
from lightning_ft.functional.peft_prompts import prompts_of

Combination = Literal["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"]
_HEADS = "_lightning_ft_peft_heads"


def save_adapter(module: nn.Module, folder: str | os.PathLike[str], *, name: str = "default") -> Report:
    """Write an adapter, and the head that was trained with it, as a folder in peft's format.

    ``adapter_config.json`` and ``adapter_model.safetensors`` are what ``PeftModel.from_pretrained`` opens over the
    transformer; a head inside the transformer is in there, too (``modules_to_save``). ``head.safetensors`` holds the
    rest of the head: what lies outside the transformer, or what the method has no place for. ``lightning_ft.json``
    holds SHA-256 hashes of the base's weights. A language model's tied output layer is the base's, and not copied.

    An adapter that was taken out of the base's weights when it was drawn (PiSSA, OLoRA) is written as a LoRA of twice
    the rank, BA − B₀A₀, which goes over the plain base.

    Sequences that a head pools outside the network (RoBERTa's) are pooled at the text's first token under learnt
    prompts, and by ``PeftModel`` at the first virtual one.

    Args:
        module: The adapted module.
        folder: Where to write; absent or empty.
        name: Of the adapter.

    Returns:
        Sizes.

    Raises:
        FileExistsError: The folder holds something.
        ValueError: There is no such adapter.
    """
    from safetensors.torch import save_file

    _settings(module, name)
    target = _transformer(module, _first(module))
    config = read_config(plain_config(_configs(target)[name]))
    head = _head_of(module, name)
    tensors, config = adapter_tensors(target, name, config)
    inside = head_in_adapter_file(module, target, head, config)
    if inside:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *inside})
        start = "base_model." if config.is_prompt_learning else PREFIX
        tensors |= {f"{start}{key}": v for key, v in part_of_head(path_of(target, module), head, inside).items()}
    rest = {n: t for n, t in head.items() if not any(n.startswith(f"{path_of(target, module)}{m}.") for m in inside)}
    config.inference_mode = True
    with atomic_folder(Path(folder)) as made:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
            made / "adapter_model.safetensors",
        )
        config.save_pretrained(str(made))
        if rest:
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in rest.items()}, made / "head.safetensors"
            )
        (made / FACTS).write_text(json.dumps({"base": base_digests(module, target)}, indent=2))
    sizes = {"adapter": sum(t.nbytes for t in tensors.values()), "head": sum(t.nbytes for t in rest.values())}
    return Report("Adapter saved", {"name": name, "folder": str(folder), "bytes": sizes})


def load_adapter(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    transformer: str | None = None,
    layers: Layers | None = None,
) -> Report:
    """Put a saved adapter into a module, beside those that it has, and use it, with its head.

    Args:
        module: Plain, with the weights over which the adapter was trained; or adapted already.
        folder: What :func:`save_adapter` wrote; or peft's own folder, which has no hash to compare.
        name: What to call the adapter here.
        transformer: Path of the module to adapt, for a module that has no adapter yet, if it is not found by itself.
        layers: Where the head is, likewise.

    Raises:
        FileNotFoundError: There is no adapter in the folder.
        ValueError: It was trained over other weights; it does not fit; the name is taken.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"folder={str(folder)!r} holds no adapter_config.json and adapter_model.safetensors")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    where = {"transformer": transformer, "layers": plain_layers(layers), "seed": 0}
    if _done(module):
        where = _first(module)
        _remember_head(module, active_adapter(module))
    before = list(module.modules())
    report = alter(module, "peft", {**where, "config": to_use(config, others=bool(_done(module))), "adapter": name})
    _keep_modes(module, before)
    target = _transformer(module, where)
    check_base(module, target, folder)
    start, own = path_of(target, module), _head(module)
    known = {key.removeprefix(PREFIX).removeprefix("base_model."): value for key, value in tensors.items()}
    head = {f"{start}{key}": value for key, value in known.items() if f"{start}{key}" in own}
    fill(target, name, {key: value for key, value in known.items() if f"{start}{key}" not in own})
    if (folder / "head.safetensors").is_file():
        head |= load_file(folder / "head.safetensors")
    _set_head(module, head)
    _remember_head(module, name)
    _activate(module, name)
    return report


def use_adapter(module: nn.Module, name: str) -> None:
    """Let one of several adapters act, with the head that was trained with it.

    Raises:
        ValueError: There is no such adapter.
    """
    _settings(module, name)
    _remember_head(module, active_adapter(module))
    _set_head(module, vars(module)[_HEADS].get(name, {}))
    _activate(module, name)


def active_adapter(module: nn.Module) -> str:
    """Name of the adapter that acts.

    Raises:
        ValueError: The module has none.
    """
    if not (done := _done(module)):
        raise ValueError(f"{type(module).__name__} has no adapter: load_adapter(module, folder) puts one in")
    target = _transformer(module, done[0])
    if (prompts := prompts_of(target)) is not None and prompts.active is not None:
        return prompts.active
    layer: Any = next(child for child in target.modules() if is_adapter_layer(child))
    result: str = layer.active_adapters[0]
    return result


def combine_adapters(
    module: nn.Module, weights: Mapping[str, float], method: Combination = "svd", *, name: str = "combined"
) -> None:
    """Add a weighted combination of LoRA adapters as a new one, and use it.

    ``"cat"`` and ``"svd"`` combine the updates, Σ wᵢ ΔWᵢ (svd: its best approximation of the largest of the ranks);
    ``"linear"`` the factors, Σ√wᵢ Aᵢ and Σ√wᵢ Bᵢ, a rough approximation. By ``LoraModel.add_weighted_adapter`` of peft.
    The head is Σ wᵢ headᵢ / Σ wᵢ.

    Args:
        module: With the adapters loaded.
        weights: Adapter name to weight.
        method: How.
        name: Of the new adapter.

    Raises:
        ValueError: An adapter is not there; they are not LoRA; the weights of heads sum to 0; the name is taken.
    """
    target = _transformer(module, _first(module))
    known = _configs(target)
    if missing := [n for n in weights if n not in known] or not weights:
        raise ValueError(f"weights must name adapters of {', '.join(known)}; got {list(weights)} ({missing})")
    if name in known:
        raise ValueError(f"name={name!r} is an adapter already")
    if not hasattr(type(tuner_of(target)), "add_weighted_adapter") or any(
        known[n].peft_type != "LORA" for n in weights
    ):
        kinds = ", ".join(f"{n} is {known[n].peft_type.value}" for n in weights)
        raise ValueError(f"weights: only LoRA adapters can be added up; {kinds}")
    _remember_head(module, active_adapter(module))
    heads = [vars(module)[_HEADS].get(n, {}) for n in weights]
    total = sum(weights.values())
    if any(heads) and total == 0:
        raise ValueError(f"weights={dict(weights)} sum to 0, which leaves no head: use weights with a sum above 0")
    tuner = tuner_of(target)
    before = list(module.modules())
    try:
        tuner.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type=method)
    except ValueError as error:
        tuner.peft_config.pop(name, None)
        raise ValueError(f"weights: {error}") from error
    _keep_modes(module, before)
    mixed = {k: sum(w / total * h[k] for w, h in zip(weights.values(), heads, strict=True)) for k in heads[0]}
    _set_head(module, mixed)
    remember(module, "peft", {**_first(module), "config": plain_config(_configs(target)[name]), "adapter": name})
    _remember_head(module, name)
    _activate(module, name)


# ---- what was done


def _done(module: nn.Module) -> list[dict[str, Any]]:
    usual = {"transformer": None, "layers": None, "seed": 0, "adapter": "default"}
    return [{**usual, **record["settings"]} for record in alterations(module) if record["kind"] == "peft"]


def _first(module: nn.Module) -> dict[str, Any]:
    done = _done(module)
    if not done:
        raise ValueError(f"{type(module).__name__} has no adapter: load_adapter(module, folder) puts one in")
    return {key: value for key, value in done[0].items() if key not in ("config", "adapter")}


def _settings(module: nn.Module, name: str) -> dict[str, Any]:
    names = [settings["adapter"] for settings in _done(module)]
    if name not in names:
        raise ValueError(f"name={name!r} is no adapter of {type(module).__name__}, which has {names or 'none'}")
    return _done(module)[names.index(name)]


def _transformer(module: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    given = settings.get("layers")
    return find_transformer(module, settings.get("transformer"), as_layers(given))[1]


def _configs(target: nn.Module) -> dict[str, Any]:
    prompts = prompts_of(target)
    configs: dict[str, Any] = {**(getattr(target, "peft_config", None) or {}), **(prompts.configs if prompts else {})}
    return configs


def _activate(module: nn.Module, name: str) -> None:
    target = _transformer(module, _first(module))
    prompts = prompts_of(target)
    if prompts is not None and name in prompts.configs:
        prompts.active = name
        return
    import_peft().functional.set_adapter(target, name)
    if (tuner := tuner_of(target)) is not None:
        tuner.active_adapter = name


def _keep_modes(module: nn.Module, before: list[nn.Module]) -> None:
    """New layers come in train mode: their dropout would act in a model in eval mode."""
    known = set(before)
    for parent in module.modules():
        for child in parent.children():
            if child not in known and parent in known:
                inner = getattr(child, "base_layer", parent)
                for new in child.modules():
                    if new not in known:
                        new.training = inner.training
            elif child not in known:
                child.training = parent.training


# ---- heads


def _head(module: nn.Module) -> dict[str, Tensor]:
    first = _first(module)
    layers = as_layers(first.get("layers"))
    wanted = head_parameters(module, _transformer(module, first), layers) - adapter_parameters(module)
    return {name: p for name, p in module.named_parameters() if p in wanted}


def _remember_head(module: nn.Module, name: str) -> None:
    kept = vars(module).setdefault(_HEADS, {})
    kept[name] = {key: value.detach().clone() for key, value in _head(module).items()}


def _head_of(module: nn.Module, name: str) -> dict[str, Tensor]:
    if name == active_adapter(module):
        return _head(module)
    kept: dict[str, dict[str, Tensor]] = vars(module).get(_HEADS, {})
    return kept.get(name, {})


@torch.no_grad()
def _set_head(module: nn.Module, head: Mapping[str, Tensor]) -> None:
    own = dict(module.named_parameters())
    for name, value in head.items():
        if name not in own or own[name].shape != value.shape:
            found = tuple(own[name].shape) if name in own else "none"
            raise ValueError(f"the adapter's head has {name} of shape {tuple(value.shape)}, and this module {found}")
        own[name].copy_(value)
