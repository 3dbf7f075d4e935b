from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, StochasticWeightAveraging, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_ft.callbacks import ExactResume, GradualUnfreezing, LayerReinit
from lightning_ft.callbacks.checkpoint_average import CheckpointAverage
from tests.callbacks.test_exact_resume import Kill, Killed, options
from tests.strangers import BATCHES, FILTERED, STILL, STRANGERS, Filtered, Stranger, identical, outcome, weights

each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


class Ends(Callback):
    """The weights at the ends of epochs."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(weights(pl_module))


def mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}


def close(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-6, atol=1e-6)


@each_stranger
@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        ({}, [0, 1, 2, 3]),
        ({"last": 2}, [2, 3]),
        ({"last": 9}, [0, 1, 2, 3]),
        ({"start": "2 epochs"}, [1, 2, 3]),
        ({"start": 0.75}, [2, 3]),
        ({"start": 0.5, "last": 1}, [3]),
    ],
)
def test_module_ends_with_the_mean_of_epoch_ends(
    stranger: Stranger, arguments: dict[str, Any], taken: list[int]
) -> None:
    ends, callback = Ends(), CheckpointAverage(**arguments)
    trainer = stranger.fit(ends, callback, max_epochs=4, limit_train_batches=2)
    assert identical(ends.seen[-1], weights(stranger.fit(max_epochs=4, limit_train_batches=2).lightning_module))
    close(weights(trainer.lightning_module), mean([ends.seen[i] for i in taken]))
    assert callback.report is not None
    assert callback.report.facts["epochs averaged"] == [i + 1 for i in taken]


class Ramp(Filtered):
    """One weight that grows by one a step, four steps an epoch: epoch ends 4, 8, 12."""

    def __init__(self) -> None:
        super().__init__()
        self.ramp = torch.nn.Parameter(torch.zeros(()))

    def loss(self, batch: Any) -> Tensor:
        return -self.ramp

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.ramp], lr=1.0)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_the_last_epoch_counts_and_the_beginning_does_not_as_in_lightning_s_swa() -> None:
    def run(callback: Any) -> float:
        module = Ramp()
        FILTERED.fit(callback, module=module, max_epochs=3, limit_train_batches=4)
        return module.ramp.item()

    assert run(CheckpointAverage()) == 8
    assert run(CheckpointAverage(start="2 epochs")) == 10
    assert run(CheckpointAverage(last=2)) == 10
    assert run(StochasticWeightAveraging(1.0, swa_epoch_start=1)) == 4


def test_steps_that_end_training_within_an_epoch_end_it() -> None:
    ends, callback = Ends(), CheckpointAverage()
    trainer = FILTERED.fit(ends, callback, max_epochs=-1, max_steps=9)
    assert len(ends.seen) == 2
    close(weights(trainer.lightning_module), mean(ends.seen))


@pytest.mark.parametrize("bar", [None, RichProgressBar, TQDMProgressBar])
def test_the_mean_is_validated_once_more_and_logged_as_one_more_row(bar: Any, tmp_path: Path) -> None:
    shown = {"enable_progress_bar": True} if bar else {}
    callback = CheckpointAverage(path=tmp_path / "mean.ckpt")
    trainer = STILL.fit(
        callback,
        *([bar()] if bar else []),
        logger=CSVLogger(tmp_path, "", ""),
        max_epochs=3,
        log_every_n_steps=1,
        **shown,
    )
    (expected,) = STILL.trainer().validate(trainer.lightning_module, verbose=False)
    with (tmp_path / "metrics.csv").open() as file:
        logged = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert len(logged) == 4
    assert logged[-1] == pytest.approx(expected["val_loss"])
    assert callback.report is not None
    last, own = callback.report.rows
    assert (last["weights"], own["weights"]) == ("last", "mean")
    assert [last["val_loss"], own["val_loss"]] == pytest.approx(logged[-2:])
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(logged[-1])

    saved = torch.load(tmp_path / "mean.ckpt", weights_only=True)
    assert identical(dict(saved["state_dict"]), weights(trainer.lightning_module))


def test_checkpoints_of_the_training_hold_the_weights_that_train(tmp_path: Path) -> None:
    ends, saver = Ends(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    FILTERED.fit(ends, CheckpointAverage(), saver, enable_checkpointing=True, limit_val_batches=0)
    for epoch, end in enumerate(ends.seen):
        state = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert identical(dict(state), end)


def test_start_that_never_comes_leaves_the_weights_that_trained() -> None:
    with pytest.warns(UserWarning, match=r"took no member, since start=9 epochs never came"):
        trainer = FILTERED.fit(CheckpointAverage(start="9 epochs"))
    assert identical(weights(trainer.lightning_module), weights(FILTERED.fit().lightning_module))


# --- resume ------------------------------------------------------------------------------------------------------


@each_stranger
@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize(("hook", "batch"), [("on_after_backward", 3), ("on_train_batch_end", 5)])
def test_resumed_run_ends_as_if_it_had_never_stopped(
    stranger: Stranger, hook: str, batch: int, last: int | None, tmp_path: Path
) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        unfreezing = [GradualUnfreezing("2 steps"), LayerReinit(1)]
        return [ExactResume("1 steps", dirpath=folder), *unfreezing, CheckpointAverage(last)]

    settings = options(stranger, tmp_path)
    first = callbacks(tmp_path / "whole")
    whole = outcome(stranger.fit(*first, **settings))
    with pytest.raises(Killed):
        stranger.fit(*callbacks(tmp_path), Kill(hook, 1, batch), **settings)
    again = callbacks(tmp_path)
    trainer = stranger.fit(*again, **settings, ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(trainer), whole)
    assert identical(again[-1].state_dict(), first[-1].state_dict())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize("when", [{}, {"save_on_train_epoch_end": True}, {"every_n_train_steps": BATCHES}])
def test_members_are_whole_after_a_resume_at_an_epoch_s_end(when: Any, last: int | None, tmp_path: Path) -> None:
    """Lightning's own checkpoint lies after the epoch's validation, after its end, or before both."""
    settings = {"max_epochs": 3, "enable_checkpointing": True}
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, **when)
    whole = STILL.fit(CheckpointAverage(last), saver, **settings)
    for epoch in range(2):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, **when)
        resumed = STILL.fit(CheckpointAverage(last), saver, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **settings)
        assert identical(weights(resumed.lightning_module), weights(whole.lightning_module))


@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize("how", ["exact-resume", "path", "after"])
def test_a_finished_run_is_prolonged_exactly(how: str, last: int | None, tmp_path: Path) -> None:
    def fit(folder: Path, **more: Any) -> Any:
        exact = ExactResume("1 steps", dirpath=folder)
        return FILTERED.fit(exact, CheckpointAverage(last, path=folder / "path.ckpt"), **more)

    whole = outcome(fit(tmp_path / "whole", max_epochs=3))
    trainer = fit(tmp_path, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    file = {"exact-resume": "last.ckpt"}.get(how, f"{how}.ckpt")
    assert identical(outcome(fit(tmp_path / "again", max_epochs=3, ckpt_path=tmp_path / file)), whole)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last": 0}, "last=0 must be a number of epoch ends, 1 or more"),
        ({"last": True}, "last=True must be"),
        ({"last": 0.5}, "last=0.5 must be"),
        ({"start": 2}, "start=2 has no unit"),
    ],
)
def test_refuses_bad_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointAverage(**arguments)


def test_refuses_a_fraction_of_an_endless_training() -> None:
    with pytest.raises(ValueError, match="a fraction of a training that has no end"):
        FILTERED.fit(CheckpointAverage(start=0.5), max_epochs=-1)
