"""Twenty random kill points over all ways of unfreezing: the resumed run equals the uninterrupted one bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_ft.callbacks import DiscriminativeLR, ExactResume, GradualUnfreezing
from lightning_ft.core.phases import Phase
from lightning_ft.core.plateau import Plateau
from tests.strangers import BATCHES, FILTERED, identical, outcome

# Dropout; three steps an epoch; validation after the third batch, inside a window, and after the sixth.
EPOCHS = 3
OPTIONS: dict[str, Any] = {"val_check_interval": BATCHES // 2, "max_epochs": EPOCHS, "accumulate_grad_batches": 2}
SCHEDULES: dict[str, Callable[[], GradualUnfreezing]] = {
    "epochs": lambda: GradualUnfreezing("1 epoch"),
    "steps": lambda: GradualUnfreezing("2 steps", norms="always"),
    # The loss falls, so that waiting for a larger one ends phases.
    "metric": lambda: GradualUnfreezing(Plateau("val_loss", "max", reload_best=True)),
    "phases": lambda: GradualUnfreezing(
        phases=[
            Phase("head", warmup="2 steps"),
            Phase("top:1", at=0.3, lr=0.5, warmup="0.7 epochs"),
            Phase("blocks", at="5 steps", lr=0.2, warmup=0.2),
            Phase("all", at="2.5 epochs", lr=2.0),
        ]
    ),
    "chain-thaw": lambda: GradualUnfreezing(Plateau("val_loss", "max"), previous="freeze"),
}
SITUATIONS = ("within an epoch", "at a thaw", "on an epoch's last batch", "in validation")
POINTS = [(name, situation) for name in SCHEDULES for situation in SITUATIONS]
assert len(POINTS) == 20


class Killed(Exception):
    pass


class Kill(Callback):
    """Dies in one hook of one batch."""

    def __init__(self, hook: str, epoch: int, batch: int, die: Callable[[], None]) -> None:
        self.epoch, self.batch, self.die = epoch, batch, die
        setattr(self, hook, self._strike)

    def _strike(self, trainer: Any, *args: Any) -> None:
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if (trainer.current_epoch, ready - 1) == (self.epoch, self.batch) and not trainer.sanity_checking:
            self.die()


class Thaws(Callback):
    """Batches at which a phase began, as (epoch, batch)."""

    def __init__(self, unfreezing: GradualUnfreezing) -> None:
        self.unfreezing, self.stage = unfreezing, 0
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.unfreezing.state_dict()["stage"] != self.stage:
            self.stage = self.unfreezing.state_dict()["stage"]
            self.seen.append((trainer.current_epoch, batch_idx))


def raise_killed() -> None:
    raise Killed


def run(name: str, folder: Path, *more: Callback, ckpt_path: Path | None = None) -> Any:
    """Everything that a fit under one schedule leaves, the callbacks' states included."""
    unfreezing = SCHEDULES[name]()
    callbacks = [ExactResume("1 steps", dirpath=folder), unfreezing, DiscriminativeLR(0.7)]
    thaws = Thaws(unfreezing)
    settings = {**OPTIONS, "default_root_dir": folder, "ckpt_path": ckpt_path}
    trainer = FILTERED.fit(*callbacks, thaws, *more, **settings)
    state = {type(callback).__name__: callback.state_dict() for callback in callbacks}
    return {**outcome(trainer), "callbacks": state}, thaws.seen


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda name: run(name, tmp_path_factory.mktemp(name)))


def point(situation: str, thaws: list[tuple[int, int]], draw: random.Random) -> tuple[str, int, int]:
    """Hook, epoch and batch in which to die."""
    epoch = draw.randrange(EPOCHS)
    if situation == "at a thaw":
        return ("on_train_batch_start", *draw.choice(thaws))
    if situation == "in validation":
        hook = draw.choice(["on_validation_start", "on_validation_batch_end", "on_validation_end"])
        return hook, epoch, draw.choice([2, 5])
    if situation == "on an epoch's last batch":
        return draw.choice(["on_after_backward", "on_train_batch_end", "on_train_epoch_end"]), epoch, BATCHES - 1
    # The first save is at the first batch.
    return draw.choice(["on_after_backward", "on_train_batch_end"]), epoch, draw.randrange(0, BATCHES - 1)


@pytest.mark.parametrize(("name", "situation"), POINTS)
def test_resumed_run_equals_the_uninterrupted_one(
    name: str, situation: str, tmp_path: Path, uninterrupted: Any
) -> None:
    whole, thaws = uninterrupted(name)
    assert len(thaws) >= 2
    hook, epoch, batch = point(situation, thaws, random.Random(f"{name}, {situation}"))
    with pytest.raises(Killed):
        run(name, tmp_path, Kill(hook, epoch, batch, raise_killed))
    torch.manual_seed(99)  # a new process has other random numbers
    resumed, _ = run(name, tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert identical(resumed, whole), (hook, epoch, batch)


def killed(name: str, folder: str, hook: str, epoch: int, batch: int) -> None:
    """Train until a SIGKILL to oneself. Run in a process of its own."""
    torch.set_num_threads(1)
    run(name, Path(folder), Kill(hook, epoch, batch, lambda: os.kill(os.getpid(), signal.SIGKILL)))


@pytest.mark.kill
@pytest.mark.parametrize(
    ("name", "hook", "epoch", "batch"),
    [
        ("metric", "on_validation_batch_end", 1, 5),
        ("phases", "on_after_backward", 1, 3),
        ("chain-thaw", "on_train_batch_end", 1, 5),
    ],
)
def test_resumed_run_after_sigkill_equals_the_uninterrupted_one(
    name: str, hook: str, epoch: int, batch: int, tmp_path: Path, uninterrupted: Any
) -> None:
    code = (
        f"from tests.callbacks.test_unfreezing_resume import killed; killed{(name, str(tmp_path), hook, epoch, batch)}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    resumed, _ = run(name, tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert identical(resumed, uninterrupted(name)[0])


def test_a_run_that_forgets_when_its_phase_began_differs(
    tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: here the warm-up of the phase starts again at the resume."""
    with pytest.raises(Killed):
        run("phases", tmp_path, Kill("on_after_backward", 1, 3, raise_killed))
    load = GradualUnfreezing.load_state_dict
    monkeypatch.setattr(GradualUnfreezing, "load_state_dict", lambda self, state: load(self, {**state, "began": None}))
    resumed, _ = run("phases", tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert not identical(resumed["weights"], uninterrupted("phases")[0]["weights"])
