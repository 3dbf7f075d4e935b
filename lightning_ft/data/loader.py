"""A DataLoader that continues in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_ft.data.sampler import LengthBucketSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ResumableDataLoader(DataLoader[Any]):
    """Loads the batches of a `LengthBucketSampler` and says, and finds again, where training stood.

    The position is the trainer's own count of processed batches, which Lightning restores with its loops; it is asked
    for when the first batch of an epoch is drawn. It is not what this loader has handed out: workers fetch ahead, and
    a checkpoint taken in ``on_train_batch_start`` has a batch in hand that is not trained on yet. ``state_dict()``
    adds what fixes the order of batches, so that a run resumed over other batches is refused.

    Args:
        dataset: Indexed with a list of row numbers; gives what ``collate_fn`` takes.
        sampler: Decides the batches.
        collate_fn: Makes the batch of what the dataset gave; by default its arrays become tensors.
        trainer: The trainer whose progress is the position. Without one the loader loads, but has no ``state_dict()``.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Copy batches into page-locked memory, for CUDA.

    Raises:
        ValueError: ``Trainer(overfit_batches=...)`` or ``trainer.predict``: Lightning builds such loaders anew with
            samplers of its own.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: LengthBucketSampler,
        *,
        collate_fn: Callable[[Any], Any] | None = None,
        trainer: Trainer | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if overfits(trainer) or (trainer is not None and trainer.predicting):
            cause = "Trainer(overfit_batches=...)" if overfits(trainer) else "trainer.predict"
            raise ValueError(
                f"{cause} replaces the sampler of a loader, and ResumableDataLoader cannot work with another one: "
                "give it a plain torch.utils.data.DataLoader without shuffling"
            )
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            # Its own generator: iterating would else draw the workers' seed from the global one, and a resumed run,
            # which iterates less often, would then see other random numbers.
            generator=torch.Generator(),
        )
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names a private class
        # A generator, so that workers start only with the first batch drawn. Lightning makes a run's first iterator
        # before `set_epoch`, and, for a module whose optimisers ask for `trainer.estimated_stepping_batches`, before
        # it restores the progress of a resumed run; it never hands such a loader its state back.
        sampler = self._sampler
        if self.trainer is not None:
            sampler.resume_at(*self._position())
        self.generator.manual_seed(sampler.seed + sampler.epoch)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """The position (epoch and batch to train on next) and the sampler's identity.

        Raises:
            RuntimeError: The loader was built without a trainer.
        """
        epoch, batch = self._position()
        return {"epoch": epoch, "batch": batch, **self._sampler.identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Check that the saved position means the same batches here.

        Raises:
            ValueError: The position lies inside an epoch, and the batches are not the ones of the saved run.
        """
        identity = self._sampler.identity()
        changed = {name: (state_dict.get(name), now) for name, now in identity.items() if state_dict.get(name) != now}
        if changed and state_dict["batch"]:
            raise ValueError(
                f"the checkpoint stands at batch {state_dict['batch']} of an epoch over other batches; saved and "
                f"present: {changed}. Restore data and batch size, or resume from a checkpoint of an epoch's end"
            )

    @property
    def _sampler(self) -> LengthBucketSampler:
        assert isinstance(self.sampler, LengthBucketSampler)
        return self.sampler

    def _position(self) -> tuple[int, int]:
        if self.trainer is None:
            raise RuntimeError("ResumableDataLoader(trainer=None) does not know how far training is: pass trainer=...")
        return training_position(self.trainer, len(self))


def training_position(trainer: Trainer, batches: float) -> tuple[int, int]:
    """The epoch and the batch in it that a trainer trains on next, from its own progress.

    Args:
        trainer: The trainer.
        batches: Batches of an epoch; infinity where there is no telling.
    """
    loop: Any = trainer.fit_loop  # its counters' types are declared too widely
    epoch = loop.epoch_progress.current
    batch = loop.epoch_loop.batch_progress.current.processed
    if epoch.started == epoch.processed:  # between epochs the batch counter is still the last epoch's
        return epoch.processed, 0
    if batch >= min(batches, trainer.num_training_batches):
        return epoch.processed + 1, 0
    return epoch.processed, batch


def overfits(trainer: Trainer | None) -> bool:
    """Whether a trainer was built with ``overfit_batches``."""
    return trainer is not None and trainer.overfit_batches > 0  # type: ignore[attr-defined]  # set by a connector
