"""PEFT in strangers' projects, and beside the other callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.callbacks import (
    EMA,
    DiscriminativeLR,
    ExactResume,
    FrozenPrefixCache,
    GradualUnfreezing,
    TrainingModeCheck,
)
from lightning_ft.callbacks.peft import PEFT
from lightning_ft.core.base_weights import base_names
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.functional.alterations import load_altered
from lightning_ft.functional.peft_parts import adapter_parameters
from tests.ranks import run_ranks
from tests.strangers import BATCH, BATCHES, FILTERED, STRANGERS, Late, Stranger, dataset, identical, outcome, weights

LATE = STRANGERS[1]
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
ADALORA: dict[str, Any] = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 2, "total_step": 99}


def lora(**options: Any) -> PEFT:
    return PEFT(peft.LoraConfig(r=2, lora_dropout=0.1), **options)


class Kill(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.completed == self.at:
            raise KeyboardInterrupt


def resumed(stranger: Stranger, make: Any, folder: Path, *, at: int) -> tuple[Any, Any]:
    """A run from end to end, and one that was killed after a batch and resumed."""
    options: dict[str, Any] = {"val_check_interval": 0.5, "num_sanity_val_steps": 0}
    if stranger.name != "manual":
        options["accumulate_grad_batches"] = 2
    whole = stranger.fit(*make(), ExactResume("1 steps", dirpath=folder / "whole"), **options)
    files = folder / "killed"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stranger.fit(*make(), ExactResume("1 steps", dirpath=files), Kill(at), **options)
    again = stranger.fit(*make(), ExactResume("1 steps", dirpath=files), ckpt_path=files / "last.ckpt", **options)
    return whole, again


@each_stranger
def test_strangers_train_a_part_and_resume(stranger: Stranger, tmp_path: Path) -> None:
    whole, again = resumed(stranger, lambda: [lora(), TrainingModeCheck()], tmp_path, at=BATCHES)
    assert identical(outcome(whole), outcome(again))
    module = whole.lightning_module
    fresh = stranger.module()
    getattr(fresh, "configure_model", lambda: None)()
    before = weights(fresh)
    names = base_names(module)
    moved = {
        n
        for n, p in module.state_dict().items()
        if n.replace(".base_layer", "") in before and not torch.equal(p, before[n.replace(".base_layer", "")])
    }
    assert moved
    assert not moved & names
    assert {n for n, p in module.named_parameters() if p.requires_grad and p not in adapter_parameters(module)} == moved
    saved = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() | names == module.state_dict().keys()
    assert not saved.keys() & names
    load_altered(fresh, tmp_path / "whole" / "last.ckpt")
    tokens = dataset().tensors[0]
    with torch.no_grad():  # in eval mode torch's own encoder layers would compute past the adapters
        inference = fresh.eval()(tokens)
        assert torch.equal(inference, module.eval()(tokens))
    torch.testing.assert_close(fresh(tokens), inference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [4, BATCHES, 9])
def test_the_budget_of_adalora_resumes(at: int, tmp_path: Path) -> None:
    def make() -> list[Callback]:
        return [PEFT(peft.AdaLoraConfig(**ADALORA))]

    whole, again = resumed(LATE, make, tmp_path, at=at)
    assert identical(outcome(whole), outcome(again))
    energies = [p for name, p in whole.lightning_module.named_parameters() if "lora_E" in name]
    left = sum(int(p.count_nonzero()) for p in energies)
    assert left == ADALORA["target_r"] * len(energies)
    saved = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["callbacks"]
    (budget,) = (state["budget"] for state in saved.values() if "budget" in state)
    assert (budget["step"], budget["total"]) == (6, 6)


def test_the_penalty_of_adalora_comes_once_a_step() -> None:
    """In the gradient of a step, whatever the number of micro-batches, and not in one that another optimiser makes."""
    seen: list[Any] = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen.append({n: p.grad.clone() for n, p in module.named_parameters() if "lora_A" in n})

    gradients = []
    for weight in (0.0, 0.5):
        seen.clear()
        callback = PEFT(peft.AdaLoraConfig(**ADALORA, orth_reg_weight=weight))
        module = LATE.fit(callback, Watch(), max_steps=3, accumulate_grad_batches=2).lightning_module
        gradients.append(seen[0])
    pairs = [n for n, _ in module.named_parameters() if "lora_A" in n or "lora_B" in n]
    start = LATE.module()
    PEFT(peft.AdaLoraConfig(**ADALORA)).setup(LATE.trainer(), start, "fit")
    start.configure_model()
    for name, plain in gradients[0].items():
        factor = start.get_parameter(name).detach().requires_grad_()
        gap = torch.linalg.norm(factor @ factor.T - torch.eye(len(factor)))
        (expected,) = torch.autograd.grad(0.5 * gap / len(pairs), factor)
        torch.testing.assert_close(gradients[1][name] - plain, expected, rtol=1e-4, atol=1e-6)


def test_adalora_refuses_what_freezes_its_parts() -> None:
    with pytest.raises(ValueError, match=r"AdaLoRA compares the ranks of all layers, and some have no gradients"):
        LATE.fit(PEFT(peft.AdaLoraConfig(**ADALORA)), GradualUnfreezing("2 steps"))


def test_loraplus_multiplies_the_rate_of_b_with_the_factor_of_depth() -> None:
    rates: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            names = {id(p): n for n, p in module.named_parameters()}
            (optimizer,) = trainer.optimizers
            optimizer.register_step_post_hook(
                lambda o, a, k: rates.append({names[id(p)]: g["lr"] for g in o.param_groups for p in g["params"]})
            )

    trainer = FILTERED.fit(Watch(), lora(loraplus_ratio=16.0), DiscriminativeLR(0.5), max_steps=2)
    assert len(trainer.optimizers[0].param_groups) == 1
    groups = LayerGroups.of(trainer.lightning_module)
    depth = DiscriminativeLR(0.5).multipliers(trainer.lightning_module)
    assert any("lora_B" in name for name in rates[0])
    for step, seen in enumerate(rates):
        for name, rate in seen.items():
            factor = depth[groups.name_of(trainer.lightning_module.get_parameter(name))]
            expected = 0.01 / (1 + 0.1 * step) * factor * (16 if "lora_B" in name else 1)
            assert rate == pytest.approx(expected), name


def test_adapters_thaw_with_their_blocks_and_the_base_does_not() -> None:
    thawed: list[set[str]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            groups = LayerGroups.of(module)
            thawed.append({groups.name_of(p) for p in module.parameters() if p.requires_grad})

    trainer = FILTERED.fit(lora(), GradualUnfreezing("1 epoch"), Watch(), max_epochs=4)
    steps = [thawed[i] for i in range(0, len(thawed), BATCHES)]
    blocks = ["block.2", "block.1", "block.0"]
    assert steps == [{"head", *blocks[:count]} for count in range(4)]
    names = base_names(trainer.lightning_module)
    assert not any(p.requires_grad for n, p in trainer.lightning_module.named_parameters() if n in names)


def test_the_average_of_adapters_is_kept() -> None:
    trainer = FILTERED.fit(lora(), EMA(0.5))
    assert all(torch.isfinite(p).all() for p in trainer.lightning_module.parameters())


PROMPTS: dict[str, Any] = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=2),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2),
    "lora": lambda: peft.LoraConfig(r=2),
    "top": lambda: peft.LoraConfig(r=2, target_modules=["query"], layers_to_transform=[2]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 4]),
}


@pytest.mark.parametrize("method", PROMPTS)
def test_a_cache_of_the_frozen_prefix_changes_nothing(method: str) -> None:
    def run(*callbacks: Any) -> dict[str, Any]:
        return weights(LATE.fit(PEFT(PROMPTS[method]()), *callbacks, module=Still()).lightning_module)

    plain, cached = run(), run(FrozenPrefixCache())
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-5)


class Still(Late):
    """Without dropout."""

    def configure_model(self) -> None:
        super().configure_model()
        for child in self.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_a_model_in_eval_mode_trains_without_its_dropout_and_that_is_found() -> None:
    class Asleep(Late):
        def configure_model(self) -> None:
            super().configure_model()
            self.bert.eval()

    modes: dict[str, bool] = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            modes.update({n: m.training for n, m in module.named_modules() if isinstance(m, nn.Dropout)})

    LATE.fit(lora(), Watch(), module=Asleep(), max_steps=1)
    assert {awake for name, awake in modes.items() if "lora_dropout" in name} == {True}
    assert {awake for name, awake in modes.items() if "lora_dropout" not in name} == {False}
    with pytest.raises(RuntimeError, match=r"modules train in eval mode, .*attention.self.dropout"):
        LATE.fit(lora(), TrainingModeCheck(), module=Asleep(), max_steps=1)
    LATE.fit(lora(), TrainingModeCheck(), max_steps=1)


def test_refuses_with_names() -> None:
    with pytest.raises(
        TypeError, match=r"config must be a configuration of peft, such as peft.LoraConfig\(r=8\); got 8"
    ):
        PEFT(8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loraplus_ratio=0 must be above 0"):
        lora(loraplus_ratio=0)
    with pytest.raises(ValueError, match="loraplus_ratio is for LoRA, and config is of IA3"):
        PEFT(peft.IA3Config(), loraplus_ratio=2)
    with pytest.raises(ValueError, match=r"config: .*Linear layers of Filtered: .*linear1, linear2"):
        FILTERED.fit(PEFT(peft.LoraConfig(target_modules=["nothing"])))
    with pytest.raises(ValueError, match="module='bret' is no submodule; models of transformers: bert"):
        LATE.fit(lora(module="bret"))
    with pytest.raises(ValueError, match=r"config: PROMPT_TUNING needs a model of transformers, .*Filtered: use LoRA"):
        FILTERED.fit(PEFT(peft.PromptTuningConfig(num_virtual_tokens=2)))
    with pytest.raises(ValueError, match=r"target_r=4 must be below init_r=4"):
        LATE.fit(PEFT(peft.AdaLoraConfig(**{**ADALORA, "target_r": 4})))
    with pytest.raises(ValueError, match=r"tinit=50 and tfinal=1 leave none of 12 optimiser steps"):
        LATE.fit(PEFT(peft.AdaLoraConfig(**{**ADALORA, "tinit": 50})))


def test_stages_and_a_second_fit_change_it_once() -> None:
    callback = lora()
    trainer = FILTERED.fit(callback)
    count = len(list(trainer.lightning_module.parameters()))
    trainer.test(trainer.lightning_module, verbose=False)
    FILTERED.fit(lora(), module=trainer.lightning_module)
    assert len(list(trainer.lightning_module.parameters())) == count
    with pytest.raises(ValueError, match=r"has an adapter 'default' already: give this one another adapter="):
        FILTERED.fit(PEFT(peft.LoraConfig(r=3)), module=trainer.lightning_module)


@pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored")  # jsonargparse fills it in
@pytest.mark.parametrize(
    ("name", "arguments", "stored"),
    [
        (
            "LoraConfig",
            {"r": 4, "target_modules": ["query"], "lora_dropout": 0.1},
            {"r": 4, "target_modules": ["query"]},
        ),
        ("AdaLoraConfig", {"total_step": 50, "tinit": 3}, {"peft_type": "ADALORA", "tinit": 3}),
        ("IA3Config", {"target_modules": "all-linear"}, {"peft_type": "IA3", "target_modules": "all-linear"}),
        ("PrefixTuningConfig", {"num_virtual_tokens": 4}, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}),
        ("TrainableTokensConfig", {"token_indices": [1, 2]}, {"token_indices": [1, 2]}),
    ],
)
def test_from_yaml(name: str, arguments: dict[str, Any], stored: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    config = {"class_path": f"peft.{name}", "init_args": arguments}
    where = {"layers": {"head": "verdict"}}
    given = {"class_path": "lightning_ft.callbacks.peft.PEFT", "init_args": {"config": config, **where}}
    callback = parser.instantiate(parser.parse_object({"callback": given})).callback
    assert type(callback) is PEFT
    assert stored.items() <= callback.config.items()
    assert callback.layers.head == "verdict"
    same = PEFT(getattr(peft, name)(**arguments))
    assert same.config == callback.config


# ---- two processes


class Whole(Late):
    """Without dropout, under plain SGD, so that two processes must do what one does with the batches of both."""

    def configure_model(self) -> None:
        super().configure_model()
        for child in self.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self) -> Any:
        tokens, labels = dataset().tensors
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(TensorDataset(tokens[rank::world], labels[rank::world]), BATCH // world)


CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=2),
    "adalora": lambda: peft.AdaLoraConfig(**ADALORA),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=2),
}


def on_ranks(**single: Any) -> dict[str, Any]:
    """Weights after training, of each method."""
    result = {}
    for name, config in CONFIGS.items():
        if torch.distributed.is_initialized():
            torch.manual_seed(torch.distributed.get_rank())  # the adapter's first weights do not come from here
        options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, **single}
        options |= {"limit_val_batches": 0, "use_distributed_sampler": False}
        callback = PEFT(config(), loraplus_ratio=4.0 if name == "lora" else None)
        trainer = LATE.fit(callback, module=Whole(), **options)
        result[name] = weights(trainer.lightning_module)
    return result


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_ranks_do_what_one_process_does(tmp_path: Path) -> None:
    first, second = run_ranks("tests.callbacks.test_peft_with_others:on_ranks", tmp_path)
    single = on_ranks(strategy="auto", devices=1)
    for name in CONFIGS:
        assert identical(first[name], second[name])
        for key, value in single[name].items():
            torch.testing.assert_close(first[name][key], value, rtol=1e-4, atol=1e-5)
