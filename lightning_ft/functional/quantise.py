"""Quantise the frozen linear layers of a model in place, and put them back."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_ft.core.fresh import fresh_parameters
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.layers import Layers, as_layers
from lightning_ft.core.report import Report
from lightning_ft.functional.quantised_layers import QuantisedLinear, is_conv1d
from lightning_ft.functional.quantised_tensor import Format, Kind, QuantisedTensor


def quantise(
    module: nn.Module,
    form: Format,
    *,
    threshold: float = 0.0,
    skip: str | Sequence[str] = (),
    layers: Layers | None = None,
) -> Report:
    """Replace, in place, the linear layers of the backbone by :class:`QuantisedLinear`, whose weights never train.

    Quantised are ``nn.Linear`` and transformers' ``Conv1D`` outside the head, also those below adapters of peft. Left
    alone are the adapters; layers whose weight an embedding shares; layers drawn anew (LayerReinit); where some of the
    backbone's layers are frozen and others train, those that train; and what cannot be quantised: subclasses with a
    ``forward`` of their own, the layers of ``nn.MultiheadAttention``, which reads their weights itself, an odd number
    of inputs in 4 bits. The report names these. Weights that trained until now are frozen, and the report says how
    many.

    Args:
        module: Built, with its pretrained weights, neither wrapped nor sharded.
        form: How to pack.
        threshold: Of LLM.int8, see :class:`QuantisedLinear`.
        skip: Regular expressions (``re.search``) on the paths of layers to leave alone.
        layers: Where the head is, if it is not found by itself.

    Returns:
        Layers, weights and bytes by layer group.

    Raises:
        ValueError: Nothing is there to quantise; an expression matches no linear layer; the weights are sharded.
        ImportError: bitsandbytes is not installed.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
        >>> report = quantise(model, Format("int8"), layers=Layers(groups={"body": "^0", "head": "^1"}))
        >>> print(report.facts["layers"], report.facts["bits a weight"], model[1])
        1 8.5 Linear(in_features=64, out_features=2, bias=True)

    Reference:
        Dettmers, Lewis, Belkada and Zettlemoyer 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
        Scale"; Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
    """
    groups = (layers or Layers()).of(module)
    chosen, left = _choose(module, form, [skip] if isinstance(skip, str) else list(skip), groups)
    if not chosen:
        reasons = "; ".join(f"{path}: {why}" for path, why in left.items()) or "it has no linear layer"
        raise ValueError(f"nothing to quantise in {type(module).__name__}: {reasons}")
    rows: dict[str, dict[str, Any]] = {}
    thawed = 0
    for path, layer in chosen.items():
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        name = groups.name_of(weight)
        row = rows.setdefault(name, {"group": name, "layers": 0, "weights": 0, "bytes before": 0, "bytes after": 0})
        thawed += weight.requires_grad
        new = QuantisedLinear(layer, form, threshold=threshold)
        _replace(module, layer, new)
        before, after = weight.numel() * weight.element_size(), _bytes(new)
        values = {"layers": 1, "weights": weight.numel(), "bytes before": before, "bytes after": after}
        row.update({column: row[column] + value for column, value in values.items()})
        del weight, layer
        chosen[path] = new  # the float weight goes before the next layer's comes
    _read_no_weights(module)
    table = [rows[name] for name in groups.names if name in rows]
    return _report(form, table, left, thawed)


def quantise_as(
    module: nn.Module,
    *,
    kind: Kind,
    block_size: int,
    double: bool,
    threshold: float,
    skip: list[str],
    layers: Mapping[str, Any] | None,
) -> Report:
    """:func:`quantise` with plain arguments, as checkpoints remember it (``"quantise"``)."""
    form = Format(kind, block_size, double)
    return quantise(module, form, threshold=threshold, skip=skip, layers=as_layers(layers))


def dequantise(module: nn.Module) -> Report:
    """Put back, in place, layers as they were, with the dequantised weights, frozen: to merge adapters and to export.

    Args:
        module: Any module; without quantised layers nothing is done.

    Example:
        >>> model = nn.Sequential(QuantisedLinear(nn.Linear(64, 64), Format("int8")))
        >>> dequantise(model).facts["layers"], type(model[0]).__name__
        (1, 'Linear')
    """
    found = quantised_layers(module)
    for layer in found.values():
        weight = layer.dequantised()
        plain = layer.replaced.__new__(layer.replaced)
        nn.Module.__init__(plain)
        own = ("_parameters", "scales", "form", "threshold", "transposed", "replaced", "float_dtype")
        vars(plain).update({name: value for name, value in vars(layer).items() if name not in own})
        plain.weight = nn.Parameter(weight.t().contiguous() if layer.transposed else weight, requires_grad=False)
        plain.register_parameter("bias", layer.bias)
        _replace(module, layer, plain)
    return Report("Dequantised", {"layers": len(found)})


def quantised_layers(module: nn.Module) -> dict[str, QuantisedLinear]:
    """Paths and layers that are quantised."""
    return {path: child for path, child in module.named_modules() if isinstance(child, QuantisedLinear)}


def restore_quantised(module: nn.Module, state_dict: dict[str, Tensor]) -> int:
    """Give quantised layers the bits that a state dict holds for them; how many there were.

    A state dict that was loaded before the layers were quantised went through floats.
    """
    layers = quantised_layers(module)
    found = {path: state_dict.get(f"{path}.weight") for path in layers}
    packed = {path: weight for path, weight in found.items() if isinstance(weight, QuantisedTensor)}
    for path, weight in packed.items():
        layers[path].take(weight)
    return len(packed)


def _choose(
    module: nn.Module, form: Format, skip: list[str], groups: LayerGroups
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to quantise, and why others of the backbone are left."""
    linear = {path: child for path, child in module.named_modules() if isinstance(child, nn.Linear) or is_conv1d(child)}
    for pattern in skip:
        if not any(re.search(pattern, path) for path in linear):
            raise ValueError(f"skip={pattern!r} matches no linear layer; there are: {', '.join(list(linear)[:8])}")
    foreign = set(_not_the_base(module))
    inside = {child.out_proj for child in module.modules() if isinstance(child, nn.MultiheadAttention)}
    tied = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    fresh = {id(parameter) for parameter in fresh_parameters(module)}
    chosen: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for path, child in linear.items():
        weight = child.weight
        if isinstance(child, QuantisedLinear) or child in foreign:
            continue
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                f"{path} is sharded (FSDP2), and packed weights cannot be: quantise under DDP or one device"
            )
        if isinstance(weight, nn.Parameter) and weight in _group(groups, "head"):
            continue
        reason = _unfit(child, form)
        if child in inside:
            reason = "nn.MultiheadAttention reads its weight without calling it"
        elif id(weight) in tied:
            reason = "an embedding shares its weight"
        elif id(weight) in fresh:
            reason = "it was drawn anew"
        elif any(re.search(pattern, path) for pattern in skip):
            reason = "skip="
        if reason:
            left[path] = reason
        else:
            chosen[path] = child
    frozen = {path: child for path, child in chosen.items() if not child.weight.requires_grad}
    left |= {path: "it trains, and others do not" for path in chosen if frozen and path not in frozen}
    return frozen or chosen, left


def _group(groups: LayerGroups, name: str) -> Collection[nn.Parameter]:
    return set(groups.parameters(name)) if name in groups else set()


def _unfit(layer: nn.Module, form: Format) -> str:
    if type(layer) is not nn.Linear and not is_conv1d(layer):
        return f"{type(layer).__name__} is a class of its own"
    weight = layer.weight
    if not (isinstance(weight, nn.Parameter) and weight.is_floating_point()):
        return "its weight is no float parameter"
    if not weight.isfinite().all():
        return "its weight is not finite"
    columns = weight.shape[0 if is_conv1d(layer) else 1]
    return f"an odd number of inputs ({columns})" if form.kind != "int8" and columns % 2 else ""


def _not_the_base(module: nn.Module) -> Iterator[nn.Module]:
    """What lies in layers of peft beside the base layer: adapters, even if switched off, and copied heads."""
    tuners = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    wrappers = getattr(sys.modules.get("peft.utils.other"), "AuxiliaryTrainingWrapper", ())
    for child in module.modules():
        if isinstance(child, wrappers):
            yield from child.modules()
        elif isinstance(child, tuners):
            base = getattr(child, "base_layer", None)
            kept = set(base.modules()) if isinstance(base, nn.Module) else set()
            yield from (inner for inner in child.modules() if inner is not child and inner not in kept)


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever it stands: a layer may be registered under several names."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _read_no_weights(module: nn.Module) -> None:
    """``nn.TransformerEncoderLayer`` reads the weights of its layers in eval mode, unless its activation is unknown."""
    for child in module.modules():
        if isinstance(child, nn.TransformerEncoderLayer) and quantised_layers(child):
            child.activation_relu_or_gelu = 0


def _bytes(layer: QuantisedLinear) -> int:
    return sum(part.numel() * part.element_size() for part in layer.parts().values())


def _report(form: Format, table: list[dict[str, Any]], left: dict[str, str], thawed: int) -> Report:
    weights, before, after = (sum(row[name] for row in table) for name in ("weights", "bytes before", "bytes after"))
    for row in table:
        row["bits a weight"] = round(8 * row["bytes after"] / row["weights"], 4)
    facts = {
        "format": form.kind + (f", blocks of {form.block_size}" if form.kind != "int8" else ""),
        "layers": sum(row["layers"] for row in table),
        "bytes before": before,
        "bytes after": after,
        "bits a weight": round(8 * after / weights, 4),
        "frozen": thawed,
        "left": left,
    }
    return Report("Quantised", facts, table)
