from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_ft.callbacks import (
    EWC,
    L2SP,
    DiscriminativeLR,
    ExactResume,
    FrozenPrefixCache,
    GradualUnfreezing,
    Mixout,
    RecAdam,
)
from lightning_ft.callbacks.exact_resume import _seed_generators
from tests.fisher_file import fisher_file
from tests.strangers import BATCHES, FILTERED, STRANGERS, Stranger, dataset, identical, outcome

# Six batches and three optimiser steps an epoch, thaws at the steps 2 (in mid-epoch), 4 and 6 (at a boundary),
# validation after the third batch (inside an accumulation window) and after the sixth.
OPTIONS = {"val_check_interval": BATCHES // 2, "max_epochs": 3}
STRANGER = {stranger.name: stranger for stranger in STRANGERS}


class Killed(Exception):
    pass


class Kill(Callback):
    """Raises in one hook of one batch."""

    def __init__(self, hook: str, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch
        setattr(self, hook, self._raise)

    def _raise(self, trainer: Any, *args: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        if (trainer.current_epoch, progress.ready - 1) == (self.epoch, self.batch) and not trainer.sanity_checking:
            raise Killed


def callbacks(stranger: Stranger, folder: Path) -> list[Callback]:
    return [
        ExactResume("1 steps", dirpath=folder),
        GradualUnfreezing("2 steps"),
        DiscriminativeLR(0.7),
        L2SP(0.1, "decoupled" if stranger.name == "late" else "coupled", head_strength=0.01),
        EWC(0.1, fisher_file(), mode="coupled" if stranger.name == "late" else "decoupled"),
        Mixout(0.5) if stranger.name in ("head-first", "late") else RecAdam(5.0, t0=4, k=0.5),
    ]


def options(stranger: Stranger, folder: Path, **more: Any) -> dict[str, Any]:
    accumulation = {} if stranger.name == "manual" else {"accumulate_grad_batches": 2}
    return {**OPTIONS, **accumulation, "default_root_dir": folder, **more}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def run(name: str) -> Any:
        folder = tmp_path_factory.mktemp(name)
        return outcome(STRANGER[name].fit(*callbacks(STRANGER[name], folder), **options(STRANGER[name], folder)))

    return run


@pytest.mark.parametrize(
    ("name", "hook", "epoch", "batch"),
    [
        *(("filtered", "on_after_backward", 0, batch) for batch in range(2, BATCHES)),
        *(("filtered", "on_after_backward", 1, batch) for batch in range(BATCHES)),
        ("filtered", "on_train_batch_end", 1, 3),
        ("filtered", "on_validation_end", 0, 2),
        ("filtered", "on_validation_end", 0, 5),
        ("filtered", "on_train_epoch_end", 0, 5),
        ("filtered", "on_train_batch_start", 1, 0),
        *(
            (stranger.name, hook, 1, batch)
            for stranger in STRANGERS[1:]
            for hook, batch in (("on_after_backward", 3), ("on_validation_end", 2), ("on_train_batch_end", 5))
        ),
    ],
)
def test_resumed_run_ends_as_if_it_had_never_stopped(
    name: str, hook: str, epoch: int, batch: int, tmp_path: Path, uninterrupted: Any
) -> None:
    stranger = STRANGER[name]
    settings = options(stranger, tmp_path)
    with pytest.raises(Killed):
        stranger.fit(*callbacks(stranger, tmp_path), Kill(hook, epoch, batch), **settings)

    torch.manual_seed(99)  # a new process has other random numbers
    trainer = stranger.trainer(callbacks(stranger, tmp_path), **settings)
    trainer.fit(stranger.module(), ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(trainer), uninterrupted(name))


@pytest.fixture(scope="module")
def uninterrupted_with_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cached")
    all_of_them = [*callbacks(FILTERED, folder), FrozenPrefixCache(min_epochs=0)]
    result = outcome(FILTERED.fit(*all_of_them, **options(FILTERED, folder)))
    # It follows the thaws at the steps 2 and 4; at 6 only the embeddings are left, and nothing is cached.
    assert [row["step"] for row in all_of_them[-1].report().rows] == [0, 2, 4]
    return result, [callback.state_dict() for callback in all_of_them]


@pytest.mark.parametrize(
    ("hook", "epoch", "batch"),
    [
        *(("on_after_backward", 0, batch) for batch in (2, 4, 5)),
        *(("on_after_backward", 1, batch) for batch in (0, 2, 3)),
        ("on_train_batch_start", 0, 4),
        ("on_validation_end", 0, 5),
        ("on_validation_end", 1, 2),
        ("on_train_batch_end", 1, 5),
    ],
)
def test_resume_is_exact_with_a_cached_prefix(
    hook: str, epoch: int, batch: int, tmp_path: Path, uninterrupted_with_cache: Any
) -> None:
    """Beside all the others; the states of the callbacks, too."""

    def run(*more: Callback, **settings: Any) -> Any:
        all_of_them = [*callbacks(FILTERED, tmp_path), FrozenPrefixCache(min_epochs=0)]
        trainer = FILTERED.fit(*all_of_them, *more, **options(FILTERED, tmp_path), **settings)
        return outcome(trainer), [callback.state_dict() for callback in all_of_them]

    with pytest.raises(Killed):
        run(Kill(hook, epoch, batch))
    assert identical(run(ckpt_path=tmp_path / "last.ckpt"), uninterrupted_with_cache)


def test_save_due_inside_an_accumulation_window_waits_for_its_end(tmp_path: Path) -> None:
    """Six batches an epoch in windows of four and two; a save is due at each batch."""
    settings = {**options(FILTERED, tmp_path), "accumulate_grad_batches": 4, "max_epochs": 2}
    whole = outcome(FILTERED.fit(ExactResume("0.1 epochs", dirpath=tmp_path), **settings))
    with pytest.raises(Killed):
        FILTERED.fit(ExactResume("0.1 epochs", dirpath=tmp_path), Kill("on_after_backward", 1, 2), **settings)
    callback = ExactResume("0.1 epochs", dirpath=tmp_path)
    assert identical(outcome(FILTERED.fit(callback, **settings, ckpt_path=tmp_path / "last.ckpt")), whole)


def test_each_batch_of_each_epoch_draws_other_numbers(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Draw(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            drawn.append(torch.rand(()).item())

    FILTERED.fit(ExactResume(dirpath=tmp_path, seed=1), Draw())
    FILTERED.fit(ExactResume(dirpath=tmp_path, seed=2), Draw())
    assert len(drawn) == len(set(drawn)) == 4 * BATCHES


@pytest.mark.parametrize("batch", [0, 3])
def test_resume_is_exact_where_steps_limit_training(batch: int, tmp_path: Path) -> None:
    settings = {**options(FILTERED, tmp_path), "max_steps": 8, "max_epochs": -1}
    whole = outcome(FILTERED.fit(*callbacks(FILTERED, tmp_path), **settings))
    with pytest.raises(Killed):
        FILTERED.fit(*callbacks(FILTERED, tmp_path), Kill("on_after_backward", 1, batch), **settings)
    resumed = FILTERED.fit(*callbacks(FILTERED, tmp_path), **settings, ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(resumed), whole)


def test_tells_when_a_plateau_has_no_metric_after_the_resume(tmp_path: Path) -> None:
    """The only validation of the epoch was before the kill."""
    settings = {**options(STRANGER["late"], tmp_path), "val_check_interval": 2, "limit_train_batches": 3}
    settings |= {"accumulate_grad_batches": 1}
    with pytest.raises(Killed):
        STRANGER["late"].fit(ExactResume("1 steps"), Kill("on_after_backward", 0, 2), **settings)
    with pytest.warns(UserWarning, match=r"ExactResume: \{'val_loss'\} was not logged since the resume"):
        STRANGER["late"].fit(ExactResume("1 steps"), **settings, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


def test_finished_run_is_prolonged_exactly(tmp_path: Path, uninterrupted: Any) -> None:
    FILTERED.fit(*callbacks(FILTERED, tmp_path), **options(FILTERED, tmp_path, max_epochs=2))
    trainer = FILTERED.fit(
        *callbacks(FILTERED, tmp_path), **options(FILTERED, tmp_path), ckpt_path=tmp_path / "last.ckpt"
    )
    assert trainer.global_step == 9
    assert identical(outcome(trainer), uninterrupted("filtered"))


def test_unseeded_resumed_run_differs(tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: here with the same checkpoint, but random numbers left to themselves."""
    with pytest.raises(Killed):
        FILTERED.fit(*callbacks(FILTERED, tmp_path), Kill("on_after_backward", 1, 3), **options(FILTERED, tmp_path))
    monkeypatch.setattr("lightning_ft.callbacks.exact_resume._seed_generators", lambda *key: None)
    trainer = FILTERED.fit(
        *callbacks(FILTERED, tmp_path), **options(FILTERED, tmp_path), ckpt_path=tmp_path / "last.ckpt"
    )
    assert trainer.global_step == 9
    assert not identical(outcome(trainer), uninterrupted("filtered"))


def test_saves_when_due_and_leaves_one_file(tmp_path: Path) -> None:
    steps: list[int] = []

    class Spy(ExactResume):
        def _save(self, trainer: Any) -> None:
            super()._save(trainer)
            steps.append(trainer.global_step)

    trainer = FILTERED.fit(Spy("5 steps"), default_root_dir=tmp_path)
    assert steps == [0, 5, 10, 12]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    assert Spy().path(trainer) == tmp_path / "checkpoints" / "last.ckpt"


def test_seed_is_that_of_the_checkpoint_then_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    callback = ExactResume(dirpath=tmp_path)
    FILTERED.fit(callback, max_epochs=1)
    assert callback.state_dict() == {"seed": 7}
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    callback = ExactResume(dirpath=tmp_path)
    FILTERED.fit(callback, ckpt_path=tmp_path / "last.ckpt")
    assert callback.seed == 7


def test_refuses_a_loader_that_cannot_say_where_it_stands(tmp_path: Path) -> None:
    trainer = FILTERED.trainer([ExactResume(dirpath=tmp_path)])
    with pytest.raises(ValueError, match=r"cannot resume a DataLoader: .* Use lightning_ft.data.ResumableDataLoader"):
        trainer.fit(FILTERED.module(), DataLoader(dataset(), 4))


@pytest.mark.parametrize("save_last", [True, "link"])
def test_refuses_another_writer_of_its_file(save_last: Any, tmp_path: Path) -> None:
    rival = ModelCheckpoint(tmp_path, save_last=save_last)
    with pytest.raises(ValueError, match=r"ModelCheckpoint\(save_last=True\) and ExactResume .* remove save_last"):
        FILTERED.fit(ExactResume(dirpath=tmp_path), rival, enable_checkpointing=True)
    FILTERED.fit(ExactResume(dirpath=tmp_path / "own"), rival, enable_checkpointing=True, max_epochs=1)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    FILTERED.fit(ExactResume(dirpath=tmp_path / "checkpoints"), fast_dev_run=True)
    assert not (tmp_path / "checkpoints").exists()


def test_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    for name in (".last.ckpt.tmp", "..last.ckpt.tmp.123.tmp"):
        (tmp_path / name).write_bytes(b"half")
    FILTERED.fit(ExactResume(dirpath=tmp_path), max_epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_refuses_a_fraction_of_endless_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fraction of a training that has no end"):
        FILTERED.fit(ExactResume(0.1, dirpath=tmp_path), max_epochs=-1)


def test_seed_is_a_function_of_the_whole_key() -> None:
    def draw(*key: int) -> tuple[float, float, float]:
        _seed_generators(*key)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(0, 1, 2, 3) == draw(0, 1, 2, 3)
    keys = [(0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3), (0, 1, 2, 0), (0, 12, 3)]
    assert len({value for key in keys for value in draw(*key)}) == 3 * len(keys)
