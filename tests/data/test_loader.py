from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_ft.data import LengthBucketSampler, ResumableDataLoader

LENGTHS = torch.randint(1, 30, (41,), generator=torch.Generator().manual_seed(0))
BATCHES = 11  # of 4 rows


class Rows(Dataset):
    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows)


class Recorder(LightningModule):
    """Notes which rows it was trained on."""

    def __init__(self, loader: Callable[[Trainer], Any], counts_steps: bool = False) -> None:
        super().__init__()
        self.counts_steps = counts_steps
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.loader = loader
        self.seen: list[tuple[int, int, list[int]]] = []

    def train_dataloader(self) -> Any:
        return self.loader(self.trainer)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.arange(2.0))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch.tolist()))
        return self.weight * batch.float().mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.counts_steps:  # makes Lightning build the loader before it restores a checkpoint's progress
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(Callback):
    """Saves at every call of one hook and keeps what was trained on before."""

    def __init__(self, hook: str, folder: Path) -> None:
        self.saved: list[tuple[str, int]] = []

        def save(trainer: Trainer, module: Recorder, *_: Any) -> None:
            if not trainer.sanity_checking:
                path = str(folder / f"{len(self.saved)}.ckpt")
                self.saved.append((path, len(module.seen)))
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


class Killed(Exception):
    pass


class Killer(Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:  # inside the step, after the data were fetched
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) >= self.at:
            raise Killed


def loader_for(
    workers: int = 0, *, rows: torch.Tensor = LENGTHS, seed: int = 7
) -> Callable[[Trainer], ResumableDataLoader]:
    def build(trainer: Trainer) -> ResumableDataLoader:
        sampler = LengthBucketSampler(rows, 4, seed=seed, megabatch=3)
        return ResumableDataLoader(Rows(), sampler, trainer=trainer, num_workers=workers)

    return build


def fit(
    loader: Callable[[Trainer], Any],
    *callbacks: Callback,
    ckpt: str | None = None,
    counts_steps: bool = False,
    **kwargs: Any,
) -> Recorder:
    options = {"max_epochs": 2, "val_check_interval": 4, "accumulate_grad_batches": 2} | kwargs
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **options,
    )
    module = Recorder(loader, counts_steps)
    trainer.fit(module, ckpt_path=ckpt)
    return module


@pytest.fixture(scope="module")
def whole() -> list[tuple[int, int, list[int]]]:
    return fit(loader_for()).seen


def test_whole_run_sees_every_row_each_epoch_in_another_order(whole: list[tuple[int, int, list[int]]]) -> None:
    epochs = [[rows for epoch, _, rows in whole if epoch == e] for e in (0, 1)]
    assert [sorted(row for rows in epoch for row in rows) for epoch in epochs] == [list(range(41))] * 2
    assert epochs[0] != epochs[1]
    assert fit(loader_for(2)).seen == whole


# Batches 3 and 7 precede a validation, 4 and 8 follow one; 10 is its epoch's last; odd ones are in mid-accumulation.
@pytest.mark.parametrize(
    ("epoch", "batch", "workers"),
    [(0, b, 0) for b in (0, 1, 3, 4, 7, 8, 9, 10)]
    + [(1, b, 0) for b in (0, 1, 4, 10)]
    + [(0, 4, 2), (0, 10, 2), (1, 0, 2), (1, 5, 2)],
)
def test_killed_run_resumes_at_the_batch_it_was_killed_in(
    epoch: int, batch: int, workers: int, whole: list[tuple[int, int, list[int]]], tmp_path: Path
) -> None:
    saver = Saver("on_train_batch_start", tmp_path)
    with pytest.raises(Killed):
        fit(loader_for(workers), saver, Killer(epoch, batch))
    path, trained = saver.saved[-1]
    assert trained in (epoch * BATCHES + batch, epoch * BATCHES + batch + 1)  # hooks run at every second batch only
    assert fit(loader_for(workers), ckpt=path).seen == whole[trained:]


@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end"]
)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("counts_steps", [False, True])
def test_resumes_from_whatever_hook_saved(
    hook: str, workers: int, counts_steps: bool, whole: list[tuple[int, int, list[int]]], tmp_path: Path
) -> None:
    saver = Saver(hook, tmp_path)
    fit(loader_for(), saver)
    chosen = saver.saved if not workers else saver.saved[:: max(1, len(saver.saved) // 3)]
    for path, trained in chosen:
        assert fit(loader_for(workers), ckpt=path, counts_steps=counts_steps).seen == whole[trained:]


def test_resumes_under_limit_train_batches(tmp_path: Path) -> None:
    saver = Saver("on_train_batch_end", tmp_path)
    limited = fit(loader_for(), saver, limit_train_batches=5).seen
    assert len(limited) == 10
    for path, trained in saver.saved:
        assert fit(loader_for(2 * (trained == 5)), ckpt=path, limit_train_batches=5).seen == limited[trained:]


def test_saved_position_counts_processed_batches(tmp_path: Path) -> None:
    for hook, first in (("on_train_batch_start", 0), ("on_train_batch_end", 1)):
        saver = Saver(hook, tmp_path)
        fit(loader_for(2), saver, max_epochs=1)
        states = [
            torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
            for path, _ in saver.saved
        ]
        batches = [batch % BATCHES for batch in range(first, first + BATCHES)]
        assert [state["batch"] for state in states] == batches
        assert [state["epoch"] for state in states] == [batch // BATCHES for batch in range(first, first + BATCHES)]
        assert all(type(value) is int for state in states for value in state.values())


def test_second_fit_of_one_trainer_goes_on_with_the_next_epoch(whole: list[tuple[int, int, list[int]]]) -> None:
    for workers in (0, 2):
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        module = Recorder(loader_for(workers))
        trainer.fit(module)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module)
        assert module.seen == whole


def test_iterating_leaves_the_global_random_numbers_alone() -> None:
    loader = loader_for()(None)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader)
    assert torch.rand(1) == expected


def test_other_batches_in_mid_epoch_are_refused(tmp_path: Path) -> None:
    saver = Saver("on_train_batch_start", tmp_path)
    fit(loader_for(), saver, max_epochs=1)
    middle, start = saver.saved[3][0], saver.saved[0][0]
    with pytest.raises(ValueError, match=r"batch 3 of an epoch over other batches.*'seed': \(7, 8\).*epoch's end"):
        fit(loader_for(seed=8), ckpt=middle)
    with pytest.raises(ValueError, match=r"'rows': \(41, 40\)"):
        fit(loader_for(rows=LENGTHS[:40]), ckpt=middle)
    assert len(fit(loader_for(seed=8), ckpt=start).seen) == 2 * BATCHES


def test_without_trainer_there_is_no_position() -> None:
    loader = loader_for()(None)
    assert len(list(loader)) == len(loader) == BATCHES
    with pytest.raises(RuntimeError, match="pass trainer="):
        loader.state_dict()


def test_overfit_and_predict_are_refused() -> None:
    with pytest.raises(ValueError, match=r"overfit_batches=.*plain torch.utils.data.DataLoader"):
        fit(loader_for(), overfit_batches=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.predicting = True
    with pytest.raises(ValueError, match=r"trainer.predict replaces the sampler"):
        loader_for()(trainer)
