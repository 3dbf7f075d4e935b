"""The places that are found in each architecture, by name; every family's own source was read for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_ft.core import Layers
from lightning_ft.core.sub_layers import SubLayer, block_flows
from lightning_ft.core.token_embeddings import token_embeddings
from tests.tiny import BERT, LLAMA, SEQ2SEQ, T5, TINY, tiny

BERT_LIKE = [
    ("attention.output.dense", "attention.self.query", "attention.self.query", None),
    ("output.dense", "intermediate.dense", "intermediate.dense", "output.LayerNorm"),
]
DEBERTA = [("attention.output.dense", "attention.self.query_proj", "attention.self.query_proj", None), BERT_LIKE[1]]
LLAMA_LIKE = [
    ("self_attn.o_proj", "input_layernorm", "self_attn.q_proj", None),
    ("mlp.down_proj", "post_attention_layernorm", "mlp.gate_proj", None),
]
# What ends each sub-layer, what it begins with, its first matrix, and the norm after the block's last addition.
PLACES: dict[str, list[tuple[str, str, str, str | None]]] = {
    **dict.fromkeys(("bert", "roberta", "electra"), BERT_LIKE),
    **dict.fromkeys(("deberta", "deberta-full"), DEBERTA),
    **dict.fromkeys(("llama", "qwen3"), LLAMA_LIKE),
    "distilbert": [
        ("attention.out_lin", "attention.q_lin", "attention.q_lin", None),
        ("ffn.lin2", "ffn.lin1", "ffn.lin1", "output_layer_norm"),
    ],
    "albert": [
        (
            "albert_layers.0.attention.dense",
            "albert_layers.0.attention.query",
            "albert_layers.0.attention.query",
            None,
        ),
        (
            "albert_layers.0.ffn_output",
            "albert_layers.0.ffn",
            "albert_layers.0.ffn",
            "albert_layers.0.full_layer_layer_norm",
        ),
    ],
    # Its attention holds bare parameters and calls no module at its end.
    "xlnet": [("ff.layer_2", "ff.layer_1", "ff.layer_1", "ff.layer_norm")],
    "gpt2": [("attn.c_proj", "ln_1", "attn.c_attn", None), ("mlp.c_proj", "ln_2", "mlp.c_fc", None)],
    "modernbert": [("attn.Wo", "attn_norm", "attn.Wqkv", None), ("mlp.Wo", "mlp_norm", "mlp.Wi", None)],
    "t5": [
        ("layer.0.SelfAttention.o", "layer.0.layer_norm", "layer.0.SelfAttention.q", None),
        ("layer.1.EncDecAttention.o", "layer.1.layer_norm", "layer.1.EncDecAttention.q", None),
        ("layer.2.DenseReluDense.wo", "layer.2.layer_norm", "layer.2.DenseReluDense.wi", None),
    ],
    "bart": [
        ("self_attn.out_proj", "self_attn.q_proj", "self_attn.q_proj", None),
        ("encoder_attn.out_proj", "encoder_attn.q_proj", "encoder_attn.q_proj", None),
        ("fc2", "fc1", "fc1", "final_layer_norm"),
    ],
}
BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}
OTHERS: dict[str, tuple[Any, list[tuple[str, str, str, str | None]]]] = {
    # Attention and feed-forward layer beside each other, added up before they are added to the stream.
    "neox-parallel": (
        hf.GPTNeoXConfig(**BERT),
        [
            ("attention.dense", "input_layernorm", "attention.query_key_value", None),
            ("mlp.dense_4h_to_h", "post_attention_layernorm", "mlp.dense_h_to_4h", None),
        ],
    ),
    "falcon": (
        hf.FalconConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50),
        [
            ("self_attention.dense", "input_layernorm", "self_attention.query_key_value", None),
            ("mlp.dense_4h_to_h", "input_layernorm", "mlp.dense_h_to_4h", None),
        ],
    ),
    # Norms between a sub-layer's last map and the addition.
    "gemma3": (
        hf.Gemma3TextConfig(**LLAMA),
        [
            ("post_attention_layernorm", "input_layernorm", "self_attn.q_proj", None),
            ("post_feedforward_layernorm", "pre_feedforward_layernorm", "mlp.gate_proj", None),
        ],
    ),
    "bloom": (
        hf.BloomConfig(**BLOOM),
        [
            ("self_attention.dense", "input_layernorm", "self_attention.query_key_value", None),
            ("mlp.dense_4h_to_h", "post_attention_layernorm", "mlp.dense_h_to_4h", None),
        ],
    ),
    # A factor on what is added.
    "granite": (hf.GraniteConfig(**LLAMA), LLAMA_LIKE),
}


def _blocks(model: nn.Module) -> list[str]:
    return [path for paths in Layers().block_paths(model).values() for path in paths]


def _short(layers: tuple[SubLayer, ...], block: str) -> list[tuple[str | None, ...]]:
    cut = len(block) + 1
    return [
        tuple(path and path[cut:] for path in (layer.output, layer.entry, layer.source, layer.norm)) for layer in layers
    ]


@pytest.mark.parametrize("name", TINY)
def test_the_sub_layers_of_every_architecture(name: str) -> None:
    model = tiny(name)
    flows = block_flows(model, _blocks(model))
    assert list(flows) == _blocks(model)
    for block, flow in flows.items():
        expected = PLACES[name]
        if "encoder.block" in block or "encoder.layers" in block:
            expected = [PLACES[name][0], PLACES[name][-1]]  # no cross-attention
            if name == "t5":
                expected[1] = tuple(path and path.replace("layer.2", "layer.1") for path in expected[1])  # type: ignore[assignment]
        if name == "modernbert" and block.endswith(".0"):
            expected = [("attn.Wo", "attn.Wqkv", "attn.Wqkv", None), PLACES[name][1]]  # no norm before its first block
        assert _short(flow.sub_layers, block) == expected
        assert not flow.unknown
        assert {layer.width for layer in flow.sub_layers} == {16}


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_of_other_shapes(name: str) -> None:
    config, expected = OTHERS[name]
    model = hf.AutoModelForCausalLM.from_config(config)
    for block, flow in block_flows(model, _blocks(model)).items():
        assert _short(flow.sub_layers, block) == expected


@pytest.mark.parametrize("norm_first", [False, True])
def test_pytorchs_own_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = _Tower(layer)
    (flow,) = block_flows(model, ["layers.0"]).values()
    # The attention reads its output layer's weight and never calls the layer: it is one place as a whole.
    expected = (
        [("self_attn", "norm1", "self_attn", None), ("linear2", "norm2", "linear1", None)]
        if norm_first
        else [("self_attn", "self_attn", "self_attn", None), ("linear2", "linear1", "linear1", "norm2")]
    )
    assert _short(flow.sub_layers, "layers.0") == expected


class _Tower(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.positions = nn.Embedding(99, 8)
        self.layers = nn.ModuleList(blocks)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids.t().contiguous().t()) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class _Gelu(nn.Module):
    """As wide as the stream, and with an addition of its own input inside, as GPT-2's activation; in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.up(hidden)
        inner = inner * torch.tanh(inner + 0.04 * inner.pow(3))
        out = self.down(inner).view(-1, 8).view_as(hidden) * 0.5
        out += hidden
        return out


class _Twice(_Gelu):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(self.up(hidden))


def test_an_addition_within_a_branch_is_none_and_one_in_place_is() -> None:
    (flow,) = block_flows(_Tower(_Gelu()), ["layers.0"]).values()
    assert _short(flow.sub_layers, "layers.0") == [("down", "up", "up", None)]


def test_a_branch_that_no_module_ends_is_counted() -> None:
    (flow,) = block_flows(_Tower(_Twice()), ["layers.0"]).values()
    assert not flow.sub_layers
    assert flow.unknown == 1


def test_a_model_that_cannot_be_run_is_refused() -> None:
    tower = type("Broken", (_Tower,), {"forward": lambda self, batch: batch["x"]})(_Gelu())
    with pytest.raises(ValueError, match=r"sub-layers of layers.0 cannot be told: .*Broken.forward: "):
        block_flows(tower, ["layers.0"])


@pytest.mark.parametrize("name", [*TINY, "t5-lm"])
def test_token_embeddings_are_those_that_look_up_the_ids(name: str) -> None:
    """Not positions (BART's layer takes the ids to see how many there are), nor token types."""
    known: dict[str, Callable[[], nn.Module]] = {
        "t5-lm": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ, **T5))
    }
    model = known.get(name, lambda: tiny(name))()
    found = token_embeddings(model, _blocks(model))
    weights = {id(embedding.weight) for embedding in found}
    assert weights == {id(model.get_input_embeddings().weight)}  # type: ignore[operator]


def test_a_strangers_token_embeddings() -> None:
    model = _Tower(_Gelu())
    assert token_embeddings(model, ["layers.0"]) == [model.tokens]
    del model.tokens
    model.tokens = nn.Linear(1, 8)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"_Tower has no nn.Embedding that looks up token ids"):
        token_embeddings(model, ["layers.0"])
