"""What of a model that writes text goes into graphs: caches of keys and values as tensors in, and as tensors out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ft.export.wrappers import GraphWrapper

if TYPE_CHECKING:
    from transformers import DynamicCache


_NO_CACHE = (
    "{} keeps no keys and values of tokens for each layer (a state space model, or XLNet?), which "
    "the graph would hand on: give a `head` with a GraphWrapper of your own"
)


class CausalStep(GraphWrapper):
    """A decoder that reads tokens after what its cache holds: one graph for prompts (an empty cache) and single tokens.

    Inputs are ``input_ids`` and ``position_ids``, ``(batch, sequence)``; ``attention_mask``, ``(batch, total)``, of the
    cache's tokens and the new ones; ``logits_to_keep``, ``(kept,)``, the places among the new tokens whose logits are
    wanted (after a long prompt only the last; with a large vocabulary all of them cost more than the rest); and
    ``past.{i}.key`` and ``past.{i}.value``, ``(batch, heads, past, width)``, of which ``past`` may be 0. Models without
    ``position_ids`` or ``logits_to_keep`` have no such input.

    Outputs are ``logits``, ``(batch, kept, vocabulary)``, and ``present.{i}.key`` and ``present.{i}.value``.

    Args:
        model: A causal language model of transformers with a cache of keys and values.

    Raises:
        TypeError: Its cache is another one, such as a state space model's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        known = inspect.signature(model.forward).parameters
        self.tokens = ("input_ids", "attention_mask", *(n for n in ("position_ids", "logits_to_keep") if n in known))
        self.shapes = cache_shapes(model)
        self.past = _names("past", len(self.shapes))
        self.outputs = ("logits", *_names("present", len(self.shapes)))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute logits and the longer cache; see the class."""
        given = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        known = {name: value for name, value in given.items() if value is not None}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache_of(past),
            use_cache=True,
            return_dict=True,
            **known,
        )
        return (output.logits, *tensors_of(output.past_key_values))

    def axes(self, name: str) -> Mapping[int, str]:
        """The cache has an axis of its own, and the mask covers both."""
        if name.startswith("past."):
            return {0: "batch", 2: "past"}
        return {"attention_mask": {0: "batch", 1: "total"}, "logits_to_keep": {0: "kept"}}.get(name) or super().axes(
            name
        )

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The cache's tensors are one list."""
        first = {name: inputs[name] for name in self.tokens[:2]}
        rest = {name: inputs[name] for name in self.tokens[2:]}
        return {**first, "past": [inputs[name] for name in self.past], **rest}

    def sample(self, tokens: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The tokens as those that follow a cache of random keys and values, which begins where the mask does."""
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        length = ids.shape[1]
        past = {
            name: torch.randn(len(ids), shape[0], length + 1, shape[1], generator=generator)
            for name, shape in zip(self.past, (s for shape in self.shapes for s in shape), strict=True)
        }
        made = {
            "input_ids": ids,
            "attention_mask": torch.cat([mask.new_ones(len(ids), length + 1), mask], 1),
            "position_ids": torch.arange(length + 1, 2 * length + 1).expand(len(ids), -1),
            "logits_to_keep": torch.tensor([0, length - 1]),
        }
        first, rest = self.tokens[:2], self.tokens[2:]
        return {**{n: made[n] for n in first}, **past, **{n: made[n] for n in rest}}


class SourceEncoder(GraphWrapper):
    """An encoder, with the keys and values that each layer of the decoder makes of its states.

    Inputs are ``input_ids`` and ``attention_mask``, ``(batch, source)``; outputs ``cross.{i}.key`` and
    ``cross.{i}.value``, ``(batch, heads, source, width)``. The decoder needs nothing else of the source, and computes
    nothing of it anew: so that one graph of it does for the first token and all others, and no weights are written
    twice but the embeddings that both share.

    Args:
        model: An encoder-decoder of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.outputs = _names("cross", len(cache_shapes(model)))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Compute keys and values; arguments as in :meth:`GraphWrapper.forward`."""
        from transformers import DynamicCache, EncoderDecoderCache

        states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # Any token will do: what the decoder computes of it is not asked for, and falls out of the graph.
        self.model(
            encoder_outputs=states,
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :1],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return tuple(tensors_of(cache.cross_attention_cache))

    def axes(self, name: str) -> Mapping[int, str]:
        """The sequence is the source."""
        return {0: "batch", 1: "source"}


class TargetStep(GraphWrapper):
    """A decoder that reads tokens after what its cache holds, and attends to a source.

    Inputs are ``input_ids``, ``(batch, sequence)``; ``encoder_attention_mask``, ``(batch, source)``; ``past.{i}.key``
    and ``past.{i}.value``, ``(batch, heads, past, width)``, of which ``past`` may be 0; and what
    :class:`SourceEncoder` gives. Outputs are ``logits``, ``(batch, sequence, vocabulary)``, and ``present.{i}.key``
    and ``present.{i}.value``.

    Args:
        model: An encoder-decoder of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shapes = cache_shapes(model)
        self.past, self.cross = _names("past", len(self.shapes)), _names("cross", len(self.shapes))
        self.outputs = ("logits", *_names("present", len(self.shapes)))
        self.width = _state_width(model)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, encoder_attention_mask: Tensor, past: list[Tensor], cross: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Compute logits and the longer cache; see the class."""
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        cache = EncoderDecoderCache(cache_of(past), cache_of(cross))
        for layer in range(len(self.shapes)):
            cache.is_updated[layer] = True  # take the keys that are there
        # The model asks the encoder's states for their shape alone.
        states = cross[0].new_zeros(1).expand(*encoder_attention_mask.shape, self.width)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return (output.logits, *tensors_of(cache.self_attention_cache))

    def axes(self, name: str) -> Mapping[int, str]:
        """Those of the caches, too."""
        if name.startswith(("past.", "cross.")):
            return {0: "batch", 2: "past" if name.startswith("past.") else "source"}
        return {0: "batch", 1: "source"} if name == "encoder_attention_mask" else super().axes(name)

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Each cache's tensors are one list."""
        first = {name: inputs[name] for name in ("input_ids", "encoder_attention_mask")}
        caches = {"past": [inputs[name] for name in self.past], "cross": [inputs[name] for name in self.cross]}
        return {**first, **caches}

    def sample(self, tokens: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Targets, caches and sources of different lengths."""
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        lengths = {"past": ids.shape[1] + 2, "cross": ids.shape[1]}
        flat = [s for shape in self.shapes for s in shape]
        caches = {
            name: torch.randn(len(ids), shape[0], lengths[kind], shape[1], generator=generator)
            for kind, names in (("past", self.past), ("cross", self.cross))
            for name, shape in zip(names, flat, strict=True)
        }
        return {"input_ids": ids[:, : ids.shape[1] - 1], "encoder_attention_mask": mask, **caches}


def cache_of(tensors: Sequence[Tensor]) -> DynamicCache:
    """A cache that holds keys and values, layer by layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        cache.update(keys, values, layer)
    return cache


def tensors_of(cache: Any) -> list[Tensor]:
    """Keys and values of a cache, layer by layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def cache_shapes(model: nn.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Heads and width of the keys and of the values, by layer of the decoder.

    Raises:
        TypeError: The model has no cache of keys and values.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    if not {"input_ids", "past_key_values"} <= inspect.signature(model.forward).parameters.keys():
        raise TypeError(f"model: {_NO_CACHE.format(type(model).__name__)}")
    device = next(model.parameters()).device
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    paired = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache()) if paired else DynamicCache()
    given = {"decoder_input_ids": ids} if paired else {}
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True, **given)
    found = cache.self_attention_cache if paired else cache
    same = getattr(output, "past_key_values", None) is cache
    layers = [getattr(layer, "keys", None) for layer in found.layers]
    if not same or not layers or any(keys is None or keys.ndim != 4 for keys in layers):
        raise TypeError(f"model: {_NO_CACHE.format(type(model).__name__)}")
    return [tuple((t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)) for layer in found.layers]  # type: ignore[misc]


def _state_width(model: Any) -> int:
    config = model.config
    return int(getattr(config, "d_model", None) or config.hidden_size)


def _names(kind: str, layers: int) -> tuple[str, ...]:
    return tuple(f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))
