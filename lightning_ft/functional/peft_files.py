"""What an adapter's folder holds: tensors and configuration in peft's format, and hashes of the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.core.base_weights import base_names
from lightning_ft.functional.delta import content_hash
from lightning_ft.functional.peft_config import import_peft
from lightning_ft.functional.peft_parts import (
    adapter_parameters,
    head_modules,
)
from lightning_ft.functional.peft_prompts import prompts_of

PREFIX = "base_model.model."
FACTS = "lightning_ft.json"


def path_of(target: nn.Module, module: nn.Module) -> str:
    """The path of a module inside another, with a dot at its end."""
    path = next(name for name, child in module.named_modules() if child is target)
    return f"{path}." if path else ""


def base_digests(module: nn.Module, transformer: nn.Module) -> dict[str, str]:
    """SHA-256 of each of the base's weights in the transformer, under the name that it has without adapters.

    One by one, since an adapter that was trained over quantised weights may be laid over the floating-point ones.
    """
    start, parameters = path_of(transformer, module), dict(module.named_parameters(remove_duplicate=False))
    chosen = {n.removeprefix(start): parameters[n] for n in sorted(base_names(module)) if n.startswith(start)}
    return {
        name.replace(".base_layer.", "."): content_hash({"": parameter})
        for name, parameter in chosen.items()
        if parameter.is_floating_point()
    }


def head_in_adapter_file(module: nn.Module, target: nn.Module, head: Mapping[str, Tensor], config: Any) -> list[str]:
    """The modules of the head that go into peft's own file."""
    if not hasattr(config, "modules_to_save"):
        return []
    # By name: the head of an adapter that does not act now lies beside the model.
    named = dict(module.named_parameters())
    return head_modules(target, {named[name] for name in head})


def part_of_head(path: str, head: Mapping[str, Tensor], modules: list[str]) -> dict[str, Tensor]:
    """The tensors of the head that lie in these modules, by their names in the transformer."""
    known = {name.removeprefix(path): value for name, value in head.items() if name.startswith(path)}
    return {name: value for name, value in known.items() if any(name.startswith(f"{m}.") for m in modules)}


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As a safetensors file can hold them."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def adapter_tensors(target: nn.Module, name: str, config: Any) -> tuple[dict[str, Tensor], Any]:
    """An adapter's tensors by peft's names, and the configuration that goes with them."""
    prompts = prompts_of(target)
    if prompts is not None and name in prompts.configs:
        return {"prompt_embeddings": prompts.vectors(name)}, config
    if hasattr(config, "rank_pattern") and config.peft_type == "ADALORA":
        config.rank_pattern = None  # ranks that were given up are zeros of the full rank
    state = import_peft().functional.get_peft_model_state_dict(target, adapter_name=name, save_embedding_layers=False)
    if any(name in vars(child).get("_lightning_ft_start", {}) for child in target.modules()):
        return _as_lora(target, name, state, config)
    return {f"{PREFIX}{key}": value for key, value in state.items()}, config


def _as_lora(target: nn.Module, name: str, state: Mapping[str, Tensor], config: Any) -> tuple[dict[str, Tensor], Any]:
    """W' + sBA = W + s(BA − B₀A₀), as W' is W − sB₀A₀."""
    result = {f"{PREFIX}{key}": value for key, value in state.items()}
    for path, child in target.named_modules():
        if (start := vars(child).get("_lightning_ft_start", {}).get(name)) is not None:
            a, b = f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"
            result[a] = torch.cat([result[a], start[0].to(result[a])], 0)
            result[b] = torch.cat([result[b], -start[1].to(result[b])], 1)
    root = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, root * config.lora_alpha
    config.rank_pattern = {key: 2 * value for key, value in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: root * value for key, value in (config.alpha_pattern or {}).items()}
    return result, config


def to_use(config: Mapping[str, Any], *, others: bool) -> dict[str, Any]:
    """So that it can be trained further, where peft can: the networks that made prompts are not saved."""
    kind = config["peft_type"]
    only_used = kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING") or (kind == "ADALORA" and others)
    return {**config, "inference_mode": only_used, "base_model_name_or_path": None}


def fill(target: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Give an adapter the tensors that were saved of it.

    Raises:
        ValueError: They do not fit.
    """
    prompts = prompts_of(target)
    if prompts is not None and name in prompts.configs:
        prompts.fill(name, tensors["prompt_embeddings"])
        return
    try:
        loaded = import_peft().functional.set_peft_model_state_dict(target, tensors, adapter_name=name)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the adapter does not fit this model: {error}") from error
    own = adapter_parameters(target)
    mine = {key for key, p in target.named_parameters() if p in own and f".{name}" in key and "ranknum" not in key}
    lacking = sorted(mine.intersection(loaded.missing_keys))
    if loaded.unexpected_keys or lacking:
        raise ValueError(
            f"the adapter does not fit this model: it has {', '.join(loaded.unexpected_keys[:3]) or 'nothing'} too "
            f"much, and lacks {', '.join(lacking[:3]) or 'nothing'}"
        )


def check_base(module: nn.Module, target: nn.Module, folder: Path) -> None:
    """See that a module has the base over which a folder's adapter was trained.

    Raises:
        ValueError: It has another one.
    """
    if not (folder / FACTS).is_file():
        return
    wanted, found = json.loads((folder / FACTS).read_text())["base"], base_digests(module, target)
    if other := sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]):
        raise ValueError(
            f"folder={str(folder)!r} was trained over other base weights than those of this {type(module).__name__}: "
            f"{len(other)} of {len(wanted)} tensors differ ({', '.join(other[:3])}); build it from the same "
            "pretrained weights"
        )
