"""Prompts that are learnt: vectors before the text, or before the keys and values of each layer, put in by hooks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Where = Literal["embeddings", "cache"]
_NAME = "learnt_prompts"


class LearntPrompts(nn.Module):
    """Virtual tokens of a network, by the prompt encoders of peft.

    A child of the network (the stack of blocks with its embeddings) whose inputs it changes. Virtual tokens are put
    before the text's embeddings and taken off the network's output, so that all above it, such as pooling, losses and
    the generation of text, meets what it knows. A prefix is keys and values that each layer finds in its cache.

    Args:
        network: The network.
        embedding: Its input embedding.
        where: What it puts in: tokens before the ``"embeddings"``, or a prefix in the ``"cache"``.
        crossed: The network is a part of an encoder-decoder.
    """

    is_lightning_ft_prompts = True

    def __init__(self, network: nn.Module, embedding: nn.Module, where: Where, *, crossed: bool) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.configs: dict[str, Any] = {}
        self.active: str | None = None
        self.where = where
        self.crossed = crossed
        # Not as a child, which would be saved twice.
        self._embedding = [embedding]
        self.names = list(inspect.signature(network.forward).parameters)
        self._put_in = 0
        self._hides_cache = False
        network.register_forward_pre_hook(self.before, with_kwargs=True)
        network.register_forward_hook(self.after)

    def add(self, name: str, config: Any, encoder: nn.Module) -> None:
        """Add prompts and let them act."""
        self.configs[name] = config
        self.encoders[name] = encoder
        self.active = name

    def fill(self, name: str, vectors: Tensor) -> None:
        """Give prompts the vectors that were saved of them.

        Raises:
            ValueError: They are of another shape.
        """
        weight = self.vectors(name)
        if weight.shape != vectors.shape:
            raise ValueError(
                f"the adapter does not fit this model: its prompts are of shape {tuple(vectors.shape)}, and here they "
                f"must be {tuple(weight.shape)}"
            )
        with torch.no_grad():
            weight.copy_(vectors)

    def vectors(self, name: str | None = None) -> Tensor:
        """The prompts of a name: (virtual tokens, width), or (virtual tokens, 2 * layers * width) of a prefix."""
        name = name or self.active
        assert name is not None
        config, encoder = self.configs[name], self.encoders[name]
        weight: Tensor = encoder.embedding.weight  # type: ignore[union-attr, assignment]
        if config.inference_mode:
            return weight
        result: Tensor = encoder(torch.arange(weight.shape[0], device=weight.device)[None])[0]
        return result

    def before(self, network: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
        """Forward pre-hook of the network."""
        self._put_in, self._hides_cache = 0, False
        if self.active is None:
            return None
        call = {**dict(zip(self.names, args, strict=False)), **given}
        count = self.configs[self.active].num_virtual_tokens
        past = call.get("past_key_values")
        begins = past is None or past.get_seq_length() == 0
        _longer_mask(call, "attention_mask", count)
        for name in ("position_ids", "cache_position"):
            if call.get(name) is not None:
                call[name] = _shifted(call[name], count, insert=begins and self.where == "embeddings")
        if begins and self.where == "embeddings":
            self._put_tokens(call, count)
        elif begins:
            call["past_key_values"] = self._cache(network, past, _rows(call), count)
            # Else the next step of a generation without a cache would be given this one.
            self._hides_cache = call.get("use_cache") is False
        return (), call

    def _put_tokens(self, call: dict[str, Any], count: int) -> None:
        ids, embedded = call.pop("input_ids", None), call.get("inputs_embeds")
        if embedded is None:
            embedded = self._embedding[0](ids)
        prompts = self.vectors().to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        call["inputs_embeds"] = torch.cat([prompts, embedded], 1)
        if call.get("token_type_ids") is not None:
            types = call["token_type_ids"]
            call["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], count), types], 1)
        self._put_in = count

    def _cache(self, network: Any, past: Any, rows: int, count: int) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        assert self.active is not None
        config = self.configs[self.active]
        if past is None:
            past = DynamicCache(config=network.config)
            if self.crossed:
                past = EncoderDecoderCache(past, DynamicCache(config=network.config))
        width = config.token_dim // config.num_attention_heads
        vectors = self.vectors().view(count, config.num_layers, 2, config.num_attention_heads, width)
        dtype: torch.dtype = self._embedding[0].weight.dtype  # type: ignore[assignment]
        cache = getattr(past, "self_attention_cache", past)  # of an encoder-decoder's two
        for layer, (keys, values) in enumerate(vectors.permute(1, 2, 3, 0, 4).to(dtype)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return past

    def after(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the network."""
        if self._hides_cache and not isinstance(output, tuple):
            output.past_key_values = None
        if self.crossed or not self._put_in:
            return None  # a decoder reads what its encoder made of them
        count, self._put_in = self._put_in, 0
        if isinstance(output, tuple):
            return (output[0][:, count:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, count:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(hidden[:, count:] for hidden in output.hidden_states)
        return output


class _SeenByDecoder:
    """A forward pre-hook of a decoder, which reads what its encoder made of the virtual tokens, too."""

    def __init__(self, prompts: LearntPrompts) -> None:
        self.prompts = prompts

    def __call__(self, network: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if self.prompts.active is None:
            return None
        call = dict(given)
        _longer_mask(call, "encoder_attention_mask", self.prompts.configs[self.prompts.active].num_virtual_tokens)
        return args, call


def prompts_of(module: nn.Module) -> LearntPrompts | None:
    """The prompts in a module, if there are any."""
    return next((child for child in module.modules() if isinstance(child, LearntPrompts)), None)


def add_prompts(path: str, model: Any, config: Any, adapter: str) -> None:
    """Let learnt prompts act in a model of transformers.

    Args:
        path: The model's, for messages.
        model: The model.
        config: Of prompt tuning, P-tuning or prefix tuning; what it leaves open is filled in from the model.
        adapter: Name of the prompts.

    Raises:
        ValueError: The model is not one of transformers, or cannot take the prompts; another method.
    """
    kind = config.peft_type.value
    if kind not in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        raise ValueError(f"config: of peft's prompts there are PROMPT_TUNING, P_TUNING and PREFIX_TUNING; got {kind}")
    if not hasattr(getattr(model, "config", None), "is_encoder_decoder"):
        raise ValueError(
            f"config: {kind} needs a model of transformers, and {path or 'the module'} is a {type(model).__name__}: "
            "use LoRA, which fits into any linear layer"
        )
    where: Where = "cache" if kind == "PREFIX_TUNING" else "embeddings"
    network = _network(model, where)
    needed = "past_key_values" if where == "cache" else "inputs_embeds"
    if needed not in inspect.signature(network.forward).parameters:
        raise ValueError(f"config: {kind} needs a network that takes {needed}=, and {type(network).__name__} does not")
    if where == "cache" and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ValueError(f"config: {kind} works by the cache, which gradient checkpointing leaves out: switch that off")
    embedding = network.get_input_embeddings()
    prompts = prompts_of(model)
    if prompts is None:
        decoder = model.get_decoder() if model.config.is_encoder_decoder else None
        prompts = LearntPrompts(network, embedding, where, crossed=decoder is not None)
        setattr(network, _NAME, prompts)
        if decoder is not None and where == "embeddings":
            decoder.register_forward_pre_hook(_SeenByDecoder(prompts), with_kwargs=True)
    elif prompts.where != where:
        raise ValueError(f"config: {path or 'the module'} has prompts of another kind already: {kind} cannot join them")
    if config.modules_to_save:
        raise ValueError(f"config: modules_to_save={config.modules_to_save} must be left out: the head trains anyway")
    if config.num_virtual_tokens is None or (config.num_transformer_submodules or 1) != 1:
        raise ValueError(
            f"config: num_virtual_tokens must be a number, and num_transformer_submodules 1; got "
            f"{config.num_virtual_tokens} and {config.num_transformer_submodules}"
        )
    _complete(config, network, embedding)
    prompts.add(adapter, config, _encoder(config, embedding))
    prompts.to(embedding.weight.device)


def _network(model: Any, where: Where) -> Any:
    if model.config.is_encoder_decoder:
        return model.get_decoder() if where == "cache" else model.get_encoder()
    return model.base_model


def _complete(config: Any, network: Any, embedding: Any) -> None:
    """What a user leaves to the model: sizes."""
    settings = network.config.get_text_config(decoder=config.peft_type.value == "PREFIX_TUNING")
    heads = settings.num_attention_heads
    config.num_transformer_submodules = config.num_transformer_submodules or 1
    config.num_layers = config.num_layers or settings.num_hidden_layers
    if config.peft_type.value != "PREFIX_TUNING":
        config.num_attention_heads = config.num_attention_heads or heads
        config.token_dim = config.token_dim or embedding.embedding_dim
    else:
        width = getattr(settings, "head_dim", None) or getattr(settings, "d_kv", None) or settings.hidden_size // heads
        config.num_attention_heads = (
            config.num_attention_heads or getattr(settings, "num_key_value_heads", None) or heads
        )
        config.token_dim = config.token_dim or config.num_attention_heads * width
    if hasattr(config, "encoder_hidden_size"):
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim


def _encoder(config: Any, embedding: nn.Module) -> nn.Module:
    import peft

    made: nn.Module
    if config.peft_type.value == "PROMPT_TUNING":
        made = peft.PromptEmbedding(config, embedding)
    elif config.peft_type.value == "P_TUNING":
        made = peft.PromptEncoder(config)
    else:
        made = peft.PrefixEncoder(config)
    return made


def _rows(call: Mapping[str, Any]) -> int:
    given = call.get("input_ids")
    rows: int = (call["inputs_embeds"] if given is None else given).shape[0]  # not len(), which fixes it in a graph
    return rows


def _longer_mask(call: dict[str, Any], name: str, count: int) -> None:
    mask = call.get(name)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            f"learnt prompts need {name} of shape (batch, length), and got "
            f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}: no packing, no static cache"
        )
    call[name] = torch.cat([mask.new_ones(mask.shape[0], count), mask], 1)


def _shifted(positions: Tensor, count: int, *, insert: bool) -> Tensor:
    shifted = positions + count
    if not insert:
        return shifted
    first = torch.arange(count, device=positions.device, dtype=positions.dtype)
    return torch.cat([first.expand(*positions.shape[:-1], -1), shifted], -1)
