"""Unfreezing beside what a project may use with it: schedulers, averages, precision, compilers, other callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from lightning_ft.callbacks import DiscriminativeLR, GradualUnfreezing
from lightning_ft.core import LayerGroups
from lightning_ft.core.phases import Phase
from lightning_ft.core.plateau import Plateau
from tests.strangers import BATCHES, FILTERED, STILL, STRANGERS, Filtered, Stranger, identical, outcome, weights

LEGACY = next(stranger for stranger in STRANGERS if stranger.name == "legacy")
HEAD_FIRST = next(stranger for stranger in STRANGERS if stranger.name == "head-first")


def phased(**more: Any) -> GradualUnfreezing:
    """Four phases of three steps, with factors on the rates and a warm-up."""
    phases = [
        Phase("head"),
        Phase("top:1", "3 steps", 0.5),
        Phase("blocks", "6 steps", 2.0, "2 steps"),
        Phase("all", 0.75),
    ]
    return GradualUnfreezing(phases=phases, **more)


class Steps(Callback):
    """What trains in each batch, the optimiser's step and rates at its start, and the weights after it."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, ...]] = []
        self.steps: list[int] = []
        self.rates: list[list[float]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        groups = LayerGroups.of(pl_module)
        self.trained.append(tuple(name for name in groups if all(p.requires_grad for p in groups.parameters(name))))
        self.steps.append(trainer.global_step)
        self.rates.append([float(g["lr"]) for optimizer in trainer.optimizers for g in optimizer.param_groups])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.after.append(weights(pl_module))


# --- every scheduler of torch -----------------------------------------------------------------------------------------

STEP_LR = lr_scheduler.StepLR
SCHEDULERS: dict[type, Callable[[Optimizer], Any]] = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 2),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    lr_scheduler.ConstantLR: lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    lr_scheduler.LinearLR: lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=8),
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    lr_scheduler.PolynomialLR: lambda o: lr_scheduler.PolynomialLR(o, 20),
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    lr_scheduler.CosineAnnealingWarmRestarts: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lr_scheduler.SequentialLR: lambda o: lr_scheduler.SequentialLR(o, [STEP_LR(o, 2), STEP_LR(o, 3)], [5]),
    lr_scheduler.ChainedScheduler: lambda o: lr_scheduler.ChainedScheduler([STEP_LR(o, 2), STEP_LR(o, 3)]),
}


def test_no_scheduler_of_torch_is_left_out() -> None:
    classes = {value for value in vars(lr_scheduler).values() if inspect.isclass(value)}
    public = {c for c in classes if issubclass(c, lr_scheduler.LRScheduler) and not c.__name__.startswith("_")}
    assert public - {lr_scheduler.LRScheduler} == set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR's own doing
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=[kind.__name__ for kind in SCHEDULERS])
def test_schedulers_run_as_without_unfreezing(make: Callable[[Optimizer], Any]) -> None:
    class Scheduled(Filtered):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("constant", 1.0)
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            low, high = [[p for p in self.parameters() if (p.ndim > 1) is wide] for wide in (False, True)]
            optimizer = torch.optim.SGD([{"params": low}, {"params": high, "lr": 0.02}], lr=0.1, momentum=0.9)
            scheduler = make(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "constant"},
            }

    stranger = Stranger("scheduled", Scheduled)
    watch, alone = Steps(), Steps()
    trainer = stranger.fit(DiscriminativeLR(0.5), phased(), watch)
    without = stranger.fit(alone)
    assert len(set(watch.trained)) == 4
    assert watch.rates == alone.rates
    assert len({tuple(rates) for rates in watch.rates}) > 1
    assert identical(outcome(trainer)["schedulers"], outcome(without)["schedulers"])
    assert not identical(weights(trainer.lightning_module), weights(without.lightning_module))


# --- averages of weights ----------------------------------------------------------------------------------------------


def mean(kept: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([w[name].double() for w in kept]).mean(0) for name in kept[0]}


def exponential(kept: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = {name: tensor.double() for name, tensor in kept[0].items()}
    for later in kept[1:]:
        average = {name: decay * tensor + (1 - decay) * later[name].double() for name, tensor in average.items()}
    return average


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        (lambda: WeightAveraging(), lambda kept: mean(kept)),
        (lambda: EMAWeightAveraging(decay=0.8), lambda kept: exponential(kept, 0.8)),
        # The mean over the beginnings of the epochs from the second on.
        (lambda: StochasticWeightAveraging(1e-2, 2, 1), lambda kept: mean(kept[BATCHES - 1 : -1 : BATCHES])),
    ],
    ids=["mean", "exponential", "swa"],
)
@pytest.mark.parametrize("first", [True, False])
def test_averages_of_weights_are_those_of_the_run(average: Any, expected: Any, first: bool) -> None:
    watch, callbacks = Steps(), [phased(), average()]
    trainer = HEAD_FIRST.fit(*(callbacks if first else callbacks[::-1]), watch, max_epochs=3)
    assert len(set(watch.trained)) == 4
    result = {name: tensor.double() for name, tensor in weights(trainer.lightning_module).items()}
    for name, tensor in expected(watch.after).items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=1e-5)


# --- other callbacks --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
def test_model_checkpoints_within_an_epoch_continue_in_their_phase(tmp_path: Path) -> None:
    def fit(callback: GradualUnfreezing, *more: Callback, **options: Any) -> Any:
        return STILL.fit(callback, *more, enable_checkpointing=bool(more), default_root_dir=tmp_path, **options)

    for number, make in enumerate((phased, lambda: GradualUnfreezing("3 steps", previous="freeze"))):
        folder = tmp_path / str(number)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1, enable_version_counter=False)
        whole = outcome(fit(make(), saver))
        for step in (4, 8):
            resumed = outcome(fit(make(), ckpt_path=folder / f"step={step}.ckpt"))
            assert identical(resumed["weights"], whole["weights"])
            assert identical(resumed["optimizers"], whole["optimizers"])


def test_early_stopping_ends_a_run_in_any_phase() -> None:
    module = FILTERED.module()
    callback = GradualUnfreezing("1 epoch")
    trainer = FILTERED.fit(callback, EarlyStopping("val_loss", patience=1, mode="max"), module=module, max_epochs=9)
    assert trainer.current_epoch < 9
    assert callback.state_dict()["stage"] == trainer.current_epoch - 1
    assert all(p.requires_grad for p in module.parameters())


def test_early_stopping_and_a_plateau_count_the_same_validations() -> None:
    watch = Steps()
    plateau = GradualUnfreezing(Plateau("val_loss", "max"))
    trainer = STILL.fit(plateau, EarlyStopping("val_loss", patience=3, mode="max"), watch, max_epochs=9)
    assert trainer.current_epoch == 4
    assert [len(names) for names in watch.trained[::BATCHES]] == [2, 2, 3, 3]


@pytest.mark.parametrize("every", ["1 steps", "0.25 epochs", 0.1])
def test_windows_that_change_length_are_never_split(every: Any) -> None:
    watch = Steps()
    lengths = GradientAccumulationScheduler({0: 4, 1: 2, 2: 3})
    FILTERED.fit(GradualUnfreezing(every), lengths, watch, max_epochs=3)
    assert len(set(watch.trained)) >= 3
    by_window: dict[int, set[tuple[str, ...]]] = {}
    for step, trained in zip(watch.steps, watch.trained, strict=True):
        by_window.setdefault(step, set()).add(trained)
    assert len(by_window) == 2 + 3 + 2
    assert all(len(trained) == 1 for trained in by_window.values())


def test_rates_that_a_logger_shows_are_the_schedulers(tmp_path: Path) -> None:
    def shown(*callbacks: Callback) -> Any:
        monitor = LearningRateMonitor("step")
        options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1, "default_root_dir": tmp_path}
        FILTERED.fit(monitor, *callbacks, **options)
        return monitor.lrs

    assert shown(phased()) == shown() != {}


class Found(Filtered):
    """Has a rate that the finder may set."""

    def __init__(self) -> None:
        super().__init__(dropout=0)
        self.lr = 1e-2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.filterwarnings("ignore:.*checkpoint.*:UserWarning")
def test_learning_rate_finder_neither_disturbs_nor_is_disturbed(tmp_path: Path) -> None:
    stranger = Stranger("found", Found)

    def run(find: bool, *callbacks: Callback) -> Any:
        module = Found()
        trainer = stranger.trainer(callbacks, default_root_dir=tmp_path)
        losses = None
        if find:
            torch.manual_seed(0)
            finder = Tuner(trainer).lr_find(module, num_training=10, update_attr=False)
            losses = finder.results
            assert all(p.requires_grad for p in module.parameters())
        torch.manual_seed(0)
        trainer.fit(module)
        return losses, outcome(trainer)["weights"]

    watch = Steps()
    found, after = run(True, phased(), watch)
    assert len(set(watch.trained)) == 4
    assert found == run(True)[0]
    assert identical(after, run(False, phased())[1])


# --- compilers, precision, clipping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "make"), [(True, phased), (False, lambda: GradualUnfreezing("2 steps"))], ids=["inner model", "whole"]
)
def test_compiled_modules_train_as_they_do_uncompiled(make: Any, inner: bool) -> None:
    torch._dynamo.reset()
    module = STILL.module()
    whole = module
    if inner:
        module.encoder = torch.compile(module.encoder, backend="eager")
    else:
        whole = torch.compile(module, backend="eager")
    watch = Steps()
    trainer = STILL.trainer([make(), watch])
    trainer.fit(whole)
    expected = outcome(STILL.fit(make()))["weights"]
    assert len(set(watch.trained)) == len(make().plan(STILL.module()).phases)
    result = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights(module).items()}
    assert identical(dict(sorted(result.items())), dict(sorted(expected.items())))


class Clipped(Filtered):
    """Plain SGD at the rate 0.1."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_clipping_bounds_the_norm_of_what_trains() -> None:
    watch = Steps()
    stranger = Stranger("clipped", Clipped)
    stranger.fit(phased(), watch, gradient_clip_val=1e-3)
    lengths = []
    for before, after in zip(watch.after, watch.after[1:], strict=False):
        lengths.append(sum((after[n].double() - before[n].double()).square().sum() for n in after) ** 0.5)
    # The factors of the steps 1 to 11: 1, then 0.5, then 2 after a warm-up of two steps, then 1.
    factors = [1, 1, 0.5, 0.5, 0.5, 0, 1, 2, 1, 1, 1]
    assert [float(length) for length in lengths] == pytest.approx([1e-4 * f for f in factors], rel=0.02)


def test_scaled_gradients_and_skipped_steps() -> None:
    """The first scales are too large for half precision, so that the first steps are skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    done: list[int] = []

    class Count(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.optimizers[0].register_step_post_hook(lambda *args: done.append(trainer.global_step))

    watch = Steps()
    stranger = Stranger("clipped", Clipped)
    phases = [Phase("head"), Phase("blocks", "25 steps", 0.5), Phase("all", "30 steps", 2.0)]
    trainer = stranger.fit(
        Count(), GradualUnfreezing(phases=phases), watch, plugins=[plugin], max_epochs=6, gradient_clip_val=1e-3
    )
    assert scaler.get_scale() < 2.0**40
    assert 0 < len(done) < trainer.global_step == 36
    assert [r for rates in watch.rates for r in rates] == [0.1] * 36
    assert watch.trained[-1] == ("embeddings", "block.0", "block.1", "block.2", "tail", "head")
    assert all(torch.isfinite(tensor).all() for tensor in watch.after[-1].values())


# --- pytorch_lightning, several optimisers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        phased,
        lambda: GradualUnfreezing(Plateau("val_loss", "max", reload_best=True), previous="freeze", norms="always"),
    ],
    ids=["phases", "metric"],
)
def test_projects_of_pytorch_lightning(make: Any) -> None:
    watch = Steps()
    trainer = LEGACY.fit(make(), watch, max_epochs=4)
    assert trainer.global_step == 24
    assert len(set(watch.trained)) >= 2


def test_several_optimisers_are_scaled_and_emptied_together() -> None:
    class Two(Filtered):
        def __init__(self) -> None:
            super().__init__(dropout=0)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.encoder.parameters(), 0.1),
                torch.optim.Adam(self.classifier.parameters(), 1e-2),
            ]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

    states: list[int] = []

    class State(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            states.append(len(trainer.optimizers[1].state))

    watch = Steps()
    phases = [Phase(["tail", "head"]), Phase("top:1", "6 steps", 0.5), Phase("all", "12 steps", 0.25)]
    stranger = Stranger("two", Two)
    trainer = stranger.fit(GradualUnfreezing(phases=phases, previous="freeze"), watch, State(), max_epochs=2)
    assert trainer.global_step == 24  # each optimiser's steps count
    assert states == [0, 2, 2, *[0] * 4, *[2] * 5]
    assert watch.rates == [[0.1, 1e-2]] * 12
    # Adam's first step is one of size lr: the factor shows.
    moved = (watch.after[6]["classifier.bias"] - watch.after[5]["classifier.bias"]).abs()
    assert moved.tolist() == pytest.approx([0.25e-2] * 2, rel=1e-3)
