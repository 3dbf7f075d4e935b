"""Bottleneck adapters: small trained layers inside the frozen blocks of any model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from lightning_ft.core.layers import Layers, as_layers
from lightning_ft.core.norms import norm_parameters
from lightning_ft.core.report import Report
from lightning_ft.functional.adapter_layers import BottleneckConfig, all_adapters, flat
from lightning_ft.functional.adapter_places import AdapterSpec, adapter_names, as_config, hang
from lightning_ft.functional.invertible_adapter import all_couplings
from lightning_ft.functional.trained_part import train_only

AdapterKind = Literal["pfeiffer", "houlsby", "parallel", "mad-x"]


def add_adapters(
    module: nn.Module,
    *,
    kind: AdapterKind = "pfeiffer",
    name: str = "default",
    config: BottleneckConfig | Mapping[str, Any] | None = None,
    train_norms: bool = False,
    places: Sequence[str] | None = None,
    layers: Layers | Mapping[str, Any] | None = None,
) -> Report:
    """y ← y + s·(W_up φ(W_down h + b_down) + b_up) at the end of sub-layers: only this, and the head, trains.

    y is what the last module of a sub-layer gives, just before it is added to the residual stream r; h depends on the
    kind:

    - ``"houlsby"``: after attention and after the feed-forward layer, h = y. Reduction 16, swish.
    - ``"pfeiffer"``: after the feed-forward layer alone, h = norm(y + r), what the block would give: norm is the
      block's own, where that comes after the addition (BERT), and nothing where norms come first (GPT-2, Llama, T5).
      Reduction 16, ReLU.
    - ``"parallel"``: beside the feed-forward layer, h = its input. Reduction 2, ReLU, s = 4.
    - ``"mad-x"``: a language adapter, which is ``"pfeiffer"`` with reduction 2, and an invertible adapter behind the
      token embeddings, inverted before an output layer that shares their weights
      (:class:`~lightning_ft.functional.invertible_adapter.Coupling`).

    Where the sub-layers end is read off the data flow of a run on the meta device
    (:mod:`lightning_ft.core.sub_layers`): additions a + b with b computed from a. Decoders of an encoder-decoder have a
    sub-layer more, cross-attention. A block that several layers share (ALBERT) has one set of adapters, which they
    share, too.

    Adapters added to a model that has some are stacked on those at work, which freeze: y goes through one after the
    other.

    Deviations. The block's own dropout after a sub-layer falls on y and adapter alike; published code has the adapter
    after it. In a stack, an adapter's residual is what the one below gave (as in the AdapterHub library), so that a new
    one changes nothing; by MAD-X's text it is the feed-forward layer's output. The invertible adapter stands behind the
    token embedding itself, whose weights the output layer shares, and not behind its sum with positions.

    Args:
        module: Any module that holds the model.
        kind: See above.
        name: Of these adapters, a part of their parameters' names.
        config: A :class:`~lightning_ft.functional.adapter_layers.BottleneckConfig`, or its values as a mapping.
        train_norms: Train the norms of the blocks, too (as Houlsby does).
        places: Regular expressions (``re.search``) on paths of modules inside blocks, where the sub-layers cannot be
            told: adapters follow what they match, and read its output (``"parallel"``: its input).
        layers: Where the blocks and the head are, if they are not found by themselves.

    Returns:
        The places, and how many parameters train.

    Raises:
        ValueError: An argument is out of range; ``name`` is taken; the sub-layers cannot be told by structure;
            ``places`` matches nothing; the width of token embeddings is odd.

    Example:
        >>> import transformers
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        >>> bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
        >>> print(add_adapters(bert, config={"reduction": 4}))
        Adapters
          name: default
          kind: pfeiffer
          trainable: 330
          parameters: 14,106
          place                              group    parameters
          bert.encoder.layer.0.output.dense  block.0         148
          bert.encoder.layer.1.output.dense  block.1         148

    Reference:
        Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; Pfeiffer, Vulić, Gurevych and Ruder 2020,
        "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer"; He et al. 2022, "Towards a Unified
        View of Parameter-Efficient Transfer Learning" (parallel).
    """
    where = as_layers(layers)
    spec = AdapterSpec(name, kind, as_config(config), None if places is None else tuple(places))
    norms = _block_norms(module, where) if train_norms else []
    below, earlier = active_adapters(module), adapter_parameters(module)
    made = hang(module, spec, layers=where)
    use_adapters(module, [*below, name])
    freeze(earlier)
    sizes = train_only(module, [*(p for _, p in made), *norms], where)
    groups = where.of(module)
    rows: dict[str, dict[str, Any]] = {}
    for path, parameter in made:
        row = rows.setdefault(path, {"place": path, "group": groups.name_of(parameter), "parameters": 0})
        row["parameters"] += parameter.numel()
    return Report("Adapters", {"name": name, "kind": kind, **sizes}, list(rows.values()))


def add_frozen_adapters(
    module: nn.Module,
    *,
    adapters: Sequence[Mapping[str, Any]],
    use: bool = True,
    layers: Layers | Mapping[str, Any] | None = None,
) -> Report:
    """Build adapters that were trained elsewhere, without their weights; of the model only the head trains.

    :func:`~lightning_ft.functional.adapter_files.load_adapter` does this, and loads the weights.

    Args:
        module: Any module that holds the model.
        adapters: What their files say of them, each ``{"name", "kind", "config", "places"}``.
        use: Stack them on those at work, in this order; else they are there and do nothing.
        layers: Where the blocks and the head are.

    Raises:
        ValueError: As for :func:`add_adapters`.
    """
    where, before = as_layers(layers), active_adapters(module)
    specs = [AdapterSpec.of(settings) for settings in adapters]
    made = [p for spec in specs for _, p in hang(module, spec, layers=where)]
    freeze(made)
    use_adapters(module, [*before, *(spec.name for spec in specs if use)])
    # Not marked as the base: a checkpoint must hold them.
    sizes = train_only(module, made, where)
    return Report("Frozen adapters", {"names": [spec.name for spec in specs], **sizes})


def use_adapters(module: nn.Module, names: Sequence[str | Sequence[str]]) -> Report:
    """Put adapters to work, bottom to top: ``["lang_de", "task"]`` stacks the task's on the language's.

    A list among the names is a fusion of these adapters (:func:`~lightning_ft.functional.adapter_fusion.add_fusion`):
    ``["lang_de", ["task_a", "task_b"]]``. No names: the model without adapters. What trains stays as it is. A
    checkpoint remembers it if it is done by ``alter(module, "adapter_stack", {"names": [...]})``.

    Args:
        module: A module with adapters.
        names: Of adapters, in the order in which a hidden state goes through them.

    Raises:
        ValueError: There is no such adapter; one stands twice; a fusion of these was not added.

    Example:
        >>> import transformers
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        >>> bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
        >>> for name in ("lang_en", "lang_de", "task"):
        ...     _ = add_adapters(bert, kind="pfeiffer" if name == "task" else "mad-x", name=name)
        >>> print(use_adapters(bert, ["lang_de", "task"]))
        Adapters at work
          stack: ['lang_de', 'task']
          before: ['lang_en', 'lang_de', 'task']
    """
    wanted: list[str | list[str]] = [name if isinstance(name, str) else list(name) for name in names]
    known, chosen = adapter_names(module), flat(wanted)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"names: there are no adapters {', '.join(unknown)}; there are: {', '.join(known) or 'none'}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"names={wanted!r} must hold each adapter once")
    before = active_adapters(module)
    places = [adapters for _, adapters in all_adapters(module)]
    for element in wanted:
        if not isinstance(element, str) and any(
            set(element) & set(place.names()) and element != place.fused for place in places
        ):
            raise ValueError(f"names: a fusion of {element} was not added; use add_fusion(module, names={element})")
    for place in places:
        place.active = wanted
    for couplings in all_couplings(module):
        couplings.active = [name for name in chosen if name in couplings.names()]
    return Report("Adapters at work", {"stack": wanted, "before": before})


def active_adapters(module: nn.Module) -> list[str | list[str]]:
    """What is at work, bottom to top, as :func:`use_adapters` takes it."""
    return list(next((adapters.active for _, adapters in all_adapters(module)), []))


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Of all adapters, invertible ones and fusions."""
    holders = [*(adapters for _, adapters in all_adapters(module)), *all_couplings(module)]
    return list(dict.fromkeys(p for holder in holders for p in holder.parameters()))


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Let parameters stand still that are no part of the base: checkpoints hold them."""
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def _block_norms(module: nn.Module, layers: Layers) -> list[nn.Parameter]:
    blocks = [module.get_submodule(path) for paths in layers.block_paths(module).values() for path in paths]
    return [p for block in blocks for p in norm_parameters(block)]
