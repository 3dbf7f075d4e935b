from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_ft.callbacks import DiscriminativeLR, ExactResume, FrozenPrefixCache, GradualUnfreezing, LayerReinit
from lightning_ft.callbacks.checkpoint_average import CheckpointAverage
from lightning_ft.callbacks.ema import EMA
from tests.callbacks.test_exact_resume import Kill, Killed, options
from tests.strangers import (
    BATCHES,
    FILTERED,
    STILL,
    STRANGERS,
    Filtered,
    HeadFirst,
    Stranger,
    identical,
    outcome,
    weights,
)

STRANGER = {stranger.name: stranger for stranger in STRANGERS}
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


class Steps(Callback):
    """The weights after each batch in which the optimiser stepped."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.step = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.seen.append(weights(pl_module))


def debiased(seen: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The oracle: the sum as it is written, in float64."""
    factors = [decay ** (len(seen) - 1 - i) for i in range(len(seen))]
    total = sum(factors)
    return {
        name: sum(f * state[name].double() for f, state in zip(factors, seen, strict=True)) / total
        for name, tensor in seen[0].items()
        if tensor.is_floating_point()
    }


def close(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            state[name].double(), value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


@each_stranger
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_module_ends_with_the_debiased_mean_of_its_steps(stranger: Stranger, decay: float) -> None:
    steps = Steps()
    trainer = stranger.fit(steps, EMA(decay))
    close(weights(trainer.lightning_module), debiased(steps.seen, decay))
    # What trains is not touched by it.
    assert identical(steps.seen[-1], weights(stranger.fit().lightning_module))


def test_closed_form_of_three_steps() -> None:
    """w = 1, 2, 4 at d = 0.5: (0.25 · 1 + 0.5 · 2 + 1 · 4) / 1.75 = 3."""

    class Sets(Filtered):
        def configure_optimizers(self) -> Any:
            values = iter([1.0, 2.0, 4.0])

            class Set(torch.optim.SGD):
                def step(self, closure: Any = None) -> Any:
                    closure()
                    value = next(values)
                    for p in self.param_groups[0]["params"]:
                        p.data.fill_(value)

            return Set(self.parameters(), lr=0.1)

    trainer = FILTERED.fit(EMA(0.5), module=Sets(), max_steps=3)
    assert all(torch.allclose(p, torch.tensor(3.0)) for p in trainer.lightning_module.parameters())


def test_counts_optimiser_steps_and_not_batches() -> None:
    steps = Steps()
    trainer = FILTERED.fit(steps, EMA(0.5), accumulate_grad_batches=4)
    assert len(steps.seen) == 4
    close(weights(trainer.lightning_module), debiased(steps.seen, 0.5))


class Overflowing(Filtered):
    """The third and the fourth step's losses are infinite."""

    def __init__(self, fused: bool) -> None:
        super().__init__(dropout=0)
        self.fused = fused

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) * (torch.inf if batch_idx in (2, 3) else 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2, fused=self.fused)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(fused: bool) -> None:
    steps = Steps()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024))
    trainer = FILTERED.fit(EMA(0.5), steps, module=Overflowing(fused), plugins=[plugin], max_epochs=1)
    assert identical(steps.seen[1], steps.seen[3])
    close(weights(trainer.lightning_module), debiased([*steps.seen[:2], *steps.seen[4:]], 0.5))


# --- start, decay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "first"), [("1 epoch", 6), ("4 steps", 4), (0.75, 9)])
def test_start(start: Any, first: int) -> None:
    steps = Steps()
    trainer = FILTERED.fit(steps, EMA(0.5, start=start))
    close(weights(trainer.lightning_module), debiased(steps.seen[first:], 0.5))


def test_start_that_never_comes_leaves_the_trained_weights_where_lightning_s_leaves_the_initial_ones(
    tmp_path: Path,
) -> None:
    initial = weights(FILTERED.fit(max_epochs=0).lightning_module)
    trained = weights(FILTERED.fit().lightning_module)
    best = ModelCheckpoint(tmp_path, "best", monitor="val_loss")
    trainer = FILTERED.fit(EMA(0.5, start="100 steps"), best, enable_checkpointing=True)
    assert identical(weights(trainer.lightning_module), trained)
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert not identical(dict(saved), initial)
    lightnings = FILTERED.fit(EMAWeightAveraging(update_starting_at_step=100))
    assert identical(weights(lightnings.lightning_module), initial)


def test_decay_is_that_of_the_last_tenth_by_default_and_half_lives_are_times() -> None:
    def decay(callback: EMA, **settings: Any) -> float:
        FILTERED.fit(callback, **settings)
        return callback._d

    assert decay(EMA(), max_epochs=4) == pytest.approx(1 - 1 / (0.1 * 24))
    assert decay(EMA(), max_epochs=1) == 0
    assert decay(EMA(half_life="3 steps")) == pytest.approx(0.5 ** (1 / 3))
    assert decay(EMA(half_life="1 epoch")) == pytest.approx(0.5 ** (1 / 6))
    assert decay(EMA(half_life=0.5), max_epochs=3) == pytest.approx(0.5 ** (1 / 9))
    assert decay(EMA(half_life="3 steps"), max_epochs=-1, max_steps=3) == pytest.approx(0.5 ** (1 / 3))


# --- what validation and checkpoints see -------------------------------------------------------------------------


class Seen(Callback):
    """What a validation sees, and what trains around it."""

    def __init__(self) -> None:
        self.validated: list[dict[str, Tensor]] = []
        self.trained: list[tuple[int, dict[str, Tensor]]] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *args: Any) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            self.validated.append(weights(pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.trained.append((trainer.global_step, weights(pl_module)))


@each_stranger
def test_validation_sees_the_mean_and_training_goes_on_from_the_weights_that_train(stranger: Stranger) -> None:
    steps, seen = Steps(), Seen()
    stranger.fit(steps, EMA(0.5), seen, max_epochs=3, val_check_interval=3)
    assert len(seen.validated) == 6
    per_validation = len(steps.seen) // 6 or 1
    if stranger.name != "manual":
        for i, state in enumerate(seen.validated, 1):
            close(state, debiased(steps.seen[: i * per_validation], 0.5))
        for step, state in seen.trained[1:]:
            assert identical(state, steps.seen[step - 1])


def test_before_the_first_update_validation_sees_the_weights_that_train() -> None:
    steps, seen = Steps(), Seen()
    FILTERED.fit(steps, EMA(0.5, start="2 epochs"), seen, max_epochs=3)
    assert identical(seen.validated[0], steps.seen[5])
    assert identical(seen.validated[1], steps.seen[11])
    close(seen.validated[2], debiased(steps.seen[12:], 0.5))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("stranger", [FILTERED, STRANGER["late"]], ids=lambda s: s.name)
def test_best_checkpoint_holds_the_mean_that_was_validated(
    stranger: Stranger, weights_only: bool, tmp_path: Path
) -> None:
    steps = Steps()
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1, save_weights_only=weights_only)
    trainer = stranger.fit(steps, EMA(0.5), saver, enable_checkpointing=True)
    for epoch in range(2):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        close(saved["state_dict"], debiased(steps.seen[: (epoch + 1) * BATCHES], 0.5))
        # It scores as it did in the fit, whether or not this callback is there.
        for callbacks in ([], [EMA(0.5)]):
            tester = stranger.trainer(callbacks)
            module = stranger.module()
            (score,) = tester.validate(module, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
            close(weights(module), debiased(steps.seen[: (epoch + 1) * BATCHES], 0.5))
    assert score["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only)
    close(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], debiased(steps.seen, 0.5))


class Tied(Filtered):
    """Its embedding is its output layer: one tensor, two names."""

    def __init__(self) -> None:
        super().__init__(dropout=0)
        self.out = torch.nn.Linear(8, 20, bias=False)
        self.out.weight = self.encoder.tokens.weight

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.out(self.encoder(batch[0])).square().mean()


def test_tied_weights_are_saved_under_each_name(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "mean")
    trainer = FILTERED.fit(EMA(0.5), saver, module=Tied(), enable_checkpointing=True, max_epochs=1)
    state = torch.load(tmp_path / "mean.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["out.weight"], state["encoder.tokens.weight"])
    assert identical(dict(state), weights(trainer.lightning_module))


def test_an_exception_in_validation_leaves_the_weights_that_train() -> None:
    steps, module = Steps(), FILTERED.module()
    with pytest.raises(Killed):
        FILTERED.fit(steps, EMA(0.5), Kill("on_validation_batch_end", 1, 5), module=module)
    assert identical(weights(module), steps.seen[-1])


def test_what_never_trained_keeps_its_bits_and_its_version() -> None:
    module = HeadFirst()  # its optimiser holds the frozen ones, too
    block = module.thing_from_paris["inner"].layers[0].requires_grad_(False)
    frozen, versions = weights(block), [p._version for p in block.parameters()]
    FILTERED.fit(EMA(0.9), module=module, val_check_interval=2)
    assert identical(weights(block), frozen)
    assert [p._version for p in block.parameters()] == versions

    # A cache of what frozen layers compute, which watches versions, changes nothing.
    def run(*callbacks: Any) -> Any:
        # SGD: AdamW makes much of gradients that are zero but for rounding.
        fit = partial(FILTERED.fit, GradualUnfreezing("1 epoch"), *callbacks, EMA(0.9), max_epochs=3)
        return weights(fit(module=HeadFirst(dropout=0)).lightning_module)

    with_cache, without = run(FrozenPrefixCache()), run()
    assert all(torch.allclose(with_cache[name], without[name], atol=1e-5) for name in without)


# --- resume ------------------------------------------------------------------------------------------------------


def callbacks(folder: Path) -> list[Callback]:
    return [
        ExactResume("1 steps", dirpath=folder),
        GradualUnfreezing("2 steps", previous="freeze"),
        LayerReinit(1),
        DiscriminativeLR(0.7),
        EMA(0.8, start="1 steps"),
    ]


@each_stranger
@pytest.mark.parametrize(
    ("hook", "batch"), [("on_after_backward", 3), ("on_validation_end", 2), ("on_train_batch_end", 5)]
)
def test_resumed_run_ends_as_if_it_had_never_stopped(stranger: Stranger, hook: str, batch: int, tmp_path: Path) -> None:
    settings = options(stranger, tmp_path)
    last = callbacks(tmp_path / "whole")
    whole = outcome(stranger.fit(*last, **settings))
    with pytest.raises(Killed):
        stranger.fit(*callbacks(tmp_path), Kill(hook, 1, batch), **settings)
    torch.manual_seed(99)
    again = callbacks(tmp_path)
    trainer = stranger.trainer(again, **settings)
    trainer.fit(stranger.module(), ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(trainer), whole)
    assert identical(again[-1].state_dict(), last[-1].state_dict())


def test_finished_run_is_prolonged_exactly(tmp_path: Path) -> None:
    whole = outcome(FILTERED.fit(*callbacks(tmp_path / "whole"), **options(FILTERED, tmp_path)))
    FILTERED.fit(*callbacks(tmp_path), **options(FILTERED, tmp_path, max_epochs=2))
    trainer = FILTERED.fit(*callbacks(tmp_path), **options(FILTERED, tmp_path), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 9
    assert identical(outcome(trainer), whole)


def test_a_checkpoint_saved_after_the_fit_holds_both(tmp_path: Path) -> None:
    trainer = STILL.fit(EMA(0.8), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed = STILL.fit(EMA(0.8), ckpt_path=tmp_path / "after.ckpt")
    assert identical(weights(resumed.lightning_module), weights(STILL.fit(EMA(0.8)).lightning_module))


# --- refusals and warnings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0 must lie in \[0, 1\)"),
        ({"decay": -0.1}, r"decay=-0.1 must lie in"),
        ({"decay": 0.5, "half_life": "2 steps"}, "decay=0.5 and half_life='2 steps' say the same thing twice"),
        ({"half_life": 3}, "half_life=3 has no unit"),
        ({"start": 3}, "start=3 has no unit"),
    ],
)
def test_refuses_bad_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(**arguments)


@pytest.mark.parametrize(("callback", "given"), [(EMA(), "decay=None"), (EMA(half_life=0.1), "half_life=0.1 of")])
def test_refuses_a_length_that_is_not_known(callback: EMA, given: str) -> None:
    with pytest.raises(ValueError, match=rf'{given}.* needs the number of optimiser steps.*give half_life="200 steps"'):
        STRANGER["manual"].fit(callback)


def test_refuses_two_means() -> None:
    with pytest.raises(ValueError, match="EMA and CheckpointAverage would both put their means"):
        FILTERED.fit(EMA(0.5), CheckpointAverage())
    with pytest.raises(ValueError, match="EMAWeightAveraging and EMA would both"):
        FILTERED.fit(EMAWeightAveraging(), EMA(0.5))


def test_refuses_a_mean_of_other_parameters(tmp_path: Path) -> None:
    FILTERED.fit(EMA(0.5), max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")

    class Part(Filtered):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.classifier.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="holds a mean of 41 weights, and the optimisers hold 2 here"):
        FILTERED.fit(EMA(0.5), module=Part(), ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize("make", [partial(EMA, 0.5), CheckpointAverage])
def test_warns_of_batch_norms(make: Any) -> None:
    module = Filtered()
    module.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"the statistics of classifier.0 and 0 more .*update_bn"):
        FILTERED.fit(make(), module=module, max_epochs=1)
    assert module.classifier[0].num_batches_tracked == BATCHES
