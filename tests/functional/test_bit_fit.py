from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_ft.core import Layers
from lightning_ft.core.base_weights import base_names
from lightning_ft.functional.bit_fit import bit_fit
from lightning_ft.functional.bottleneck import add_adapters
from tests.strangers import Filtered
from tests.tiny import tiny


def test_counts_of_bert_base() -> None:
    """Per block: four attention biases, 3,072 and 768 of the feed-forward layer, two norms; and norm and pooler."""
    assert 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 2 * 768 == 102_912
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    report = bit_fit(model, layers=Layers(head=[]))
    assert report.facts["biases"] == report.facts["trainable"] == 102_912
    assert f"{report.facts['share']:.3%}" == "0.094%"


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2", "bart"])
def test_what_trains(name: str) -> None:
    config = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    model: Any = (
        hf.AutoModelForSequenceClassification.from_config(
            hf.Qwen2Config(vocab_size=50, num_hidden_layers=2, pad_token_id=0, **config)
        )
        if name == "qwen2"
        else tiny(name)
    )
    bit_fit(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {n for n in trained if n.startswith(("classifier", "score", "classification_head"))}
    assert head
    assert trained - head == {n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"} - head
    if name == "qwen2":  # of queries, keys and values alone
        assert len(trained - head) == 2 * 3
    assert base_names(model).isdisjoint(trained)


def test_the_stacked_bias_of_pytorchs_attention_is_one() -> None:
    module = Filtered()
    report = bit_fit(module)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert "encoder.layers.0.self_attn.in_proj_bias" in trained
    assert report.facts["biases"] == 3 * (24 + 8 + 16 + 8 + 2 * 8) + 8


@pytest.mark.parametrize("name", ["llama", "t5", "modernbert"])
def test_models_without_biases_are_refused(name: str) -> None:
    model = tiny(name)
    with pytest.raises(ValueError, match=r"BitFit trains biases, and \w+ has none outside its head"):
        bit_fit(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_float_biases_of_quantised_layers_train() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    class Quantised(Filtered):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.encoder.layers:
                old = layer.linear1
                layer.linear1 = bnb.nn.Linear4bit(8, 16, quant_type="nf4")
                layer.linear1.load_state_dict(old.state_dict())
            self.to("cpu")

    module = Quantised()
    bit_fit(module, layers=Layers(blocks="encoder.layers", head="classifier"))
    assert module.encoder.layers[0].linear1.bias.requires_grad
    module(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in module.parameters())


def test_it_comes_first() -> None:
    model = tiny("bert")
    bit_fit(model)
    add_adapters(model)
    assert model.bert.encoder.layer[0].output.dense.bias.requires_grad  # type: ignore[union-attr, index]
    other: nn.Module = tiny("bert")
    add_adapters(other)
    with pytest.raises(ValueError, match="list BitFit before the other callback"):
        bit_fit(other)
