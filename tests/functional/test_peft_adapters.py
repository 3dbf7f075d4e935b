"""Adapters in folders: saved, opened elsewhere, several in one model, each with its head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_ft.functional.alterations import alter, alterations, load_altered
from lightning_ft.functional.peft_adapters import (
    active_adapter,
    combine_adapters,
    load_adapter,
    save_adapter,
    use_adapter,
)
from lightning_ft.functional.peft_config import plain_config
from lightning_ft.functional.peft_parts import adapter_parameters
from tests.strangers import FILTERED, HeadFirst, dataset
from tests.tiny import LLAMA, tiny

LORA: dict[str, Any] = {"r": 2, "init_lora_weights": False, "target_modules": ["linear1", "linear2"]}


def trained(seed: int, **options: Any) -> HeadFirst:
    """A stranger whose adapter and head hold random values."""
    module = HeadFirst(dropout=0)
    alter(module, "peft", {"config": plain_config(peft.LoraConfig(**{**LORA, **options})), "seed": seed})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.verdict.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.eval()


@torch.no_grad()
def answers(module: nn.Module) -> Tensor:
    result: Tensor = module.eval()(dataset().tensors[0])
    return result


def test_several_with_their_heads(tmp_path: Path) -> None:
    wanted = {}
    for seed, name in enumerate(("one", "two")):
        wanted[name] = answers(trained(seed))
        save_adapter(trained(seed), tmp_path / name)
    assert (wanted["one"] - wanted["two"]).abs().max() > 0.1
    module = HeadFirst(dropout=0)
    for name in wanted:
        load_adapter(module, tmp_path / name, name=name)
        assert active_adapter(module) == name
        assert torch.equal(answers(module), wanted[name])
    for name in ("one", "two", "one"):
        use_adapter(module, name)
        assert active_adapter(module) == name
        assert torch.equal(answers(module), wanted[name])
    # Written again from there, the one that does not act, too.
    for name in wanted:
        save_adapter(module, tmp_path / "again" / name, name=name)
        fresh = HeadFirst(dropout=0)
        load_adapter(fresh, tmp_path / "again" / name)
        assert torch.equal(answers(fresh), wanted[name])
    # The one that acts trains.
    use_adapter(module, "two")
    module(dataset().tensors[0]).sum().backward()
    names = {n.split(".")[-2] for n, p in module.named_parameters() if p.grad is not None and "lora" in n}
    assert names == {"two"}
    with pytest.raises(ValueError, match=r"name='three' is no adapter of HeadFirst, which has \['one', 'two'\]"):
        use_adapter(module, "three")
    with pytest.raises(ValueError, match="has an adapter 'one' already: give this one another adapter="):
        load_adapter(module, tmp_path / "two", name="one")


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_combination_is_the_sum_of_the_updates(method: Any, tmp_path: Path) -> None:
    modules = [trained(seed, r=4) for seed in (0, 1)]
    module = HeadFirst(dropout=0)
    for name, each in zip(("one", "two"), modules, strict=True):
        save_adapter(each, tmp_path / name)
        load_adapter(module, tmp_path / name, name=name)
    path = "thing_from_paris.inner.layers.1.linear1"
    deltas = [each.get_submodule(path).get_delta_weight("default") for each in modules]
    combine_adapters(module, {"one": 0.25, "two": 0.75}, method)
    assert active_adapter(module) == "combined"
    mixed = 0.25 * deltas[0] + 0.75 * deltas[1]
    if method == "svd":
        u, s, v = torch.linalg.svd(mixed)
        mixed = (u[:, :4] * s[:4]) @ v[:4]
    found = module.get_submodule(path).get_delta_weight("combined")
    torch.testing.assert_close(found, mixed, rtol=1e-4, atol=1e-5)
    heads = [each.verdict[0].weight for each in modules]
    torch.testing.assert_close(module.verdict[0].weight, 0.25 * heads[0] + 0.75 * heads[1])
    # Its checkpoint is loaded over a fresh module.
    state: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(state)
    torch.save(state, tmp_path / "x.ckpt")
    fresh = HeadFirst(dropout=0)
    load_altered(fresh, tmp_path / "x.ckpt")
    assert [record["settings"]["adapter"] for record in alterations(fresh)] == ["one", "two", "combined"]


def test_combinations_that_cannot_be(tmp_path: Path) -> None:
    module = HeadFirst(dropout=0)
    with pytest.raises(ValueError, match="HeadFirst has no adapter: load_adapter"):
        combine_adapters(module, {"one": 1.0})
    for seed, name in enumerate(("one", "two")):
        save_adapter(trained(seed), tmp_path / name)
        load_adapter(module, tmp_path / name, name=name)
    with pytest.raises(ValueError, match=r"weights must name adapters of one, two; got \['three'\]"):
        combine_adapters(module, {"three": 1.0})
    with pytest.raises(ValueError, match="sum to 0, which leaves no head"):
        combine_adapters(module, {"one": 1.0, "two": -1.0})
    with pytest.raises(ValueError, match="name='one' is an adapter already"):
        combine_adapters(module, {"one": 1.0}, name="one")
    with pytest.raises(ValueError, match=r"weights: .*combination_type"):
        combine_adapters(module, {"one": 1.0, "two": 1.0}, "no")  # type: ignore[arg-type]
    bert = tiny("bert")
    alter(bert, "peft", {"config": plain_config(peft.IA3Config())})
    with pytest.raises(ValueError, match="only LoRA adapters can be added up; default is IA3"):
        combine_adapters(bert, {"default": 1.0})


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(0), tmp_path)
    other = HeadFirst(dropout=0)
    with torch.no_grad():
        other.thing_from_paris["inner"].norm.bias += 1
    with pytest.raises(ValueError, match=r"1 of \d+ tensors differ \(thing_from_paris.inner.norm.bias\)"):
        load_adapter(other, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json and adapter_model.safetensors"):
        load_adapter(other, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"does not fit this model"):
        load_adapter(FILTERED.module(), tmp_path)


def test_new_layers_keep_the_mode(tmp_path: Path) -> None:
    """In a model in eval mode a loaded adapter's dropout does not act."""
    save_adapter(trained(0, lora_dropout=0.5), tmp_path)
    for mode in (True, False):
        module = HeadFirst(dropout=0).train(mode)
        load_adapter(module, tmp_path)
        assert {child.training for child in module.modules()} == {mode}


def test_prompts_switch_and_do_not_stand_beside_layers(tmp_path: Path) -> None:
    ids = torch.randint(3, 50, (2, 6))
    wanted = {}
    for seed, name in enumerate(("one", "two")):
        model: Any = tiny_of(0)
        settings = {"config": plain_config(peft.PromptTuningConfig(num_virtual_tokens=2)), "seed": seed}
        alter(model, "peft", settings)
        save_adapter(model, tmp_path / name)
        wanted[name] = model(ids).logits
    model = tiny_of(0)
    for name in wanted:
        load_adapter(model, tmp_path / name, name=name)
    use_adapter(model, "one")
    assert torch.equal(model(ids).logits, wanted["one"])
    use_adapter(model, "two")
    assert torch.equal(model(ids).logits, wanted["two"])
    lora = tiny_of(0)
    alter(lora, "peft", {"config": plain_config(peft.LoraConfig())})
    with pytest.raises(ValueError, match="PROMPT_TUNING cannot stand beside default: prompts"):
        load_adapter(lora, tmp_path / "one", name="one")
    longer = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    longer["num_virtual_tokens"] = 3
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(longer))
    with pytest.raises(ValueError, match=r"its prompts are of shape \(2, 16\), and here they must be \(3, 16\)"):
        load_adapter(tiny_of(0), tmp_path / "one")


def tiny_of(seed: int) -> Any:
    torch.manual_seed(seed)
    return tiny("bert")


def test_the_file_of_a_language_model_is_small_and_lacks_its_output_layer(tmp_path: Path) -> None:
    """SmolLM2-135M's shape: r = 8 on q and v, less than 2 % of the base."""
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    config = hf.LlamaConfig(
        **{**LLAMA, **shape, "head_dim": 64, "vocab_size": 49152, "num_hidden_layers": 2, "tie_word_embeddings": True}
    )
    model = hf.LlamaForCausalLM(config)
    alter(model, "peft", {"config": plain_config(peft.LoraConfig(r=8))})
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}
    assert not (tmp_path / "head.safetensors").exists()
    block = sum(t.numel() for t in tensors.values()) / 2
    whole = 49152 * 576 + 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert 30 * block / whole < 0.02


def test_pissa_becomes_a_lora_of_twice_the_rank_over_the_plain_base(tmp_path: Path) -> None:
    for extra in ({}, {"use_rslora": True}):
        model = tiny_of(0)
        settings = {
            "r": 2,
            "init_lora_weights": "pissa",
            "target_modules": ["query", "dense"],
            "lora_alpha": 3,
            **extra,
        }
        alter(model, "peft", {"config": plain_config(peft.LoraConfig(**settings))})
        ids = torch.randint(3, 50, (2, 6))
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.add_(0.3 * torch.randn_like(parameter))
        folder = tmp_path / str(len(extra))
        save_adapter(model, folder)
        loaded = tiny_of(0)
        load_adapter(loaded, folder)
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
