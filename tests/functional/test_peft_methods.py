"""What peft's methods do to a module, against closed forms and peft's own models."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_ft.core.base_weights import base_names
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.functional.adalora import RankBudget
from lightning_ft.functional.alterations import alter, alterations
from lightning_ft.functional.peft_merge import merge, plain_model
from lightning_ft.functional.peft_methods import adapt, adapter_parameters, linear_names, plain_config, read_config
from tests.strangers import FILTERED, Filtered
from tests.tiny import BERT, LLAMA, tiny

QUIET = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # between the two packages


class Holder(nn.Module):
    """Any module that holds a model under a name of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.thing = model


def ids() -> Tensor:
    drawn = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    drawn[:, -1] = 2  # T5 reads a text at its end
    return drawn


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
    return result


def test_closed_form() -> None:
    """r = 1, B = 2, A = 3, α = 4: ΔW = 24."""
    module = nn.Sequential(nn.Sequential(nn.Linear(1, 1, bias=False)), nn.Linear(1, 1))
    layers = {"groups": {"block.0": "^0", "head": "^1"}}
    config = plain_config(peft.LoraConfig(r=1, lora_alpha=4, target_modules=["0.0"]))
    adapt(module, config=config, layers=layers, transformer="")
    layer: Any = module.get_submodule("0.0")
    with torch.no_grad():
        layer.base_layer.weight.fill_(5.0)
        layer.lora_A["default"].weight.fill_(3.0)
        layer.lora_B["default"].weight.fill_(2.0)
    assert module[0](torch.ones(1)).item() == 29
    merge(module)
    assert type(module.get_submodule("0.0")) is nn.Linear
    assert module.get_submodule("0.0").weight.item() == 29


@pytest.mark.parametrize(
    ("targets", "count"), [(["query", "value"], 294_912), (None, 294_912), ("all-linear", 1_327_104)]
)
def test_counts_of_bert_base(targets: Any, count: int) -> None:
    """q and v at r = 8: 12 · 2 · 8 · 2 · 768; all but the pooler: 8 · 12 · (4 · 2 · 768 + 2 · 5 · 768)."""
    with torch.device("meta"):
        model = hf.BertForSequenceClassification(hf.BertConfig())
        report = adapt(Holder(model), config=plain_config(peft.LoraConfig(r=8, target_modules=targets)))
    pooler = 8 * 2 * 768 if targets == "all-linear" else 0
    assert report.facts["adapter parameters"] == count + pooler
    assert report.facts["head parameters"] == 2 * 768 + 2
    assert report.facts["trainable share"] < 0.013


IDENTITY = {
    "lora": peft.LoraConfig(),
    "dora": peft.LoraConfig(use_dora=True),
    "pissa": peft.LoraConfig(init_lora_weights="pissa"),
    "adalora": peft.AdaLoraConfig(total_step=10),
    "ia3": peft.IA3Config(),
    "tokens": peft.TrainableTokensConfig(token_indices=[4, 5]),
}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", IDENTITY)
def test_the_start_is_the_base(method: str, kind: str) -> None:
    model = tiny(kind)
    before = logits(model)
    report = adapt(Holder(model), config=plain_config(IDENTITY[method]))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6 if method in ("pissa", "dora") else 0)
    assert report.facts["adapted layers"] > 0


def test_the_first_step_moves_b_alone() -> None:
    model: Any = tiny("bert")
    adapt(Holder(model), config=plain_config(peft.LoraConfig()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(input_ids=ids(), labels=torch.tensor([0, 1, 1])).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_B" in name or name.startswith("classifier")}


def test_the_first_weights_are_the_seeds_and_the_global_generator_is_untouched() -> None:
    def drawn(seed: int) -> Tensor:
        model = Holder(copy.deepcopy(model_))
        adapt(model, config=plain_config(peft.LoraConfig()), seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]).detach()

    model_ = tiny("bert")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "roberta", "modernbert"])
def test_adapters_lie_in_the_group_of_their_block(kind: str) -> None:
    model = tiny(kind)
    plain = LayerGroups.of(model)
    owners = {n: plain.name_of(p) for n, p in model.named_parameters()}
    adapt(model, config=plain_config(peft.LoraConfig(target_modules="all-linear")))
    groups = LayerGroups.of(model)
    assert groups.names == plain.names
    for name, parameter in model.named_parameters():
        owner = name.replace(".base_layer", "").split(".lora_")[0]
        beside = owners.get(owner) or owners.get(f"{owner}.weight")
        assert groups.name_of(parameter) == beside, name


def test_the_head_is_neither_adapted_nor_copied() -> None:
    """Though the configuration names it."""
    module = FILTERED.module()
    config = peft.LoraConfig(target_modules=["linear1", "classifier"], modules_to_save=["classifier", "norm"])
    adapt(module, config=plain_config(config))
    assert type(module.classifier) is nn.Linear
    assert module.classifier.weight.requires_grad
    assert type(module.encoder.norm).__name__ == "ModulesToSaveWrapper"  # what the user named beside the head
    assert module.encoder.norm.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_of_a_language_model_is_no_head(tied: bool) -> None:
    def built() -> Any:
        return hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, "tie_word_embeddings": tied}))

    config = plain_config(peft.LoraConfig(target_modules="all-linear"))
    model = built()
    report = adapt(model, config=config)
    assert report.facts["head parameters"] == 0
    assert type(model.lm_head) is nn.Linear
    assert not model.lm_head.weight.requires_grad
    assert "lm_head.weight" in base_names(model)
    if not tied:
        model = built()
        assert adapt(model, config=config, layers={"head": "lm_head"}).facts["head parameters"] == 50 * 16
        assert model.lm_head.weight.requires_grad


def test_biases_that_peft_trains_are_no_base() -> None:
    model = tiny("bert")
    adapt(model, config=plain_config(peft.LoraConfig(bias="all")))
    biases = {n for n, p in model.named_parameters() if n.endswith(".bias")}
    assert biases == {n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")}
    assert not biases & base_names(model)


def test_which_transformer() -> None:
    both = nn.ModuleDict({"question": tiny("bert"), "answer": tiny("bert")})
    config = plain_config(peft.LoraConfig())
    with pytest.raises(ValueError, match=r"module= must say which model to adapt: ModuleDict has question, answer"):
        adapt(both, config=config)
    report = adapt(
        both,
        config=config,
        transformer="answer",
        layers={"blocks": "answer.bert.encoder.layer", "head": "answer.classifier"},
    )
    assert report.facts["transformer"] == "answer"
    assert not any("lora" in name for name, _ in both["question"].named_parameters())
    assert not any(p.requires_grad for p in both["question"].parameters())
    with pytest.raises(ValueError, match=r"no transformer found in Linear: it holds no model of transformers, and"):
        adapt(nn.Linear(2, 2), config=config)


def test_torchs_attention_is_left_out_and_its_encoder_calls_its_layers() -> None:
    module = Filtered(dropout=0)
    assert linear_names(module, set(module.classifier.parameters())) == [
        f"encoder.layers.{i}.linear{j}" for i in range(3) for j in (1, 2)
    ]
    adapt(module, config=plain_config(peft.LoraConfig(init_lora_weights=False)))
    tokens = torch.arange(10).view(2, 5)
    trained = module(tokens)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(tokens), trained)


def test_gradients_reach_adapters_under_reentrant_checkpointing() -> None:
    model: Any = hf.BertForSequenceClassification(hf.BertConfig(**BERT)).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    adapt(model, config=plain_config(peft.LoraConfig()))
    model(input_ids=ids(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None for p in adapter_parameters(model))


def test_configurations_survive_a_checkpoint() -> None:
    config = peft.LoraConfig(r=3, target_modules=["b", "a"], rank_pattern={"x": 2}, task_type="SEQ_CLS")
    stored = plain_config(config)
    assert stored["target_modules"] == ["a", "b"]
    again = read_config(stored)
    assert plain_config(again) == stored
    assert type(again) is peft.LoraConfig
    with pytest.raises(TypeError, match="config must be a configuration of peft"):
        plain_config({"r": 8})
    with pytest.raises(ValueError, match=r"peft .* has no method 'NO'"):
        read_config({"peft_type": "NO"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.VeraConfig(target_modules=["query"]), "VERA keeps weights that all layers share"),
        (
            peft.LoraConfig(target_modules=["quarry"]),
            r"target_modules=\['quarry'\] cannot be adapted: .*Linear layers of BertForS.*: dense, key, query",
        ),
        (peft.MultitaskPromptTuningConfig(num_virtual_tokens=2), "there are PROMPT_TUNING, P_TUNING and PREFIX_TUNING"),
        (peft.PromptTuningConfig(), "num_virtual_tokens must be a number"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, modules_to_save=["bert"]), r"modules_to_save=\['bert'\] must"),
    ],
)
def test_refusals(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(tiny("bert"), config=plain_config(config))


@QUIET
def test_what_is_adapted_already_is_refused() -> None:
    config = plain_config(peft.LoraConfig())
    model = tiny("bert")
    adapt(model, config=config)
    with pytest.raises(ValueError, match="the module has an adapter 'default' already"):
        adapt(model, config=config)
    wrapped = Holder(peft.get_peft_model(tiny("bert"), peft.LoraConfig(target_modules=["query"])))
    with pytest.raises(ValueError, match=r"adapted by peft already|has an adapter 'default' already"):
        adapt(wrapped, config=config)


# ---- merging


@pytest.mark.parametrize("method", IDENTITY)
def test_merging_leaves_nothing_of_peft(method: str) -> None:
    model = tiny("llama")
    names, forgotten = set(model.state_dict()), type(model)
    alter(model, "peft", {"config": plain_config(IDENTITY[method])})
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model)
    copied = plain_model(model)
    assert copied is not model
    report = merge(model)
    assert report.facts["layers"] > 0
    assert set(model.state_dict()) == names
    assert type(model) is forgotten
    assert not alterations(model)
    assert not base_names(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not getattr(model, "_hf_peft_config_loaded", False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(copied), expected, rtol=1e-5, atol=1e-5)
    assert plain_model(model) is model
    with pytest.raises(ValueError, match="has no adapter of peft to merge"):
        merge(model)


def test_prompts_cannot_be_merged() -> None:
    model = tiny("bert")
    adapt(model, config=plain_config(peft.PrefixTuningConfig(num_virtual_tokens=2)))
    with pytest.raises(ValueError, match="PREFIX_TUNING puts learnt vectors before each text"):
        merge(model)


# ---- AdaLoRA


def test_the_penalty_of_adalora_against_autograd() -> None:
    model = tiny("bert")
    adapt(model, config=plain_config(peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10)))
    budget = RankBudget(model, model.peft_config["default"], "default", total=None)  # type: ignore[union-attr, index]
    for parameter in budget.parameters:
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    budget.add_penalty_grad_()
    expected = torch.autograd.grad(0.5 * budget.penalty(), budget.parameters)
    for parameter, gradient in zip(budget.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_budget_of_adalora_is_pefts() -> None:
    """The same entries of E are cut at the same steps as by AdaLoraModel itself."""
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=2, deltaT=2, total_step=12, target_modules=["query", "value"]
    )
    ours = tiny("bert").train(False)
    adapt(ours, config=plain_config(config))
    theirs: Any = peft.tuners.adalora.AdaLoraModel(tiny("bert"), {"default": config}, "default")
    theirs.model.load_state_dict(ours.state_dict())
    budget = RankBudget(ours, ours.peft_config["default"], "default", total=None)  # type: ignore[union-attr, index]
    pair = [(ours, lambda _: budget.update()), (theirs.model, theirs.update_and_allocate)]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad and p.ndim], 0.5) for m, _ in pair]
    for step in range(1, 13):
        for (model, update), optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(step)
            model(input_ids=torch.randint(3, 50, (2, 5)), labels=torch.tensor([0, 1])).loss.backward()
            for name, parameter in model.named_parameters():  # theirs leaves the head frozen
                if "classifier" in name:
                    parameter.grad = None
            optimizer.step()
            update(step)
        zeros = [[(p == 0).flatten().tolist() for n, p in m.named_parameters() if "lora_E" in n] for m, _ in pair]
        assert zeros[0] == zeros[1], step
    assert sum(map(sum, zeros[0])) == 2 * len(zeros[0])
