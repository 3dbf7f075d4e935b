"""Where adapters go in a model, and hanging them there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_ft.core.layers import Layers
from lightning_ft.core.sub_layers import BlockFlow, SubLayer, block_flows
from lightning_ft.core.token_embeddings import token_embeddings
from lightning_ft.functional.adapter_layers import (
    Adapters,
    Bottleneck,
    BottleneckConfig,
    Reads,
    Tap,
    adapters_at,
    all_adapters,
)
from lightning_ft.functional.invertible_adapter import Coupling, all_couplings, couplings_at


@dataclass(frozen=True)
class Kind:
    """What a name of a kind of adapter means.

    Args:
        reads: What each adapter takes.
        every: After every sub-layer of a block, and not the last (the feed-forward layer) alone.
        invertible: One more, invertible, behind the token embeddings.
        config: Of each adapter.
    """

    reads: Reads
    every: bool
    invertible: bool
    config: BottleneckConfig


KINDS = {
    "pfeiffer": Kind("block", False, False, BottleneckConfig(16, "relu", "identity", 1.0)),
    "houlsby": Kind("output", True, False, BottleneckConfig(16, "swish", "identity", 1.0)),
    "parallel": Kind("input", False, False, BottleneckConfig(2, "relu", "identity", 4.0)),
    "mad-x": Kind("block", False, True, BottleneckConfig(2, "relu", "identity", 1.0)),
}


@dataclass(frozen=True)
class AdapterSpec:
    """All that is needed to build a set of adapters: plain values, for checkpoints and files.

    Args:
        name: Of the adapters, one at each place.
        kind: One of ``KINDS``.
        config: Its shape; what is None in it is what is usual for the kind.
        places: Regular expressions on module paths, where the places are not to be found by structure.

    Raises:
        ValueError: The kind is unknown; the name cannot be a part of parameter names.
    """

    name: str
    kind: str = "pfeiffer"
    config: BottleneckConfig = field(default_factory=BottleneckConfig)
    places: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}")
        taken = hasattr(Adapters(1), self.name) or self.name == "fusion"
        if not re.fullmatch(r"\w[\w-]*", self.name) or taken:
            raise ValueError(
                f"name={self.name!r} must be of letters, digits, - and _, and not taken by a module's own attribute: "
                'such as "default" or "lang_en"'
            )

    @classmethod
    def of(cls, settings: Any) -> AdapterSpec:
        """From plain values, as :meth:`plain` gives."""
        if isinstance(settings, cls):
            return settings
        config, places = as_config(settings.get("config")), settings.get("places")
        return cls(settings["name"], settings["kind"], config, None if places is None else tuple(places))

    def plain(self) -> dict[str, Any]:
        """As a dictionary of plain values, nothing in it left to defaults but ``places``."""
        places = None if self.places is None else list(self.places)
        return {"name": self.name, "kind": self.kind, "config": self.complete().plain(), "places": places}

    def complete(self) -> BottleneckConfig:
        """The configuration with the kind's usual values for what is None."""
        usual, given = KINDS[self.kind].config.plain(), self.config.plain()
        return BottleneckConfig(**{key: usual[key] if value is None else value for key, value in given.items()})


def as_config(config: Any) -> BottleneckConfig:
    """From None, a mapping of plain values, or one that is ready."""
    if isinstance(config, BottleneckConfig):
        return config
    return BottleneckConfig(**(config or {}))


def adapter_names(module: nn.Module) -> list[str]:
    """Names of all adapters in a module, in the order in which they came."""
    places = [adapters.names() for _, adapters in all_adapters(module)]
    return list(
        dict.fromkeys(name for names in (*places, *(c.names() for c in all_couplings(module))) for name in names)
    )


def hang(module: nn.Module, spec: AdapterSpec, *, layers: Layers) -> list[tuple[str, nn.Parameter]]:
    """Build one set of adapters, each where it belongs; none of them is at work yet.

    Returns:
        Path of each place, and the parameters there, in order.

    Raises:
        ValueError: The name is taken; the places cannot be told.
    """
    if spec.name in adapter_names(module):
        raise ValueError(f"name={spec.name!r} is taken by adapters that {type(module).__name__} has already")
    kind, config = KINDS[spec.kind], spec.complete()
    # Of a place that somebody named nothing is known of what the block does with its output.
    reads: Reads = "output" if spec.places is not None and kind.reads == "block" else kind.reads
    blocks = [path for paths in layers.block_paths(module).values() for path in paths]
    flows = block_flows(module, blocks)
    chosen = _given(flows, spec.places) if spec.places is not None else _found(flows, spec.kind, kind)
    generator = torch.Generator().manual_seed(config.seed)
    made: list[tuple[str, nn.Parameter]] = []
    for place in chosen:
        target = module.get_submodule(place.output)
        adapters = adapters_at(target, place.width)
        like = next(target.parameters(), next(module.parameters()))
        adapters.add_module(spec.name, Bottleneck(place.width, config, generator, like))
        adapters.reads[spec.name], adapters.specs[spec.name] = reads, spec
        _wire(module, place, reads, adapters)
        made += [(place.output, p) for p in adapters.adapter(spec.name).parameters()]
    if kind.invertible:
        paths = {child: path for path, child in module.named_modules()}
        for embedding in token_embeddings(module, blocks):
            couplings = couplings_at(module, embedding)
            if spec.name not in couplings.names():
                width = embedding.embedding_dim
                couplings.add_module(spec.name, Coupling(width, config, generator, embedding.weight))
                made += [(paths[embedding], p) for p in couplings._modules[spec.name].parameters()]  # type: ignore[union-attr]
    return made


def _wire(module: nn.Module, place: SubLayer, reads: Reads, adapters: Adapters) -> None:
    """Let what adapters read be caught where it passes."""
    path = place.entry if reads == "block" else place.source
    if reads == "output" or path is None:
        return
    if (known := adapters.taps.get(reads)) is not None:
        if known.path != path:
            raise ValueError(
                f"places: adapters at {place.output} read the input of {known.path} already, and would now read "
                f"that of {path}: give other places"
            )
        return
    adapters.taps[reads] = tap = Tap(path)
    module.get_submodule(path).register_forward_pre_hook(tap.catch, with_kwargs=True)
    if reads == "block" and place.norm is not None:
        adapters.norm.append(module.get_submodule(place.norm))


def _found(flows: dict[str, BlockFlow], name: str, kind: Kind) -> list[SubLayer]:
    places: list[SubLayer] = []
    for path, flow in flows.items():
        layers = flow.sub_layers if kind.every else flow.sub_layers[-1:]
        lacking = {"block": "entry", "input": "source"}.get(kind.reads)
        if (
            flow.unknown
            or len(flow.sub_layers) < (2 if kind.every else 1)
            or any(lacking and getattr(layer, lacking) is None for layer in layers)
        ):
            known = ", ".join(layer.output for layer in flow.sub_layers) or "none"
            raise ValueError(
                f"places= must say after which modules {name} adapters go: of {path} not every sub-layer could be "
                f"told by structure (found {known}); give regular expressions on module paths"
            )
        places += layers
    return list({layer.output: layer for layer in places}.values())


def _given(flows: dict[str, BlockFlow], patterns: Sequence[str]) -> list[SubLayer]:
    """What the expressions match; an adapter there reads the place's own output, or its input."""
    widths = {path: width for flow in flows.values() for path, width in flow.widths.items()}
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in widths):
            some = ", ".join(list(widths)[:8])
            raise ValueError(f"places: {pattern!r} matches no module that a block runs once; there are: {some}, ...")
    matched = [path for path in widths if any(re.search(pattern, path) for pattern in patterns)]
    return [SubLayer(path, path, path, None, widths[path]) for path in matched]
