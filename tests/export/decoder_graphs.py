"""Graphs of decoders with a key-value cache, and of an encoder-decoder in three parts, as engines are built of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from lightning_ft.export.graph import _strip
from tests.pretrained import config

BATCH, LENGTH, PAST = 2, 5, 3


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 50, shape, generator=torch.Generator().manual_seed(0))


class Step(nn.Module):
    """A decoder's next tokens, with the keys and values of those before."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]) -> Any:
        cache = DynamicCache()
        for i in range(len(past) // 2):
            cache.update(past[2 * i], past[2 * i + 1], i)
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return found.logits, [part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)]


class Encoder(nn.Module):
    """An encoder-decoder's encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.get_encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class First(nn.Module):
    """The decoder's first token, with all keys and values: its own, and those of the encoder's states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Any:
        found = self.model(
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=(encoder_hidden_states,),
            attention_mask=encoder_attention_mask,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            use_cache=True,
        )
        return found.logits, _kept(found.past_key_values)


class Later(nn.Module):
    """The decoder's later tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, encoder_attention_mask: Tensor, past: list[Tensor]) -> Any:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for i in range(len(past) // 4):
            cache.self_attention_cache.update(past[4 * i], past[4 * i + 1], i)
            cache.cross_attention_cache.update(past[4 * i + 2], past[4 * i + 3], i)
            cache.is_updated[i] = True
        # Only the shape of the encoder's states is read: keys and values are in the cache.
        states = torch.zeros(*encoder_attention_mask.shape, self.model.config.d_model)
        found = self.model(
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=(states,),
            attention_mask=encoder_attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
        return found.logits, _kept(found.past_key_values)[: len(past)]


def _kept(cache: Any) -> list[Tensor]:
    return [
        part
        for own, cross in zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        for part in (own.keys, own.values, cross.keys, cross.values)
    ]


def _export(
    module: nn.Module, args: tuple[Any, ...], axes: Any, inputs: list[str], outputs: list[str], to: Path
) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            opset_version=20,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=axes,
            verbose=False,
        )
    assert program is not None
    _strip(program)
    program.save(to)


def gpt2_with_cache(folder: Path) -> Any:
    """``model.onnx``: input_ids, attention_mask, position_ids and past.* in; logits and present.* out."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(
        config("gpt2", initializer_range=0.2), attn_implementation="eager"
    ).eval()
    layers, heads = model.config.n_layer, model.config.n_head
    past = [random(BATCH, heads, PAST, model.config.n_embd // heads) for _ in range(2 * layers)]
    args = (
        tokens(BATCH, LENGTH),
        torch.ones(BATCH, PAST + LENGTH, dtype=torch.long),
        torch.arange(PAST, PAST + LENGTH).expand(BATCH, LENGTH).contiguous(),
        past,
    )
    both = {0: "batch", 1: "sequence"}
    axes = (both, {0: "batch", 1: "past + sequence"}, both, [{0: "batch", 2: "past"}] * len(past))
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past.{name}" for name in names)]
    folder.mkdir()
    _export(Step(model), args, axes, inputs, ["logits", *(f"present.{n}" for n in names)], folder / "model.onnx")
    return model


def t5_in_three(folder: Path) -> Any:
    """``encoder.onnx``, ``decoder_init.onnx`` and ``decoder_step.onnx``."""
    torch.manual_seed(0)
    model = hf.AutoModelForSeq2SeqLM.from_config(
        config("t5", num_layers=1, num_decoder_layers=1), attn_implementation="eager"
    ).eval()
    settings = model.config
    layers, heads, size = settings.num_decoder_layers, settings.num_heads, settings.d_kv
    source = {0: "batch", 1: "source"}
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    folder.mkdir()
    names = ["input_ids", "attention_mask"]
    to = folder / "encoder.onnx"
    _export(Encoder(model), (tokens(BATCH, LENGTH), mask), (source, source), names, ["encoder_hidden_states"], to)
    kinds = ("key", "value", "cross.key", "cross.value")
    present = [f"present.{i}.{part}" for i in range(layers) for part in kinds]
    names = ["decoder_input_ids", "encoder_hidden_states", "encoder_attention_mask"]
    target = {0: "batch", 1: "sequence"}
    args: tuple[Any, ...] = (tokens(BATCH, PAST), random(BATCH, LENGTH, settings.d_model), mask)
    to = folder / "decoder_init.onnx"
    _export(First(model), args, (target, source, source), names, ["logits", *present], to)
    past = [random(BATCH, heads, PAST if own else LENGTH, size) for _ in range(layers) for own in (1, 1, 0, 0)]
    places = [{0: "batch", 2: "past" if own else "source"} for _ in range(layers) for own in (1, 1, 0, 0)]
    names = ["decoder_input_ids", "encoder_attention_mask", *(name.replace("present", "past") for name in present)]
    args = (tokens(BATCH, 2), mask, past)
    to = folder / "decoder_step.onnx"
    _export(Later(model), args, (target, source, places), names, ["logits", *present], to)
    return model
