"""Methods of peft on the transformer inside any module: what is adapted, what trains, what stays as it is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lightning_ft.core.base_weights import mark_base
from lightning_ft.core.layers import as_layers
from lightning_ft.core.report import Report
from lightning_ft.functional.peft_config import changes_base, import_peft, plain_config, read_config
from lightning_ft.functional.peft_parts import (
    TUNER,
    adapter_parameters,
    find_transformer,
    head_modules,
    head_parameters,
    is_adapter_layer,
    linear_names,
)

ALL_LINEAR = "all-linear"


def adapt(
    module: nn.Module,
    *,
    config: Mapping[str, Any],
    transformer: str | None = None,
    layers: Mapping[str, Any] | None = None,
    seed: int = 0,
    adapter: str = "default",
) -> Report:
    """Put an adapter of peft into the transformer inside ``module``, in place, and freeze all else but the head.

    Layers are replaced within the model (``peft.inject_adapter_in_model``), and prompts enter it by hooks
    (:mod:`lightning_ft.functional.peft_prompts`): the model stays the object, of the class, that the module's own code
    knows. The head trains as it is, without a copy (``modules_to_save``), for every method. What trains beside it is
    what peft says: adapters, biases (``bias=``), the user's ``modules_to_save``.

    Where ``target_modules`` is not given and peft knows no default for the model, all linear layers outside the head
    are adapted, which is also what ``"all-linear"`` means here. Layers of ``nn.MultiheadAttention`` are never called
    as layers, and are left out.

    The output layer of a language model is pretrained: it is no head, unless ``layers`` says so. Weights from which
    the adapter takes a part when it is drawn (PiSSA, OLoRA, CorDA, LoftQ) are frozen, but no part of the base any more:
    checkpoints hold them.

    Args:
        module: The module that is trained.
        config: ``PeftConfig`` as plain types, see :func:`~lightning_ft.functional.peft_config.plain_config`.
        transformer: Path of the module to adapt, where there are several models of transformers. Without any, a
            module with a list of blocks is adapted as a whole.
        layers: Arguments of :class:`~lightning_ft.core.layers.Layers`: where the head is.
        seed: Of the new weights, which take nothing from the global generator.
        adapter: Name of the adapter.

    Returns:
        What was adapted, and what trains.

    Raises:
        ImportError: peft is not installed.
        ValueError: No transformer, or several; it is adapted already; nothing that the configuration names is there;
            the method cannot be put into a model.

    Example:
        >>> import torch, peft
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> backbone = torch.nn.ModuleDict({"tokens": torch.nn.Embedding(9, 8), "layers": torch.nn.ModuleList([layer])})
        >>> model = torch.nn.ModuleDict({"backbone": backbone, "classifier": torch.nn.Linear(8, 2)})
        >>> config = plain_config(peft.LoraConfig(r=2, target_modules=["linear1"]))
        >>> layers = {"blocks": "backbone.layers", "head": "classifier"}
        >>> report = adapt(model, config=config, layers=layers)
        >>> report.facts["adapter parameters"], report.facts["head parameters"]
        (48, 18)

    Reference:
        Hu et al. 2022, "LoRA"; Mangrulkar et al. 2022, https://github.com/huggingface/peft.
    """
    where = as_layers(layers)
    settings = read_config(config)
    path, target = find_transformer(module, transformer, where)
    _refuse_adapted(path, target, settings, adapter)
    head = head_parameters(module, target, where)
    before = set(module.parameters())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings(
            "ignore", message="(?s).*(exclude_modules|fan_in_fan_out|Already found a `peft_config`)"
        )
        if settings.is_prompt_learning:
            from lightning_ft.functional.peft_prompts import add_prompts

            changed: list[nn.Parameter] = []
            _leave_out_head(target, settings, head)
            add_prompts(path, target, settings, adapter)
        else:
            changed = _inject(path, target, settings, adapter, head)
    for parameter in head:
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    inside, kept = set(target.parameters()), head | adapter_parameters(module) | set(changed)
    mark_base(
        module, (p for p in before - kept if p not in inside or not p.requires_grad or settings.is_prompt_learning)
    )
    _call_layers_always(target)
    return _report(module, settings, before, head, path)


# ---- injection


def _refuse_adapted(path: str, target: nn.Module, config: Any, adapter: str) -> None:
    place = path or "the module"
    prompts: Any = next((m for m in target.modules() if getattr(m, "is_lightning_ft_prompts", False)), None)
    layers = any(is_adapter_layer(child) for child in target.modules())
    names = [*(getattr(target, "peft_config", None) or ()), *(prompts.configs if prompts is not None else ())]
    if adapter in names:
        raise ValueError(f"{place} has an adapter {adapter!r} already: give this one another adapter=")
    if layers and not names:
        raise ValueError(f"{place} is adapted by peft already: leave PEFT out, or load the plain model")
    if (layers and config.is_prompt_learning) or (prompts is not None and not config.is_prompt_learning):
        raise ValueError(
            f"config: {config.peft_type.value} cannot stand beside {', '.join(names)}: prompts and adapters of layers "
            "would act together, and be switched together; use a module of its own"
        )


def _inject(
    path: str, target: nn.Module, config: Any, adapter: str, head: Collection[nn.Parameter]
) -> list[nn.Parameter]:
    """Replace layers; returns the parameters of the base that the adapter's first weights were taken out of."""
    peft = import_peft()
    kind = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if kind is None or kind.uses_shared_state or config.is_adaption_prompt:
        raise ValueError(
            f"config: {config.peft_type.value} keeps weights that all layers share outside of the model: use a method "
            "whose weights are in the layers, such as LoRA, or in the prompt"
        )
    _leave_out_head(target, config, head)
    found = linear_names(target, head)
    try:
        tuner = _tune(target, config, kind, adapter, head)
    except ValueError as error:
        endings = ", ".join(sorted({name.rpartition(".")[2] for name in found}))
        raise ValueError(
            f"config: target_modules={_shown(config)} cannot be adapted: {error} Linear layers of "
            f"{type(target).__name__}: {endings}"
        ) from error
    peft.functional.cast_adapter_dtype(target, adapter)
    vars(target)[TUNER] = tuner
    if hasattr(type(target), "_hf_peft_config_loaded"):
        target._hf_peft_config_loaded = True  # type: ignore[assignment]  # what transformers' own add_adapter says
    if any(isinstance(m, nn.Linear) and not m.weight.is_floating_point() for m in target.modules()):
        _prepare_quantised(target)
    recomputed = any(getattr(child, "gradient_checkpointing", False) for child in target.modules())
    if recomputed and hasattr(target, "enable_input_require_grads"):
        target.enable_input_require_grads()  # type: ignore[operator]  # else a frozen first block has no gradients
    if not changes_base(plain_config(config)):
        return []
    layers = [m for m in target.modules() if is_adapter_layer(m)]
    for layer in layers:
        _keep_start(layer, adapter)
    return [layer.get_base_layer().weight for layer in layers if hasattr(layer, "get_base_layer")]  # type: ignore[operator]


def _tune(target: nn.Module, config: Any, kind: Any, adapter: str, head: Collection[nn.Parameter]) -> Any:
    """The object of peft that puts its layers in; with all linear layers where peft has no default for the model."""
    given = getattr(config, "target_modules", None)
    if isinstance(given, str) and given.lower() == ALL_LINEAR:
        _choose_all_linear(target, config, head)
    try:
        return kind(target, config, adapter_name=adapter)
    except ValueError as error:
        if given is not None or "specify `target_modules`" not in str(error):
            raise
    _choose_all_linear(target, config, head)
    return kind(target, config, adapter_name=adapter)


def _shown(config: Any) -> Any:
    given = getattr(config, "target_modules", None)
    return sorted(given) if isinstance(given, set) else given


def _choose_all_linear(target: nn.Module, config: Any, head: Collection[nn.Parameter]) -> None:
    config.target_modules = set(linear_names(target, head))
    if hasattr(config, "feedforward_modules"):
        config.feedforward_modules = config.feedforward_modules or set()


def _leave_out_head(target: nn.Module, config: Any, head: Collection[nn.Parameter]) -> None:
    """No adapter in a layer that trains as a whole, and no second copy of it."""
    inside = head_modules(target, head)
    if getattr(config, "modules_to_save", None):
        config.modules_to_save = [
            m for m in config.modules_to_save if not any(_named(m, name) for name in inside)
        ] or None
    if not inside or not hasattr(config, "exclude_modules"):
        return
    names = "|".join(f"{re.escape(name)}(\\..*)?" for name in inside)
    given = config.exclude_modules or ()
    if not isinstance(given, str):
        given = "|".join(f"(.*\\.)?{re.escape(name)}" for name in sorted(given))
    config.exclude_modules = f"{given}|{names}" if given else names


def _named(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _prepare_quantised(target: nn.Module) -> None:
    """Norms and embeddings in fp32, as `prepare_model_for_kbit_training` has them."""
    for parameter in target.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.float()


def _keep_start(layer: Any, adapter: str) -> None:
    """The first A and B, whose product was taken out of the base: saved adapters are told apart from it by them."""
    if adapter in getattr(layer, "lora_A", {}):
        pair = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
        vars(layer).setdefault("_lightning_ft_start", {})[adapter] = [p.detach().clone() for p in pair]


def _do_nothing(*_: Any) -> None:
    return None


def _call_layers_always(target: nn.Module) -> None:
    """In eval mode torch's encoder layer computes with its weights by itself, past what took its layers' place.

    Not where a hook is attached to it.
    """
    for child in target.modules():
        adapted = isinstance(child, nn.TransformerEncoderLayer) and any(map(is_adapter_layer, child.modules()))
        if adapted and _do_nothing not in child._forward_pre_hooks.values():
            child.register_forward_pre_hook(_do_nothing)


def _report(
    module: nn.Module, config: Any, before: Collection[nn.Parameter], head: Collection[nn.Parameter], path: str
) -> Report:
    trained = [p for p in module.parameters() if p.requires_grad]
    new = sum(p.numel() for p in trained if p not in before)
    total = sum(_size(p) for p in module.parameters())
    facts = {
        "method": config.peft_type.value,
        "transformer": path or type(module).__name__,
        "adapted layers": sum(is_adapter_layer(child) for child in module.modules()),
        "adapter parameters": new,
        "head parameters": sum(p.numel() for p in trained if p in head),
        "other trained parameters": sum(p.numel() for p in trained if p in before and p not in head),
        "trainable share": sum(p.numel() for p in trained) / max(total, 1),
    }
    return Report("Adapted by peft", facts)


def _size(parameter: nn.Parameter) -> int:
    """Of a weight in 4 bits, of which two lie in a byte, the number of values."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
