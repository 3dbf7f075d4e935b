"""What all heads share: loading, optimiser, schedule, steps, checkpoint, folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.utils import parametrize
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_ft.functional.alterations import PART, check_alterations, restore
from lightning_ft.functional.learning_rates import decay_groups, slanted_triangular, warmup_then
from lightning_ft.functional.likelihood import Likelihood
from lightning_ft.functional.peft_merge import plain_model
from lightning_ft.modules.checkpoint import (
    KEY,
    Architecture,
    load_model,
    local_weights,
    pack,
    pack_tokenizer,
    plain,
    read_checkpoint,
    unpack,
)
from lightning_ft.modules.token_mean import TokenMean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Schedule = Literal["linear", "cosine", "constant", "slanted_triangular"]
Batch = Mapping[str, Any]
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_Module = TypeVar("_Module", bound="TransformerModule")


class TransformerModule(LightningModule):
    """A Hugging Face model with the optimiser, schedule and steps of standard fine-tuning. Heads derive from it.

    The model is in train mode and every parameter trains; AdamW (fused where possible) decays matrices only;
    the rate rises linearly from 0, then falls. Checkpoints carry configuration, tokenizer and arguments, so that
    :meth:`load_from_checkpoint` needs neither the pretrained weights nor the training data.

    A head overrides :meth:`loss`, :meth:`likelihood`, :meth:`update_metrics` and :meth:`predictions`, and
    :meth:`forward` where the model gives something other than logits. Its constructor names its arguments one by one
    and passes ``dict(locals())`` on.

    Args:
        model_class: The Auto class of the head.
        pretrained: Folder or hub name of the pretrained model, or an :class:`Architecture`.
        arguments: The head's own constructor arguments, to build it anew from a checkpoint; among them those that all
            heads share:

            - ``learning_rate``: η at the end of the warm-up.
            - ``weight_decay``: AdamW's λ, on tensors of two dimensions or more.
            - ``warmup``: Share of all optimiser steps in which the rate rises.
            - ``schedule``: What follows the warm-up: ``"linear"``, ``"cosine"`` or ``"constant"``; or
              ``"slanted_triangular"``, ULMFiT's, whose rise from 1/32 of the rate takes the share ``warmup``.
            - ``head_seed``: Seed of the new head's weights, apart from every other random choice.
            - ``gradient_checkpointing``: Compute activations anew in the backward pass instead of keeping them.
            - ``trust_remote_code``: Run Python code that the model's folder or hub page brings.
            - ``allow_pickle``: Accept weights in pickle files, which can run code when they are read.
        metrics: What is measured in validation and test, logged as ``val_…`` and ``test_…`` over whole epochs.
        config_updates: Settings of the configuration that the head decides (labels, problem type).
        token_weighted: Average the loss over all items (tokens) of an optimiser step, see :class:`TokenMean`, and not
            over its micro-batches.

    Raises:
        ValueError: ``learning_rate``, ``weight_decay`` or ``warmup`` is out of range, or the architecture has no
            gradient checkpointing.
        OSError: The model is not there, or holds pickle files alone.
    """

    head_is_pretrained = False
    """Whether the pretrained model must bring the head's weights, as a language model does: else a warning says so."""

    def __init__(
        self,
        model_class: Any,
        pretrained: str | os.PathLike[str] | Architecture,
        *,
        arguments: Mapping[str, Any],
        metrics: Mapping[str, Metric],
        config_updates: Mapping[str, Any] | None = None,
        token_weighted: bool = False,
    ) -> None:
        super().__init__()
        hidden = ("self", "pretrained", "__class__")
        self._arguments = {name: plain(value) for name, value in arguments.items() if name not in hidden}
        # Plain numbers: NumPy's would reach the optimiser's state, and a weights-only checkpoint refuses them.
        self.learning_rate = float(arguments["learning_rate"])
        self.weight_decay = float(arguments["weight_decay"])
        self.warmup = float(arguments["warmup"])
        self.schedule: Schedule = arguments["schedule"]
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0; fine-tuning takes 1e-5 to 5e-5")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be 0 or more")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be a share of training in [0, 1), such as 0.1")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(get_args(Schedule))}")
        if self.schedule == "slanted_triangular" and self.warmup == 0:
            raise ValueError('schedule="slanted_triangular" rises first: warmup=0 must be above 0 (0.1 in ULMFiT)')
        self._source = pretrained
        self.from_checkpoint = False
        self._trust_remote_code = arguments["trust_remote_code"]
        self.save_hyperparameters(self._arguments)  # for loggers; kept out of checkpoints below
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments["head_seed"])
            self.model: PreTrainedModel = load_model(
                model_class,
                pretrained,
                config_updates or {},
                trust_remote_code=self._trust_remote_code,
                allow_pickle=arguments["allow_pickle"],
                expect_head=self.head_is_pretrained,
            )
        self._give_pad_token()
        # from_pretrained returns eval mode, which Lightning would keep: no dropout in the whole training.
        self.model.train()
        self.model.requires_grad_(True)
        if arguments["gradient_checkpointing"]:
            # The newer name first: transformers warns about the older one from 5.20 on.
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})  # re-entrant loses gradients where the first block is frozen
        self._token_mean = TokenMean() if token_weighted else None
        collection = MetricCollection(dict(metrics))
        self.val_metrics = collection.clone(prefix="val_")
        self.test_metrics = collection.clone(prefix="test_")

    # ---- what a head decides

    @override
    def forward(self, batch: Batch) -> Any:
        """The model's logits for a batch."""
        return self.model(**{name: batch[name] for name in _INPUTS if name in batch}).logits

    def loss(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor | int]:
        """The mean loss over a batch, in fp32, and over how many items (rows or tokens) it is the mean.

        Args:
            outputs: What :meth:`forward` returned.
            batch: The batch.
        """
        raise NotImplementedError

    def likelihood(self, outputs: Any, batch: Batch) -> Likelihood:
        """What the outputs say of the labels, each row of the batch's inputs being an example.

        Args:
            outputs: What :meth:`forward` returned.
            batch: The batch.
        """
        raise NotImplementedError

    def log_likelihood_terms(self, batch: Batch) -> Likelihood:
        """:meth:`likelihood` of a batch, which :func:`~lightning_ft.functional.fisher_diagonal` asks for."""
        return self.likelihood(self(batch), batch)

    def update_metrics(self, metrics: MetricCollection, outputs: Any, batch: Batch) -> None:
        """Add a batch to the metrics of validation or test."""
        raise NotImplementedError

    def predictions(self, batch: Batch) -> dict[str, list[Any]]:
        """Columns of predictions: one JSON-able value for each row of the batch."""
        raise NotImplementedError

    # ---- steps

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, items = self.loss(self(batch), batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=1)
        return loss if self._token_mean is None else self._token_mean.loss(self, loss, items, batch_idx)

    @property
    def loss_factor(self) -> Tensor | float:
        """What the last training step multiplied its mean loss by; a term that is added to it takes the same."""
        return 1.0 if self._token_mean is None else self._token_mean.factor

    @override
    def on_after_backward(self) -> None:
        if self._token_mean is not None:
            self._token_mean.rescale(self)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: Batch, split: str, metrics: MetricCollection) -> None:
        outputs = self(batch)
        loss, items = self.loss(outputs, batch)
        self.log(f"{split}_loss", loss, prog_bar=True, batch_size=int(items), sync_dist=True)
        self.update_metrics(metrics, outputs, batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metrics(self.val_metrics)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metrics(self.test_metrics)

    @override
    def on_validation_epoch_start(self) -> None:
        reset(self.val_metrics)  # an evaluation that was interrupted left its rows

    @override
    def on_test_epoch_start(self) -> None:
        reset(self.test_metrics)

    def _log_metrics(self, metrics: MetricCollection) -> None:
        # Values, and not the metrics themselves: Lightning cannot log one that computes several numbers.
        self.log_dict(metrics.compute())
        reset(metrics)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Any]]:
        """:meth:`predictions`, with the columns ``row`` and ``id`` where the batch has them."""
        known = {name: batch[name] for name in ("row", "id") if name in batch}
        columns = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in known.items()}
        return {**columns, **self.predictions(batch)}

    # ---- tokenizer, optimiser, schedule

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of the pretrained model; None for an :class:`Architecture` that came without one."""
        if isinstance(self._source, Architecture):
            return self._source.tokenizer
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self._source, trust_remote_code=self._trust_remote_code
        )
        return tokenizer

    def _give_pad_token(self) -> None:
        """The model's pad token becomes that which data are padded with; it finds the last token of a text by it.

        Decoders come without one: theirs becomes the end-of-sequence token, as in `Padding.of`.
        """
        if self.tokenizer is None:
            return
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is not None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total = self.trainer.estimated_stepping_batches
        if total < 0:  # what Lightning says of an endless loader without max_steps
            total = float("inf")
        factor = self.rate_factor(total)
        optimizer = torch.optim.AdamW(
            decay_groups(self, self.weight_decay), lr=self.learning_rate, fused=self._can_fuse()
        )
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            # Lightning refuses to clip for an optimiser that says it unscales; in bf16-mixed, too, which has no scale.
            optimizer._step_supports_amp_scaling = False
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def rate_factor(self, total: float) -> Callable[[int], float]:
        """The factor on the learning rate at each optimiser step, of ``total`` in all."""
        warmup = self._warmup_steps(total)
        if self.schedule == "slanted_triangular":
            return lambda step: slanted_triangular(step, total, cut=self.warmup)
        return warmup_then(self.schedule, total_steps=total, warmup_steps=warmup)

    def _warmup_steps(self, total: float) -> int:
        if self.warmup > 0 and total == float("inf"):
            raise ValueError(
                f"warmup={self.warmup} is a share of a training that has no end: set Trainer(max_epochs=...) or "
                "Trainer(max_steps=...), or warmup=0"
            )
        return round(self.warmup * total) if self.warmup > 0 else 0

    def _can_fuse(self) -> bool:
        # Fused optimisers unscale fp16 gradients inside step(), too late for clipping; Lightning refuses the pair, and
        # our plugin unscales before.
        plugin = self.trainer.precision_plugin
        scaled = getattr(plugin, "scaler", None) is not None and not getattr(plugin, "unscales_fused", False)
        clips = bool(self.trainer.gradient_clip_val)
        return self.device.type in ("cpu", "cuda", "mps", "xpu") and not (scaled and clips)

    # ---- files

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # LightningCLI lays a checkpoint's hyper-parameters over the command line: `--model.learning_rate` would be
        # ignored when resuming. They travel under a key of our own.
        checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_KEY, None)
        checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_NAME, None)
        checkpoint[KEY] = pack(type(self).__name__, self._arguments, self.model, self._tokenizer_files)

    @cached_property
    def _tokenizer_files(self) -> dict[str, Tensor]:
        return pack_tokenizer(self.tokenizer)

    @property
    def base_weights(self) -> str | None:
        """The folder that holds the pretrained weights in safetensors, if there is one.

        A checkpoint of a model of which only a part trains leaves out what lies there.
        """
        if isinstance(self._source, Architecture):
            return None if self._source.weights is None else os.fspath(self._source.weights)
        return local_weights(self._source)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_alterations(self, checkpoint)
        if KEY not in checkpoint:
            return
        stored, now = json.loads(checkpoint[KEY]["config"]), self.model.config
        labels = {int(index): name for index, name in stored["id2label"].items()}
        if (labels, stored["problem_type"]) != (now.id2label, now.problem_type):
            raise ValueError(
                f"the checkpoint was trained with labels {list(labels.values())} ({stored['problem_type']}), and this "
                f"module has {list(now.id2label.values())} ({now.problem_type}): give labels=[...] in the checkpoint's "
                "order, to the data module where labels come from the data"
            )

    @classmethod
    @override
    def load_from_checkpoint(  # type: ignore[override]
        cls: type[_Module], checkpoint_path: str | os.PathLike[str], map_location: str | torch.device = "cpu"
    ) -> _Module:
        """Build the module as it was trained, from its checkpoint alone; in train mode, as every new module.

        Args:
            checkpoint_path: A checkpoint that a trainer wrote. It is read with ``weights_only=True``.
            map_location: Device of the module.

        Raises:
            ValueError: The file is no checkpoint of this class.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        stored = checkpoint[KEY]
        if stored["class"] != cls.__name__:
            raise ValueError(f"{checkpoint_path} holds a {stored['class']}, not a {cls.__name__}")
        module = cls(unpack(stored, checkpoint.get(PART, {}).get("base")), **stored["arguments"])
        restore(module, checkpoint, source=str(checkpoint_path))
        module.from_checkpoint = True
        return module.to(map_location)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder (safetensors, configuration, tokenizer) that the Auto classes open.

        Adapters of peft are merged, in a copy.

        Raises:
            ValueError: The adapters make prompts, which no weights can take in; weights of the model are computed when
                it runs, so that no file would hold them.
        """
        if computed := [name for name, child in self.model.named_modules() if parametrize.is_parametrized(child)]:
            raise ValueError(
                f"the weights of {computed[0]} and {len(computed) - 1} more are computed when the model runs "
                "(MovementPruning or another parametrisation), and the Auto classes would not find them: call "
                "lightning_ft.export.export_hf, which writes what they compute"
            )
        plain_model(self.model).save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def reset(metric: Metric | MetricCollection) -> None:
    """Begin a metric anew, so that it can be added to in any mode.

    States made in `trainer.validate`, under inference mode, could not be added to in a fit that follows.
    """
    with torch.inference_mode(False):
        metric.reset()


def load_checkpoint(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> TransformerModule:
    """The module that a checkpoint holds, of whichever head.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint of a lightning_ft module.
    """
    from lightning_ft import modules

    name = read_checkpoint(path)[KEY]["class"]
    head = getattr(modules, name, None)
    if not (isinstance(head, type) and issubclass(head, TransformerModule)):
        raise ValueError(f"{path} holds a {name}, which this version of lightning_ft does not have")
    return head.load_from_checkpoint(path, map_location)
