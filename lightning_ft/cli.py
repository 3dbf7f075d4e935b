"""The command line: LightningCLI with run folders, exact resume, plan, memory, fisher; others are in `commands`."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeUnion,
    ReduceLROnPlateau,
    SaveConfigCallback,
    instantiate_class,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft import callbacks as _callbacks
from lightning_ft import data as _data
from lightning_ft import modules as _modules
from lightning_ft import plugins as _plugins
from lightning_ft import schedulers as _schedulers
from lightning_ft.callbacks import (
    DiscriminativeLR,
    ExactResume,
    Freeze,
    GradualUnfreezing,
    LayerTimeline,
    TrainingModeCheck,
    WritePredictions,
)
from lightning_ft.core.fisher import Variant
from lightning_ft.fisher_pass import Split, fisher_of_task
from lightning_ft.functional import decay_groups
from lightning_ft.memory import memory
from lightning_ft.modules.checkpoint import KEY, read_checkpoint
from lightning_ft.plan import plan
from lightning_ft.plugins import AtomicCheckpointIO

# jsonargparse finds classes by their short names, in YAML and in --trainer.callbacks+=Name, once these are imported.
_NAMED_IN_YAML = (_callbacks, _data, _modules, _plugins, _schedulers)
# What head and data must agree on: written once, with the model. A class that has no such argument is not asked.
_SHARED = (
    *("problem", "scheme", "patterns", "verbalizer", "decoder", "calibrate"),
    *("target_language", "trust_remote_code"),
)
_HELP = """
further commands, with --help of their own:
  lightning-ft plan --config CONFIG        print phases, groups and rates before any training
  lightning-ft memory --config CONFIG      predict the memory of training, by part, and what would lower it
  lightning-ft fisher --config CONFIG --ckpt_path CKPT --out FILE
                                           how much each parameter matters to a task, for EWC
  lightning-ft export CHECKPOINT OUT       write a folder for serving, proved equal to the checkpoint
  lightning-ft verify OUT [--source CHECKPOINT]   is it still what was exported?
  lightning-ft serve OUT                   answer over HTTP what the folder's model knows
  lightning-ft benchmark OUT ...           time exported models beside the same model in PyTorch
  lightning-ft soup CHECKPOINT ... --out OUT   average fine-tuned checkpoints, all or greedily (--greedy)
  lightning-ft intrinsic_dimension search --config CONFIG --dims 100,1000
                                           the smallest subspace in which training does nearly as well
  lightning-ft seeds --config CONFIG --runs 20 --stop_at 0.25 --keep 5
                                           many runs that differ in their seeds: rank early, finish the best
  lightning-ft demo [SENTENCE ...]         fine-tune a small encoder on film reviews, start to end
"""


class FineTuningTrainer(Trainer):
    """Lightning's Trainer with the commands ``plan``, ``memory`` and ``fisher``."""

    def plan(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, plot: str | None = None
    ) -> None:
        """Print which layer groups train when, and at which learning rate. Nothing is trained.

        Args:
            model: The module.
            datamodule: Its data.
            plot: Also draw it, into a file .png, .svg or .pdf.
        """
        for report in plan(self, model, datamodule, plot=plot):
            print(report, end="\n\n")

    def memory(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Predict how much memory training takes at its peak, by part, and what would lower it. No step is made.

        Args:
            model: The module.
            datamodule: Its data, of which one batch is read.
        """
        for report in memory(self, model, datamodule):
            print(report, end="\n\n")

    def fisher(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        out: str = "fisher.safetensors",
        ckpt_path: str | None = None,
        variant: Variant = "exact",
        limit: int | None = 1000,
        split: Split = "train",
        previous: str | None = None,
        gamma: float = 1.0,
        head: bool = False,
    ) -> None:
        """Compute the diagonal Fisher information of a trained model over its data, and write it for EWC.

        Args:
            model: The module.
            datamodule: The data of the task that is to be remembered.
            out: The file to write or replace, in safetensors.
            ckpt_path: The checkpoint with the trained weights, or "last".
            variant: Whose labels: the model's own, all of them (exact) or one drawn for each example (sampled), or
                those of the data (empirical).
            limit: Number of examples; null for all.
            split: Part of the data.
            previous: A file of earlier tasks, to which this one is added.
            gamma: What earlier tasks are multiplied by: 1 keeps them whole, 0.9 to 0.95 forgets slowly.
            head: Also the head's parameters, which a new task replaces.
        """
        report = fisher_of_task(
            *(self, model, datamodule, out),
            ckpt_path=ckpt_path,
            variant=variant,
            limit=limit,
            split=split,
            previous=previous,
            gamma=gamma,
            head=head,
        )
        if self.is_global_zero:
            print(report)


class SaveFitConfig(SaveConfigCallback):
    """Save the configuration of a fit beside its logs; evaluating a run writes nothing into it.

    Args:
        parser: The parser of the configuration.
        config: The configuration.
        claim: The folder that a new run takes for itself; None for a run that goes on.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *, claim: Path | None = None) -> None:
        super().__init__(parser, config, overwrite=True)
        self.claim = claim

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Only here, when all processes of this run have chosen the same folder.
        if self.claim is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.claim.mkdir(parents=True, exist_ok=True)  # the logger may have made it
            try:
                (self.claim / ".claimed").touch(exist_ok=False)
            except FileExistsError as error:
                raise FileExistsError(f"another fit has just taken {self.claim}: start this one again") from error
        super().setup(trainer, pl_module, stage)


class FineTuningCLI(LightningCLI):
    """LightningCLI whose runs can be found and resumed.

    A fit gets a folder of its own, ``run_0``, ``run_1``, … in ``trainer.default_root_dir``, with ``checkpoints/``
    and ``logs/``. ``--ckpt_path last`` continues the newest run that has a checkpoint, in its folder. The
    configuration names the model once: the data's ``tokenizer`` is always the model's ``pretrained``, what else both
    must agree on (``problem``, ``scheme``, ``patterns``, …) is the model's, and the model's ``labels`` are the data's.
    With ``--ckpt_path`` both have the checkpoint's labels, unless the data are given some: to test or to predict needs
    no training file.
    """

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"trainer.default_root_dir": "runs"})
        parser.add_argument(
            "--exact_resume",
            type=bool,
            default=True,
            help="Save and seed so that --ckpt_path last ends as the uninterrupted run would. Turn it off for a data "
            "loader that cannot say where it stands.",
        )
        parser.link_arguments("model.init_args.pretrained", "data.init_args.tokenizer")
        for shared in _SHARED:
            parser.link_arguments(f"model.init_args.{shared}", f"data.init_args.{shared}")
        parser.link_arguments("data.labels", "model.init_args.labels", apply_on="instantiate")

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        ours = {command: {"model", "datamodule"} for command in ("plan", "memory", "fisher")}
        return {**LightningCLI.subcommands(), **ours}

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if not isinstance(args, dict | Namespace):
            # bitsandbytes, which peft imports, has an AdamW, too: a bare name would say nothing.
            args = list(sys.argv[1:] if args is None else args)
            for i, before in enumerate(args[:-1]):
                if before == "--optimizer" and hasattr(torch.optim, args[i + 1]):
                    args[i + 1] = f"torch.optim.{args[i + 1]}"
                elif before in ("-c", "--config"):
                    args[i + 1] = recipe(args[i + 1])
            args = [f"--config={recipe(a[9:])}" if a.startswith("--config=") else a for a in args]
            self.config = parser.parse_args(args)
        else:
            super().parse_arguments(parser, args)

    @override
    def configure_optimizers(  # type: ignore[override]  # of the instance: it needs the configuration
        self,
        lightning_module: LightningModule,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRSchedulerTypeUnion | None = None,
    ) -> Any:
        """What --optimizer and --lr_scheduler ask for.

        Lightning has built both already, from bare parameters and before there was a trainer. An optimiser of a module
        of ours gets the groups that the module's own has, so that biases and norms do not decay; the scheduler is made
        anew over it, and is told the number of steps where it takes ``total_steps`` and was given none.
        """
        weight_decay = optimizer.defaults.get("weight_decay")
        if isinstance(lightning_module, _modules.TransformerModule) and weight_decay:
            optimizer.param_groups.clear()
            for group in decay_groups(lightning_module, weight_decay):
                optimizer.add_param_group(group)
        if lr_scheduler is not None:
            lr_scheduler = instantiate_class(optimizer, self._scheduler_config(lightning_module.trainer))
        # Lightning would step them once an epoch: a warm-up of 100 steps would last 100 epochs.
        if lr_scheduler is None or isinstance(lr_scheduler, ReduceLROnPlateau):
            return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

    def _scheduler_config(self, trainer: Trainer) -> dict[str, Any]:
        config = self._get(self.config_init, "lr_scheduler")
        arguments = dict(config.get("init_args", {}))
        if "total_steps" in arguments and arguments["total_steps"] is None:
            total = trainer.estimated_stepping_batches
            if not 0 < total < float("inf"):
                raise ValueError(
                    f"--lr_scheduler {config['class_path'].rsplit('.', 1)[-1]} spans a training that has no end: set "
                    "--trainer.max_epochs, --trainer.max_steps, or --lr_scheduler.total_steps"
                )
            arguments["total_steps"] = int(total)
        return {"class_path": config["class_path"], "init_args": arguments}

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir or "runs")
        if config.get("ckpt_path") == "last":
            config.ckpt_path = str(last_checkpoint(root))
            rank_zero_info(f"--ckpt_path last: {config.ckpt_path}")
        self._run = run_folder(root, config.get("ckpt_path"), predicts=self.subcommand == "predict")
        data = config.get("data")  # none where the module has loaders of its own
        arguments = (data.get("init_args") if data else None) or {}
        if config.get("ckpt_path") and "labels" in arguments and arguments["labels"] is None:
            arguments["labels"] = checkpoint_labels(config.ckpt_path)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        callbacks, plugins = _as_list(settings["callbacks"]), _as_list(settings["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        if self.subcommand == "fit":
            self.save_config_kwargs["claim"] = None if self._run.exists() else self._run
            kwargs |= self._fit_settings(settings, callbacks)
        elif self.subcommand == "fisher":
            # A fit's own are no concern of it.
            callbacks = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
            kwargs |= {"enable_checkpointing": False, "enable_model_summary": False}
        elif self.subcommand == "predict" and not any(isinstance(c, WritePredictions) for c in callbacks):
            callbacks.append(WritePredictions(self._run / "predictions.jsonl"))
        for callback in callbacks:
            # One folder for the whole run: Lightning's default changes with the logger's version when it resumes,
            # and with it what ModelCheckpoint knows about the best checkpoint so far is dropped.
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self._run / "checkpoints").absolute())
        logger = kwargs.pop("logger", settings["logger"] if self.subcommand == "fit" else False)
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, logger=logger, **kwargs)

    def _fit_settings(self, settings: Any, callbacks: list[Callback]) -> dict[str, Any]:
        def lacks(kind: type[Callback]) -> bool:
            return not any(isinstance(callback, kind) for callback in callbacks)

        if lacks(TrainingModeCheck):
            callbacks.append(TrainingModeCheck())
        saves = settings["enable_checkpointing"] is not False
        if saves and lacks(ExactResume) and self._get(self.config_init, "exact_resume"):
            callbacks.append(ExactResume())
        speaking_of_depth = [c for c in callbacks if isinstance(c, DiscriminativeLR | Freeze | GradualUnfreezing)]
        if speaking_of_depth and lacks(LayerTimeline) and find_spec("matplotlib") is not None:
            callbacks.append(LayerTimeline(self._run / "layers.png", layers=speaking_of_depth[0].layers))
        if saves and lacks(Checkpoint):
            callbacks.append(ModelCheckpoint(enable_version_counter=False))
        # First, so that what other callbacks draw comes from the generators that it seeds.
        callbacks.sort(key=lambda callback: not isinstance(callback, ExactResume))
        result: dict[str, Any] = {"default_root_dir": str(self._run)}
        if settings["logger"] in (None, True):
            result["logger"] = CSVLogger(self._run, name="logs")
        return result


def recipe(path: str) -> str:
    """A configuration's path: ``recipes/NAME.yaml`` is the package's own where there is no such file here."""
    own = Path(__file__).parent / path
    return str(own) if Path(path).parts[:1] == ("recipes",) and own.is_file() and not Path(path).exists() else path


def _as_list(value: Any) -> list[Any]:
    """What Trainer takes as one, several or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def last_checkpoint(root: Path) -> Path:
    """``last.ckpt`` of the newest run below ``root``.

    Raises:
        FileNotFoundError: No run has one.
    """
    found = [path for run in _runs(root) if (path := run / "checkpoints" / "last.ckpt").exists()]
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path last: no run in {root.absolute()} has a checkpoint (run_*/checkpoints/last.ckpt), so there "
            "is nothing to resume. Start without --ckpt_path, or name the folder: --trainer.default_root_dir"
        )
    return found[-1]


def checkpoint_labels(path: str) -> list[str] | None:
    """The labels of the head in a checkpoint of ours; None for a checkpoint that holds none."""
    try:
        stored = read_checkpoint(path)[KEY]
    except (FileNotFoundError, ValueError, UnpicklingError):  # not a file, or not ours: Lightning knows what to say
        return None
    return stored["arguments"].get("labels") or None


def run_folder(root: Path, ckpt_path: str | None, *, predicts: bool = False) -> Path:
    """The folder of the run that ``ckpt_path`` belongs to, else the next free one. Nothing is created.

    Args:
        root: The folder of all runs.
        ckpt_path: The checkpoint that is given, if any.
        predicts: Whether the run predicts: without a run's checkpoint it goes on in the newest one that did nothing but
            predict, if that was interrupted.
    """
    if ckpt_path is not None and _number(run := Path(ckpt_path).parent.parent) is not None:
        return run
    runs = _runs(root)
    if (
        predicts
        and runs
        and not (runs[-1] / "checkpoints").exists()
        and any(runs[-1].glob(".predictions.jsonl.*.part"))
    ):
        return runs[-1]
    numbers = [_number(run) or 0 for run in runs]
    return root / f"run_{max(numbers) + 1 if numbers else 0}"


def _runs(root: Path) -> list[Path]:
    return sorted(
        (path for path in root.glob("run_*") if _number(path) is not None), key=lambda path: _number(path) or 0
    )


def _number(run: Path) -> int | None:
    match = re.fullmatch(r"run_(\d+)", run.name)
    return int(match[1]) if match else None


def run(arguments: Sequence[str] | None = None, *, cli_class: type[FineTuningCLI] = FineTuningCLI) -> FineTuningCLI:
    """Run a command of :class:`FineTuningCLI` and return it, with its trainer, model and data.

    Args:
        arguments: The command line; that of the process by default.
        cli_class: The class of the command line.
    """
    # peft's own default, when a configuration is made of all its arguments.
    warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored", category=UserWarning)
    return cli_class(
        trainer_class=FineTuningTrainer,
        save_config_callback=SaveFitConfig,
        seed_everything_default=0,
        subclass_mode_model=True,
        subclass_mode_data=True,
        load_from_checkpoint_support=False,
        parser_kwargs={"prog": "lightning-ft", "epilog": _HELP},
        args=None if arguments is None else list(arguments),
    )


def main() -> None:
    """Entry point of ``lightning-ft``."""
    # The parallel tokenizer warns when data workers fork after it was used; it says so on every start.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Neither is about anything that a user can act on: old spelling inside Lightning, operators of another package.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    command, *arguments = sys.argv[1:] or [""]
    if command != "fit":
        # The callbacks of a fit are no concern of an evaluation.
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
    if (own := _own_command(command)) is None:
        run()
    else:
        own(arguments)


def _own_command(name: str) -> Callable[[list[str]], None] | None:
    """A command that is none of the trainer's."""
    from lightning_ft import commands

    return commands.COMMANDS.get(name)


__all__ = [
    "FineTuningCLI",
    "FineTuningTrainer",
    "checkpoint_labels",
    "last_checkpoint",
    "main",
    "run",
    "run_folder",
]
