from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_ft.callbacks import GradualUnfreezing
from lightning_ft.core import LayerGroups, Layers
from tests.strangers import BATCHES, FILTERED, STRANGERS, UNITS, Filtered, Late, Stranger, identical, weights

MANUAL = next(stranger for stranger in STRANGERS if stranger.name == "manual")
LATE = next(stranger for stranger in STRANGERS if stranger.name == "late")


class Recorder(Callback):
    """Which units train in each batch, and all weights after it. Listed behind the callback that it watches."""

    def __init__(self) -> None:
        self.units: list[list[str]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(weights(pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        groups = LayerGroups.of(pl_module)
        flags = {name: {p.requires_grad for p in groups.parameters(name)} for name in groups}
        assert flags["tail"] == flags["head"]
        assert all(len(values) == 1 for values in flags.values())
        self.units.append([name for name in UNITS if flags[name] == {True}])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert all((p.grad is None) == (not p.requires_grad) for p in pl_module.parameters())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(weights(pl_module))

    @property
    def counts(self) -> list[int]:
        assert all(units == UNITS[: len(units)] for units in self.units)
        return [len(units) for units in self.units]


@pytest.mark.parametrize(
    ("every", "options", "counts"),
    [
        ("1 epoch", {}, [1] * 6 + [2] * 6 + [3] * 6 + [4] * 6),
        ("5 steps", {}, [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5 + [5] * 4),
        (0.25, {}, [1] * 6 + [2] * 6 + [3] * 6 + [4] * 6),
        (0.25, {"max_steps": 8}, [1, 1, 2, 2, 3, 3, 4, 4]),
        ("4 steps", {"groups_per_step": 3, "max_epochs": 2}, [1] * 4 + [4] * 4 + [5] * 4),
        ("1 epoch", {"start": 4, "max_epochs": 2}, [4] * 6 + [5] * 6),
        ("1 epoch", {"start": 99, "max_epochs": 1}, [5] * 6),
        # Three steps an epoch: four batches, then the two that are left.
        ("1 steps", {"accumulate_grad_batches": 4, "max_epochs": 2}, [1] * 4 + [2] * 2 + [3] * 4 + [4] * 2),
        # Due at the fourth batch of the epoch, inside a window: done at the fifth.
        ("0.5 epochs", {"accumulate_grad_batches": 4, "max_epochs": 2}, [1] * 4 + [2] * 2 + [3] * 4 + [4] * 2),
        ("0.5 epochs", {"accumulate_grad_batches": 3, "max_epochs": 2}, [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3),
    ],
)
def test_units_train_from_the_batch_on_in_which_they_are_due(
    every: Any, options: dict[str, Any], counts: list[int]
) -> None:
    arguments = {key: options.pop(key) for key in ("start", "groups_per_step") if key in options}
    recorder = Recorder()
    FILTERED.fit(GradualUnfreezing(every, **arguments), recorder, **{"max_epochs": 4, **options})
    assert recorder.counts == counts


def test_manual_optimisation_is_not_disturbed_inside_its_own_window() -> None:
    recorder = Recorder()
    MANUAL.fit(GradualUnfreezing("0.5 epochs"), recorder, max_epochs=2)
    assert recorder.counts == [1] * 4 + [2] * 2 + [3] * 4 + [4] * 2  # due at the fourth batch, done at the fifth


def test_epochs_thaw_where_steps_are_hidden_from_the_trainer() -> None:
    class Raw(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    recorder = Recorder()
    assert FILTERED.fit(GradualUnfreezing("1 epoch"), recorder, module=Raw()).global_step == 0
    assert recorder.counts == [1] * BATCHES + [2] * BATCHES


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_frozen_tensors_keep_every_bit_and_released_ones_move(stranger: Stranger) -> None:
    recorder = Recorder()
    trainer = stranger.fit(GradualUnfreezing("2 steps"), recorder, max_epochs=2)

    groups = LayerGroups.of(trainer.lightning_module)
    unit = {"tail": "head"}
    start, released = recorder.weights[0], set()
    for before, after, units in zip(recorder.weights, recorder.weights[1:], recorder.units, strict=False):
        stepped = not identical(before, after)
        released |= set(units) if stepped else set()
        for group in groups:
            moved = [not start[name].equal(after[name]) for name, _ in groups.named_parameters(group)]
            # Some rows of a matrix may see no gradient; of each released group something must have moved.
            assert any(moved) if unit.get(group, group) in released else not any(moved)


def test_optimiser_of_the_trainable_parameters_holds_all_and_has_state_for_the_released() -> None:
    trainer = FILTERED.fit(GradualUnfreezing("1 epoch"), max_epochs=2)
    module, (optimizer,) = trainer.lightning_module, trainer.optimizers
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))
    groups = LayerGroups.of(module)
    released = {p for name in ("head", "tail", "block.2") for p in groups.parameters(name)}
    assert {p for p, state in optimizer.state.items() if state} == released


def test_explicit_groups_train_one_two_three_four() -> None:
    class Tower(type(FILTERED.module())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 2))

    counts: list[int] = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            counts.append(sum(p.requires_grad for p in pl_module.classifier.parameters()) // 2)
            counts.append(sum(p.requires_grad for p in pl_module.encoder.parameters()))

    groups = {"encoder": r"^encoder\.", "low": r"classifier\.0", "middle": r"classifier\.1", "top": r"classifier\.2"}
    Stranger("tower", Tower).fit(GradualUnfreezing(layers=Layers(groups=groups)), Count(), max_epochs=4)
    everything = len(list(Tower().encoder.parameters()))
    assert counts == [1, 0, 2, 0, 3, 0, 3, everything]


def test_what_its_owner_froze_stays_frozen_and_takes_no_phase() -> None:
    module = FILTERED.module()
    module.encoder.tokens.requires_grad_(False)
    module.encoder.layers[1].requires_grad_(False)
    flags = [p.requires_grad for p in module.parameters()]
    callback = GradualUnfreezing("1 epoch")
    assert callback.plan(module).phases == (
        ("tail", "head"),
        ("block.2", "tail", "head"),
        ("block.0", "block.2", "tail", "head"),
    )
    frozen = weights(module.encoder.tokens), weights(module.encoder.layers[1])
    FILTERED.fit(callback, module=module, max_epochs=4)
    assert identical((weights(module.encoder.tokens), weights(module.encoder.layers[1])), frozen)
    assert [p.requires_grad for p in module.parameters()] == flags


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_of_peft_are_released_and_their_base_is_not() -> None:
    class Adapted(Late):
        def configure_model(self) -> None:
            super().configure_model()
            if not isinstance(self.bert, peft.PeftModel):
                config = peft.LoraConfig(
                    task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["classifier"]
                )
                self.bert = peft.get_peft_model(self.bert, config)

    started = weights(Stranger("adapted", Adapted).fit(max_epochs=0).lightning_module)
    trainer = Stranger("adapted", Adapted).fit(GradualUnfreezing("1 epoch"), max_epochs=2)
    ended = weights(trainer.lightning_module)
    moved = {name for name in ended if not ended[name].equal(started[name]) and "lora_A" not in name}
    assert moved  # lora_B alone tells: lora_A is random at each start
    assert all("modules_to_save" in name or ("layer.2" in name and "lora_B" in name) for name in moved)


def test_after_the_fit_all_is_free_and_the_stage_is_kept() -> None:
    callback = GradualUnfreezing("1 epoch")
    trainer = FILTERED.fit(callback, max_epochs=1)
    assert all(p.requires_grad for p in trainer.lightning_module.parameters())
    assert callback.state_dict()["stage"] == 0


def test_resume_continues_in_the_stage_of_the_checkpoint(tmp_path: Path) -> None:
    trainer = FILTERED.fit(GradualUnfreezing("1 epoch"), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "third.ckpt")
    recorder = Recorder()
    FILTERED.fit(GradualUnfreezing("1 epoch"), recorder, max_epochs=4, ckpt_path=tmp_path / "third.ckpt")
    assert recorder.counts == [4] * BATCHES


def test_refuses_a_checkpoint_of_other_phases(tmp_path: Path) -> None:
    FILTERED.fit(GradualUnfreezing("1 epoch"), max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(
        ValueError, match=r"(?s)written with the phases .*\['tail', 'head'\], .*resume with the model and"
    ):
        FILTERED.fit(GradualUnfreezing("1 epoch", groups_per_step=2), ckpt_path=tmp_path / "first.ckpt")


def test_plan_freezes_nothing() -> None:
    module = FILTERED.module()
    plan = GradualUnfreezing().plan(module)
    assert len(plan.phases) == len(UNITS)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 1}, r"every=1 has no unit: write a fraction of training \(0.1\)"),
        ({"every": 1.5}, "every=1.5 is not a stretch of training"),
        ({"every": "soon"}, "every='soon' is not a stretch of training"),
        ({"start": 0}, "start=0 must be a whole number of 1 or more"),
        ({"groups_per_step": 1.5}, "groups_per_step=1.5 must be a whole number of 1 or more"),
    ],
)
def test_refuses_bad_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualUnfreezing(**arguments)


def test_refuses_a_fraction_of_endless_training() -> None:
    with pytest.raises(ValueError, match="fraction of a training that has no end"):
        FILTERED.fit(GradualUnfreezing(0.1), max_epochs=-1)


def test_refuses_a_wrong_path_of_blocks() -> None:
    with pytest.raises(ValueError, match="blocks= must name"):
        FILTERED.fit(GradualUnfreezing(layers=Layers(blocks="encoder.blocks")))
