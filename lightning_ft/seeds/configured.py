"""Runs of a study as a configuration of ``lightning-ft fit`` says."""

from __future__ import annotations

import base64
import math
import os
import pickle
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from lightning_ft.callbacks import ExactResume
from lightning_ft.callbacks.seed_pruning import SeedPruning
from lightning_ft.cli import FineTuningCLI, run
from lightning_ft.data import TextData
from lightning_ft.modules import MultipleChoice, SequenceClassification
from lightning_ft.seeds.job import Job, LeaseLostError, Progress
from lightning_ft.seeds.rank import JOB
from lightning_ft.seeds.record import Evaluation


@dataclass(frozen=True)
class ConfiguredTrain:
    """Trains a phase of a run by a configuration.

    Three streams of random numbers are apart: what is drawn before the first batch (``seed_everything``, and
    ``head_seed`` of the module), the order of the data (``seed`` of the data; not the rows of ``val_fraction``), and
    what is drawn in training (:class:`~lightning_ft.callbacks.ExactResume`).

    Args:
        config: The configuration.
        arguments: More of the command line of ``fit``.
        checkpoint_every: Optimiser steps between two checkpoints: what a killed worker loses at most.
    """

    config: str
    arguments: tuple[str, ...] = ()
    checkpoint_every: int = 100

    def __call__(self, job: Job) -> Sequence[Evaluation]:
        """See :class:`~lightning_ft.seeds.job.Train`."""
        settings = job.settings
        pruning = SeedPruning(settings.rungs, monitor=settings.metric, loss=settings.loss, decide=job.decide)
        every = self.checkpoint_every

        class SeedCLI(FineTuningCLI):
            @override
            def before_instantiate_classes(self) -> None:
                super().before_instantiate_classes()
                self._split_seed = give_seeds(self.config[self.subcommand], job)

            @override
            def instantiate_classes(self) -> None:
                super().instantiate_classes()
                if isinstance(self.datamodule, TextData):
                    self.datamodule.split_seed = self._split_seed

            @override
            def _fit_settings(self, settings: Any, callbacks: list[Callback]) -> dict[str, Any]:
                given = [callback for callback in callbacks if not isinstance(callback, ExactResume)]
                exact = ExactResume(f"{every} steps", dirpath=job.folder / "checkpoints", seed=job.dropout)
                callbacks[:] = [exact, _Reporter(job.progress, pruning), *given]
                result = super()._fit_settings(settings, callbacks)
                callbacks.append(pruning)
                if not any(isinstance(callback, Checkpoint) for callback in given):
                    # The exact one is enough: others would be written at each epoch of each run.
                    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
                    result["enable_checkpointing"] = False
                return result

        seeds = ["--seed_everything", str(job.init)]
        with _ranks(self, job):
            built = _run("fit", job, (*self._line(), *seeds), SeedCLI)
            if pruning.stopped_at is None and _unjudged(pruning, built.trainer):
                # It had ended, and its worker died before it could say so.
                built.trainer.validate(built.model, built.datamodule, verbose=False)
                logged = built.trainer.callback_metrics
                values = float(logged[settings.metric]), float(logged[settings.loss])
                pruning.evaluations.append((built.trainer.global_step, *values))
            job.progress.at(built.trainer.global_step)  # a training that had ended says nothing by itself
        return evaluations_of(pruning)

    def _line(self) -> tuple[str, ...]:
        return "--config", self.config, *self.arguments


@dataclass(frozen=True)
class ConfiguredTest:
    """Scores a finished run on the test data of a configuration.

    Args:
        config: The configuration.
        arguments: More of the command line.
    """

    config: str
    arguments: tuple[str, ...] = ()

    def __call__(self, job: Job) -> float:
        """See :class:`~lightning_ft.seeds.job.Test`."""
        if job.checkpoint is None:
            raise FileNotFoundError(f"the checkpoint of run {job.run} is not on this machine: share --out")
        metric = f"test_{job.settings.metric.removeprefix('val_')}"
        with _ranks(self, job):
            built = _run("test", job, ("--config", self.config, *self.arguments), FineTuningCLI)
        logged = built.trainer.callback_metrics
        if metric not in logged:
            raise ValueError(f"metric={metric!r} is not logged in test; logged are: {', '.join(sorted(logged))}")
        return float(logged[metric])


class _Reporter(Callback):
    """Tells the study how a training goes, and ends it on all ranks when another worker has taken it over."""

    def __init__(self, progress: Progress, pruning: SeedPruning) -> None:
        self.progress = progress
        self.pruning = pruning
        self.facts: dict[str, Any] = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        lost: LeaseLostError | None = None
        if trainer.is_global_zero:
            try:
                if not self.facts:
                    self.facts = facts_of(trainer, pl_module, self.pruning)
                    self.progress.report(evaluations_of(self.pruning), **self.facts)
                self.progress.at(trainer.global_step)
            except LeaseLostError as error:
                lost = error
        if trainer.world_size == 1 and lost is None:
            return
        if trainer.strategy.reduce_boolean_decision(lost is not None, all=False):
            raise lost or LeaseLostError("another worker has taken this run over")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.facts and not trainer.sanity_checking:
            self.progress.report(evaluations_of(self.pruning), **self.facts)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.progress.at(trainer.global_step)


def facts_of(trainer: Trainer, module: LightningModule, pruning: SeedPruning) -> dict[str, Any]:
    """What a study wants to know of a training: T, and what knowing nothing would score.

    Raises:
        ValueError: The training has no length that is known.
    """
    if not math.isfinite(pruning.horizon):
        raise ValueError("a study needs a training with an end: set trainer.max_epochs, or trainer.max_steps")
    facts: dict[str, Any] = {"horizon": int(pruning.horizon)}
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, TextData):
        return facts
    if isinstance(module, SequenceClassification) and module.problem == "single_label":
        rows = data.need("val")
        classes, most = len(module.labels), 10
    elif isinstance(module, MultipleChoice):
        # A model that tells no choices apart takes now this one, now that: a score as of always the third is luck.
        rows = data.need("val")
        classes, most = rows.count, 1
    else:
        return facts
    constants = _constants(module, rows[list(range(len(rows)))]["labels"], classes, pruning.monitor, most)
    return facts | {"classes": classes, "chance": next(iter(constants), None), "constants": constants[1:]}


def _constants(
    module: SequenceClassification | MultipleChoice, labels: torch.Tensor, classes: int, metric: str, most: int
) -> list[float]:
    """Scores of always answering one class, or choice: the commonest, the next, ...; none if it is no such metric."""
    scores = []
    for chosen in labels.bincount(minlength=1).argsort(descending=True)[:most].tolist():
        metrics = module.val_metrics.clone().cpu()
        for one in metrics.values():
            one.distributed_available_fn = lambda: False  # rank 0 alone computes it, of all rows
        logits = torch.zeros(len(labels), classes)
        logits[:, chosen] = 100.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metrics that have no meaning here
            module.update_metrics(metrics, logits, {"labels": labels})
            scores += [float(value) for name, value in metrics.compute().items() if name == metric]
    return scores


def evaluations_of(pruning: SeedPruning) -> list[Evaluation]:
    """What a run was judged by."""
    return [Evaluation(*one) for one in pruning.evaluations]


def _unjudged(pruning: SeedPruning, trainer: Trainer) -> bool:
    return not pruning.evaluations or pruning.evaluations[-1][0] != trainer.global_step


def give_seeds(config: Any, job: Job) -> int:
    """Set the seeds of a run in a parsed configuration, and return that of its split, which stays.

    Raises:
        ValueError: The data take no seed.
    """
    data = check_seeds(config)
    split_seed: int = data["seed"]
    data["seed"] = job.order
    model = config.model.init_args
    if "head_seed" in model:
        model["head_seed"] = job.init
    return split_seed


def check_seeds(config: Any) -> Any:
    """The arguments of the data, which have a seed.

    Raises:
        ValueError: They have none.
    """
    data = config.get("data")
    arguments = data.get("init_args") if data else None
    if not arguments or "seed" not in arguments:
        name = data.class_path if data else "the module's own data"
        raise ValueError(
            f"{name} takes no seed, so that runs would not differ in the order of the data: give a data module with an "
            "argument `seed`, as those of lightning_ft.data have"
        )
    return arguments


def _run(command: str, job: Job, line: Sequence[str], kind: type[FineTuningCLI]) -> FineTuningCLI:
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    place = ["--trainer.default_root_dir", str(job.folder)]
    last = [] if job.checkpoint is None else ["--ckpt_path", str(job.checkpoint)]
    with warnings.catch_warnings():
        # These are its arguments; the process has others.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return run([command, *quiet, *line, *place, *last], cli_class=kind)


@contextmanager
def _ranks(task: Any, job: Job) -> Iterator[None]:
    """Lightning starts further ranks by the command of this process: meanwhile it is that of this job."""
    if "LOCAL_RANK" in os.environ:  # this is such a rank
        yield
        return
    main = sys.modules["__main__"]
    spec, arguments, environment = getattr(main, "__spec__", None), sys.argv, dict(os.environ)
    main.__spec__, sys.argv = find_spec("lightning_ft.seeds.rank"), arguments[:1]
    # They inherit it. In no file: one in a shared folder might be another's, and a pickle runs what it says.
    os.environ[JOB] = base64.b64encode(pickle.dumps((task, replace(job, progress=Progress())))).decode()
    try:
        yield
    finally:
        main.__spec__, sys.argv = spec, arguments
        # The next job has ranks of its own.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


class Parsed(FineTuningCLI):
    """Reads a configuration and builds nothing."""

    datamodule: LightningDataModule

    @override
    def instantiate_classes(self) -> None:
        pass

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass


def configuration(config: str, arguments: Sequence[str]) -> Any:
    """A configuration of ``fit``, parsed.

    Args:
        config: The file.
        arguments: More of the command line.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return run(["fit", "--config", config, *arguments], cli_class=Parsed).config.fit


def has_test(config: Any) -> bool:
    """Whether the data of a parsed configuration have a test part."""
    return bool(config.data.init_args.get("test"))


def content(config: str) -> str:
    """What of a configuration file settles whether two are the same."""
    from lightning_ft.core.files import sha256

    return sha256(Path(config))
