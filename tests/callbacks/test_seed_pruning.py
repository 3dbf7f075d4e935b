"""A run that is stopped, judged and resumed is the run that was never stopped."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lightning_ft.callbacks import EMA, L2SP, ExactResume, GradualUnfreezing
from lightning_ft.callbacks.seed_pruning import SeedPruning
from tests.ranks import run_ranks
from tests.strangers import BATCHES, FILTERED, STRANGERS, Filtered, Stranger, identical, outcome

# Six batches and three optimiser steps an epoch, three epochs; validation after the third and the sixth batch.
OPTIONS: dict[str, Any] = {"val_check_interval": BATCHES // 2, "max_epochs": 3}
STRANGER = {stranger.name: stranger for stranger in STRANGERS}
OTHERS = [name for name in STRANGER if name != "filtered"]


def options(stranger: Stranger, **more: Any) -> dict[str, Any]:
    # Without a number of steps that is known, manual optimisation has no fractions.
    length = {"max_steps": 9, "max_epochs": -1} if stranger.name == "manual" else {"accumulate_grad_batches": 2}
    return {**OPTIONS, **length, **more}


def callbacks(folder: Path, pruning: SeedPruning | None = None) -> list[Any]:
    others = [GradualUnfreezing("2 steps"), L2SP(0.1, head_strength=0.01)]
    return [ExactResume("1 epoch", dirpath=folder), *others, *([] if pruning is None else [pruning])]


def pruning(at: Any, **more: Any) -> SeedPruning:
    return SeedPruning(at, monitor="val_loss", **more)


def go_on(*_: Any) -> bool:
    return True


# Rungs: in the middle of an epoch without a validation there, on an epoch's last batch, in its first window.
@pytest.mark.parametrize(
    ("name", "at"), [("filtered", 0.2), ("filtered", 1 / 3), ("filtered", 0.4), *((name, 0.4) for name in OTHERS)]
)
def test_stopped_and_resumed_run_is_the_uninterrupted_one(name: str, at: float, tmp_path: Path) -> None:
    stranger = STRANGER[name]
    settings = options(stranger)
    plain = outcome(stranger.fit(*callbacks(tmp_path / "plain"), **settings))

    judged = pruning(at, decide=go_on)
    assert identical(outcome(stranger.fit(*callbacks(tmp_path / "judged", judged), **settings)), plain)

    first = pruning(at)
    stopped = stranger.fit(*callbacks(tmp_path / "stopped", first), **settings)
    step = {0.2: 2, 1 / 3: 3, 0.4: 4}[at]
    assert (first.stopped_at, first.horizon, stopped.global_step) == (step, 9, step)
    assert first.evaluations == [one for one in judged.evaluations if one[0] <= step]
    assert first.evaluations[-1][0] == step

    saved = torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step  # nothing is trained twice

    torch.manual_seed(99)
    second = pruning(at, decide=go_on)
    trainer = stranger.trainer(callbacks(tmp_path / "stopped", second), **settings)
    trainer.fit(stranger.module(), ckpt_path=tmp_path / "stopped" / "last.ckpt")
    assert identical(outcome(trainer), plain)
    assert second.evaluations == judged.evaluations
    assert second.evaluations[-1][0] == 9


def test_what_was_judged_before_a_later_checkpoint_is_not_judged_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def decide(score: float, loss: float, step: int) -> bool:
        asked.append(step)
        return step < 4

    def run(callback: SeedPruning, **more: Any) -> None:
        FILTERED.fit(ExactResume("1 steps", dirpath=tmp_path), callback, **options(FILTERED, **more))

    run(first := pruning(["2 steps", "4 steps", "5 steps"], decide=decide))
    run(second := pruning(["2 steps", "4 steps", "5 steps"], decide=decide), ckpt_path=tmp_path / "last.ckpt")
    assert asked == [2, 4, 4]
    assert first.evaluations == second.evaluations


def test_a_validation_is_forced_only_where_there_was_none(tmp_path: Path) -> None:
    count: list[int] = []

    class Counted(SeedPruning):
        def _note(self, trainer: Any) -> None:
            super()._note(trainer)
            count.append(self._updates or 0)

    # Validation after batches 3 (one step) and 6 (three steps).
    for at, seen in {"1 steps": [1], "2 steps": [1, 2], "3 steps": [1, 3]}.items():
        count.clear()
        FILTERED.fit(*callbacks(tmp_path, Counted(at, monitor="val_loss")), **options(FILTERED))
        assert count == seen


def test_the_score_is_that_of_a_validation(tmp_path: Path) -> None:
    stop = pruning("2 steps")
    trainer = FILTERED.fit(*callbacks(tmp_path, stop), **options(FILTERED))
    (logged,) = FILTERED.trainer().validate(trainer.lightning_module, verbose=False)
    assert stop.evaluations[-1] == (2, logged["val_loss"], logged["val_loss"])


def test_decides_by_score_loss_and_step_at_each_of_several(tmp_path: Path) -> None:
    asked: list[tuple[float, float, int]] = []

    def decide(score: float, loss: float, step: int) -> bool:
        asked.append((score, loss, step))
        return step < 5

    stop = pruning(["5 steps", 0.2, "2 epochs"], decide=decide)
    trainer = FILTERED.fit(*callbacks(tmp_path, stop), **options(FILTERED))
    assert [step for *_, step in asked] == [2, 5]
    assert trainer.global_step == stop.stopped_at == 5
    assert asked == [(score, loss, step) for step, score, loss in stop.evaluations if step in (2, 5)]


def test_a_run_that_ends_is_judged_on_its_last_step(tmp_path: Path) -> None:
    whole = pruning("1 steps", decide=go_on)
    FILTERED.fit(whole, **options(FILTERED, max_steps=5, max_epochs=-1))
    assert [step for step, *_ in whole.evaluations] == [1, 3, 4, 5]
    assert whole.stopped_at is None


def test_no_other_callback_takes_notice_of_the_forced_validation(tmp_path: Path) -> None:
    patient = [EarlyStopping("val_loss", patience=1, min_delta=100.0) for _ in range(2)]
    without = FILTERED.fit(patient[0], **options(FILTERED))
    with_it = FILTERED.fit(patient[1], pruning(["2 steps", "4 steps"], decide=go_on), **options(FILTERED))
    assert patient[0].state_dict() == patient[1].state_dict()
    assert identical(outcome(with_it), outcome(without))
    assert {n: float(v) for n, v in with_it.callback_metrics.items()} == {
        n: float(v) for n, v in without.callback_metrics.items()
    }


def test_the_average_of_an_ema_is_what_is_judged(tmp_path: Path) -> None:
    plain, averaged = pruning("2 steps"), pruning("2 steps")
    FILTERED.fit(ExactResume(dirpath=tmp_path / "0"), plain, **options(FILTERED))
    FILTERED.fit(ExactResume(dirpath=tmp_path / "1"), EMA(0.5), averaged, **options(FILTERED))
    assert plain.evaluations[-1] != averaged.evaluations[-1]


def test_steps_that_a_scaler_skipped_do_not_count(tmp_path: Path) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    stop = pruning("2 steps")
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    # Without a scheduler, which would step beside a step that was skipped.
    trainer = STRANGER["head-first"].fit(ExactResume(dirpath=tmp_path), stop, plugins=[plugin], max_epochs=9)
    assert stop.stopped_at == 2
    assert trainer.global_step > 2


def test_a_stopped_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    stop = pruning("2 steps")
    trainer = FILTERED.fit(*callbacks(tmp_path, stop), **options(FILTERED))
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    assert trainer.state.finished
    assert all(module.training for module in trainer.lightning_module.modules())


@pytest.mark.parametrize(
    ("callback", "more", "message"),
    [
        (lambda: SeedPruning(1), {}, "at=1 has no unit"),
        (lambda: pruning(0.2), {"limit_val_batches": 0}, "'val_loss' of a validation, and this fit has none"),
        (lambda: SeedPruning(0.2), {}, "monitor='val_accuracy' was not logged in validation; logged were: val_loss"),
        (lambda: SeedPruning(0.2, monitor="val_loss", loss="nll"), {}, "loss='nll' was not logged"),
        (lambda: pruning("10 steps"), {}, "lies beyond the end of training after 9 optimiser steps"),
        (lambda: pruning(0.2), {"max_epochs": -1}, "is a part of a training whose number of optimiser steps"),
    ],
)
def test_refuses(callback: Any, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        FILTERED.fit(ExactResume(dirpath=tmp_path), callback(), **options(FILTERED, **more))


def test_refuses_a_fraction_under_manual_optimisation_and_a_stop_that_nothing_saves() -> None:
    with pytest.raises(ValueError, match="number of optimiser steps is not known"):
        STRANGER["manual"].fit(pruning(0.2, decide=go_on), max_epochs=2)
    with pytest.raises(ValueError, match=r"nothing saves it: add ExactResume\(\) before it"):
        FILTERED.fit(pruning(0.2))


def test_refuses_spawned_processes(tmp_path: Path) -> None:
    trainer = FILTERED.trainer([ExactResume(dirpath=tmp_path), stop := pruning(0.2)], strategy="ddp_spawn", devices=2)
    with pytest.raises(ValueError, match="use Trainer\\(strategy='ddp'\\)"):
        stop.on_fit_start(trainer, FILTERED.module())


# ---- two processes


class Synchronised(Filtered):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)


def ranks() -> dict[str, Any]:
    """Rank 0 decides: the other one would have decided otherwise."""
    from lightning.pytorch.strategies import DDPStrategy

    rank = int(os.environ["RANK"])
    result: dict[str, Any] = {}
    for name, decision in {"stop": rank != 0, "go on": rank == 0}.items():
        callback = pruning("2 steps", decide=lambda *_, decision=decision: decision)
        settings = options(FILTERED, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
        trainer = FILTERED.fit(callback, module=Synchronised(), **settings)
        result[name] = {
            "step": trainer.global_step,
            "stopped_at": callback.stopped_at,
            "evaluations": [list(one) for one in callback.evaluations],
        }
    return result


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_rank_0_decides_for_all(tmp_path: Path) -> None:
    first, second = run_ranks("tests.callbacks.test_seed_pruning:ranks", tmp_path)
    assert first == second
    assert (first["stop"]["stopped_at"], first["stop"]["step"]) == (2, 2)
    assert first["go on"]["stopped_at"] is None
    assert first["go on"]["step"] == 9
    assert all(math.isfinite(score) for _, score, _ in first["go on"]["evaluations"])
