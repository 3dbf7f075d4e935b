from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_ft.functional.mixed_layers import MixedLayers, linear_weights
from tests.strangers import LENGTH, VOCABULARY, WIDTH, Encoder, pretrained
from tests.tiny import TINY, tiny

ARCHITECTURES = ["encoder", "bert", "gpt2", "llama", "t5", "bart", "deberta", "modernbert", "xlnet", "albert"]
TOKENS = torch.arange(2 * LENGTH).view(2, LENGTH) % (VOCABULARY - 3) + 3


def build(name: str) -> nn.Module:
    """In train mode, with no dropout but the mixed weights."""
    model = pretrained(Encoder, 0.0) if name == "encoder" else tiny(name)
    for child in model.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        for attribute in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(vars(child).get(attribute), float):
                setattr(child, attribute, 0.0)
    return model.train()


def run(model: nn.Module) -> Tensor:
    if isinstance(model, Encoder):
        return model(TOKENS)
    tokens = TOKENS.clone()
    tokens[:, -1] = 2  # BART's and T5's classifiers look for the end
    return model(input_ids=tokens).logits


def references(model: nn.Module) -> dict[Any, Tensor]:
    return {weight: torch.randn_like(weight.parameter) / 4 for weight in linear_weights(model)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_compute_with_the_mixed_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear weight, wherever it is read: all of them put back give what a model of the references gives."""
    assert name == "encoder" or name in TINY
    model = build(name)
    chosen = references(model)
    matrices = {id(p) for p in model.parameters() if p.ndim == 2}
    embeddings = {id(child.weight) for child in model.modules() if isinstance(child, nn.Embedding)}
    left = [
        n for n, p in model.named_parameters() if id(p) in matrices - embeddings - {id(w.parameter) for w in chosen}
    ]
    # XLNet and DeBERTa hold bare parameters, and classifiers without a module of their own there are none.
    assert not left or name in ("xlnet", "deberta"), left

    other = copy.deepcopy(model)
    by_name = {id(p): n for n, p in model.named_parameters()}
    with torch.no_grad():
        for weight, reference in chosen.items():
            other.get_parameter(by_name[id(weight.parameter)]).copy_(reference)
    plain, expected = run(model), run(other)

    monkeypatch.setattr("lightning_ft.functional.mixed_layers.mixout", lambda w, reference, p, **_: reference + 0 * w)
    mixing = MixedLayers(chosen, 0.5)
    torch.testing.assert_close(run(model), expected)
    assert mixing.used
    assert torch.equal(run(model.eval()), plain)  # without dropout
    mixing.remove()
    assert torch.equal(run(model.train()), plain)


def test_gradients_reach_the_parameters_themselves() -> None:
    model = build("bert")
    state = list(model.state_dict())
    mixing = MixedLayers(references(model), 0.5)
    run(model).square().sum().backward()
    assert all(weight.parameter.grad is not None for weight in linear_weights(model))
    assert list(model.state_dict()) == state
    assert not any("weight" in vars(child) for child in model.modules())
    mixing.remove()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_recomputation_under_checkpointing_draws_the_same_units(name: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = build(name)
        torch.manual_seed(1)
        chosen = references(model)
        mixing = MixedLayers(chosen, 0.5)
        if checkpointing:
            # Of transformers 5.0 on, and the name that it goes by later.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(2)
        run(model).square().sum().backward()
        assert not any("weight" in vars(child) for child in model.modules())
        mixing.remove()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 30
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_an_exception_leaves_no_mixed_weight_behind() -> None:
    layer = nn.Linear(2, 2)
    mixing = MixedLayers({linear_weights(layer)[0]: torch.zeros(2, 2)}, 0.5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(1, 3))
    assert "weight" not in vars(layer)
    mixing.remove()


def test_a_copy_of_the_module_mixes_its_own_weights_until_the_end() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    reference = torch.zeros(WIDTH, WIDTH)
    mixing = MixedLayers({linear_weights(layer)[0]: reference}, 0.5)
    other = copy.deepcopy(layer)
    assert other._forward_pre_hooks
    other.weight.data.fill_(1.0)
    eye = torch.eye(WIDTH)
    assert set(other(eye).unique().tolist()) == {0.0, 2.0}
    mixing.remove()
    assert torch.equal(other(eye), torch.ones(WIDTH, WIDTH))


def test_frozen_weights_are_left_as_they_are() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.weight.requires_grad_(False)
    mixing = MixedLayers({linear_weights(layer)[0]: torch.zeros(WIDTH, WIDTH)}, 0.9)
    assert torch.equal(layer(torch.eye(WIDTH)), layer.eval()(torch.eye(WIDTH)))
    assert not mixing.used
    assert not mixing.trains()
    mixing.remove()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_draws_anew(when: str) -> None:
    """Whether it was compiled before the weights were mixed or runs for the first time then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = torch.randn(4, WIDTH)
    if when == "before":
        compiled(inputs)
    mixing = MixedLayers({weight: torch.zeros(WIDTH, WIDTH) for weight in linear_weights(model)}, 0.5)
    assert len({compiled(inputs).sum().item() for _ in range(6)}) == 6
    compiled(inputs).sum().backward()
    assert model[0].weight.grad is not None
    model.eval()
    assert torch.allclose(compiled(inputs), model(inputs))
    mixing.remove()


def test_output_layers_tied_to_an_embedding_are_left_out() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "inner": nn.Linear(4, 4), "output": nn.Linear(4, 5)})
    model["output"].weight = model["embedding"].weight
    assert [weight.reader for weight in linear_weights(model)] == [model["inner"]]


@pytest.mark.parametrize("kind", ["linear", "transposed", "attention"])
def test_an_input_unit_is_put_back_with_all_its_outgoing_weights(kind: str) -> None:
    """Of a transposed weight those are a row; queries, keys and values have an input each."""
    torch.manual_seed(0)
    layer: Any = {
        "linear": lambda: nn.Linear(64, 5),
        "transposed": lambda: Conv1D(5, 64),
        "attention": lambda: nn.MultiheadAttention(64, 2),
    }[kind]()
    weight = linear_weights(layer)[0]
    mixing = MixedLayers({weight: torch.zeros_like(weight.parameter)}, 0.5)
    kept = mixing.mixed(weight.parameter, torch.zeros_like(weight.parameter), weight) != 0
    if kind != "linear":  # output units first
        kept = kept.T if kind == "transposed" else kept.view(3, 64, 64).transpose(0, 1)
    assert (kept == kept[:1]).all()
    assert 0.3 < kept[0].float().mean() < 0.7
    assert kind != "attention" or (kept[0, 0] != kept[0, 1]).any()
    mixing.remove()
