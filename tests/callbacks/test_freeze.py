from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.callbacks.exact_resume import ExactResume
from lightning_ft.callbacks.freeze import Freeze
from lightning_ft.callbacks.gradual_unfreezing import GradualUnfreezing
from lightning_ft.core import LayerGroups, Layers
from tests.ranks import run_ranks
from tests.strangers import (
    BATCH,
    BATCHES,
    FILTERED,
    STRANGERS,
    WIDTH,
    Filtered,
    Late,
    Stranger,
    dataset,
    identical,
    outcome,
    weights,
)
from tests.tiny import SEQ2SEQ, T5, tiny

BIAS = r"(^|\.)bias$"


class Flags(Callback):
    """What trains, and what is in train mode, in each batch. Listed behind the callback that it watches."""

    def __init__(self) -> None:
        self.trains: list[set[str]] = []
        self.modes: list[set[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.trains.append({name for name, p in pl_module.named_parameters() if p.requires_grad})
        self.modes.append({name for name, m in pl_module.named_modules() if m.training})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert all((p.grad is None) == (not p.requires_grad) for p in pl_module.parameters())


def names(*groups: str) -> set[str]:
    found = LayerGroups.of(FILTERED.module())
    return {name for group in groups for name, _ in found.named_parameters(group)}


EVERYTHING = {name for name, _ in Filtered().named_parameters()}
BIASES = {name for name in EVERYTHING if name.rsplit(".", 1)[-1] == "bias"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"keep": "head"}, names("head")),
        ({"keep": ["top:2", "tail", "head"]}, names("block.1", "block.2", "tail", "head")),
        ({"keep": "all"}, EVERYTHING),
        ({"groups": "embeddings"}, EVERYTHING - names("embeddings")),
        ({"groups": ["embeddings", "bottom:2"]}, names("block.2", "tail", "head")),
        ({"keep": "head", "parameters": BIAS}, names("head") | BIASES),
        ({"parameters": BIAS}, BIASES),
        ({"groups": "blocks", "parameters": [BIAS, r"layers\.1\.norm"]}, None),
        ({"keep": "all", "parameters": BIAS}, EVERYTHING),
    ],
)
def test_what_was_asked_for_trains_from_first_to_last_batch(arguments: Any, expected: set[str] | None) -> None:
    if expected is None:
        norms = {name for name in EVERYTHING if "layers.1.norm" in name}
        expected = names("embeddings", "tail", "head") | BIASES | norms
    flags = Flags()
    before = weights(FILTERED.module())
    trainer = FILTERED.fit(Freeze(**arguments), flags)
    assert flags.trains == [expected] * 2 * BATCHES
    after = weights(trainer.lightning_module)
    moved = {name for name in after if not before[name].equal(after[name])}
    assert moved <= expected
    assert {name.split(".")[0] for name in moved} == {name.split(".")[0] for name in expected}
    (optimizer,) = trainer.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.lightning_module.parameters()}
    stepped = {name for name, p in trainer.lightning_module.named_parameters() if optimizer.state.get(p)}
    assert stepped == expected


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_only_the_head_of_a_stranger_moves(stranger: Stranger) -> None:
    before = weights(stranger.fit(max_epochs=0).lightning_module)
    trainer = stranger.fit(Freeze("head"))
    groups = LayerGroups.of(trainer.lightning_module)
    after = weights(trainer.lightning_module)
    moved = {name for name in after if not before[name].equal(after[name])}
    assert moved == {name for name, _ in groups.named_parameters("head")}
    assert all(p.requires_grad for p in trainer.lightning_module.parameters())


def test_matching_parameter_of_t5_is_a_bias_and_not_its_matrix_of_positions() -> None:
    class Project(Filtered):
        def __init__(self) -> None:
            super().__init__()
            del self.encoder, self.classifier
            self.net = tiny("t5")

    module = Project()
    plan = Freeze("head", parameters=BIAS).plan(module)
    plan.apply(0)
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trains == {name for name in trains if name.startswith("net.classification_head.")}
    assert any("relative_attention_bias.weight" in name for name, _ in module.named_parameters())


@pytest.mark.filterwarnings("ignore:Found 1 module")  # Lightning's, about the one that its owner left in eval mode
@pytest.mark.parametrize(
    ("arguments", "asleep"),
    [
        ({"keep": "head"}, {"encoder"}),
        ({"keep": ["top:1", "head"]}, {"encoder.tokens", "encoder.layers.0", "encoder.layers.1", "encoder.norm"}),
        ({"keep": "head", "parameters": BIAS}, {"encoder.tokens"}),
    ],
)
def test_eval_mode_is_that_of_wholly_frozen_modules_and_outlasts_validation(arguments: Any, asleep: set[str]) -> None:
    module, flags = FILTERED.module(), Flags()
    module.encoder.layers[0].dropout1.eval()  # as its owner left it
    modes = {name for name, m in module.named_modules() if m.training}
    expected = {name for name in modes if not any(f"{name}.".startswith(f"{top}.") for top in asleep)}
    FILTERED.fit(Freeze(**arguments, eval_mode=True), flags, module=module, val_check_interval=2)
    assert flags.modes == [expected] * 2 * BATCHES
    assert {name for name, m in module.named_modules() if m.training} == modes


def test_dropout_of_frozen_layers_stays_on_by_default() -> None:
    flags, module = Flags(), FILTERED.module()
    FILTERED.fit(Freeze("head"), flags, module=module)
    assert flags.modes == [{name for name, _ in module.named_modules()}] * 2 * BATCHES


def test_resumed_run_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1 and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4:
                raise KeyError

    def callbacks(folder: Path) -> list[Callback]:
        return [ExactResume("1 steps", dirpath=folder), Freeze(["top:1", "head"], parameters=BIAS)]

    options = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    whole = outcome(FILTERED.fit(*callbacks(tmp_path / "whole"), **options))
    with pytest.raises(KeyError):
        FILTERED.fit(*callbacks(tmp_path), Stop(), **options)
    flags = Flags()
    resumed = FILTERED.fit(*callbacks(tmp_path), flags, ckpt_path=tmp_path / "last.ckpt", **options)
    assert identical(outcome(resumed), whole)
    assert flags.trains == [BIASES | names("block.2", "head")] * 4


def test_what_it_froze_is_out_of_the_phases_of_gradual_unfreezing() -> None:
    flags = Flags()
    FILTERED.fit(Freeze(groups=["embeddings", "block.0"]), GradualUnfreezing("1 epoch"), flags, max_epochs=4)
    last = names("block.1", "block.2", "tail", "head")
    assert flags.trains[2 * BATCHES :] == [last] * 2 * BATCHES
    assert flags.trains[0] == names("tail", "head")
    with pytest.raises(ValueError, match=r"GradualUnfreezing, listed before Freeze, .*: list Freeze before it"):
        FILTERED.fit(GradualUnfreezing(), Freeze(groups="embeddings"))


def test_what_its_owner_froze_stays_frozen() -> None:
    module = FILTERED.module()
    module.classifier.bias.requires_grad_(False)
    flags = Flags()
    FILTERED.fit(Freeze("head"), flags, module=module)
    assert flags.trains[0] == {"classifier.weight"}
    assert not module.classifier.bias.requires_grad
    module.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="has no parameter that can train"):
        FILTERED.fit(Freeze("head"), module=module)


def test_tied_output_is_frozen_with_its_embeddings_and_says_so() -> None:
    class LanguageModel(Late):
        def configure_model(self) -> None:
            config = hf.T5Config(**{**SEQ2SEQ, **T5, "vocab_size": 20}, tie_word_embeddings=True)
            self.bert = hf.T5ForConditionalGeneration(config).train()

        def loss(self, batch: Any) -> Any:
            return self.bert(input_ids=batch[0], labels=batch[0]).loss

    with pytest.warns(UserWarning, match="Freeze: the embedding and the output layer are one tensor .*so the output"):
        Stranger("lm", LanguageModel).fit(Freeze(groups="embeddings"), max_epochs=1)


def ddp() -> list[Any]:
    """For `run_ranks`: weights after each batch, with Freeze."""
    trace: list[torch.Tensor] = []

    class Trace(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            trace.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))

    class Module(Filtered):
        def __init__(self) -> None:
            super().__init__(dropout=0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            tokens, labels = dataset().tensors
            rank, world = self.trainer.global_rank, self.trainer.world_size
            return DataLoader(TensorDataset(tokens[rank::world], labels[rank::world]), BATCH // world)

    several = "RANK" in os.environ
    FILTERED.fit(
        Freeze(["top:1", "head"], parameters=BIAS, eval_mode=True),
        Trace(),
        module=Module(),
        limit_val_batches=0,
        use_distributed_sampler=False,
        **({"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if several else {}),
    )
    return trace


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    first, second = run_ranks("tests.callbacks.test_freeze:ddp", tmp_path)
    single = ddp()
    assert len(single) == len(first) == 2 * BATCHES
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, single, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"keep=None, groups=None: say either what trains, Freeze\(keep=\"head\"\), or what freezes"),
        ({"keep": "head", "groups": "embeddings"}, "keep='head', groups='embeddings': say either"),
    ],
)
def test_refuses_no_way_and_two_ways_to_say_it(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Freeze(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": "neck"}, "'neck' matches none of the groups embeddings"),
        ({"groups": "top:4"}, "'top:4' must ask for 1 to 3 blocks"),
        ({"groups": "all"}, "has no parameter that can train"),
        (
            {"keep": "head", "parameters": "gamma"},
            "parameters: 'gamma' matches no parameter; there are: enc",
        ),
    ],
)
def test_refuses_what_matches_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Freeze(**arguments).plan(FILTERED.module())


def test_bias_recipe_holds_every_bias_and_nothing_else() -> None:
    module = Filtered()
    module.adapter_bias = nn.Linear(WIDTH, WIDTH)  # a component that only ends in "bias"
    groups = {"adapter": "^adapter", "encoder": "^encoder", "head": "^classifier"}
    plan = Freeze(parameters=BIAS, layers=Layers(groups=groups)).plan(module)
    plan.apply(0)
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trains == BIASES | {"adapter_bias.bias"}
