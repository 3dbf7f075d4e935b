"""What all heads share: loading, optimiser, schedule, checkpoint, folder."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from typing_extensions import override

from lightning_ft.functional.learning_rates import decay_groups, warmup_then

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Schedule = Literal["linear", "cosine", "constant"]
_KEY = "lightning_ft"
_Module = TypeVar("_Module", bound="TransformerModule")


class Architecture:
    """A model without pretrained weights: a configuration, and the tokenizer that goes with it.

    Args:
        config: The model's configuration; its weights are drawn at random.
        tokenizer: What turns text into its inputs; needed only to save and to export.
    """

    def __init__(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.config = config
        self.tokenizer = tokenizer


class TransformerModule(LightningModule):
    """A Hugging Face model with the optimiser and schedule of standard fine-tuning. Heads derive from it.

    The model is in train mode and every parameter trains; AdamW (fused where possible) decays matrices only;
    the rate rises linearly from 0, then falls. Checkpoints carry configuration, tokenizer and arguments, so that
    :meth:`load_from_checkpoint` needs neither the pretrained weights nor the training data.

    Args:
        model_class: The Auto class of the head.
        pretrained: Folder or hub name of the pretrained model, or an :class:`Architecture`.
        config_updates: Settings of the configuration that the head decides (labels, problem type).
        arguments: The head's own constructor arguments, to build it anew from a checkpoint.
        learning_rate: η at the end of the warm-up.
        weight_decay: AdamW's λ, on tensors of two dimensions or more.
        warmup: Share of all optimiser steps in which the rate rises.
        schedule: What follows the warm-up.
        head_seed: Seed of the new head's weights, apart from every other random choice.
        trust_remote_code: Run Python code that the model's folder or hub page brings.
        allow_pickle: Accept weights in pickle files, which can run code when they are read.

    Raises:
        ValueError: ``learning_rate``, ``weight_decay`` or ``warmup`` is out of range.
        OSError: The model is not there, or holds pickle files alone.
    """

    def __init__(
        self,
        model_class: Any,
        pretrained: str | os.PathLike[str] | Architecture,
        *,
        config_updates: Mapping[str, Any],
        arguments: Mapping[str, Any],
        learning_rate: float,
        weight_decay: float,
        warmup: float,
        schedule: Schedule,
        head_seed: int,
        trust_remote_code: bool,
        allow_pickle: bool,
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"learning_rate={learning_rate!r} must be above 0; fine-tuning takes 1e-5 to 5e-5")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay={weight_decay!r} must be 0 or more")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup!r} must be a share of training in [0, 1), such as 0.1")
        if schedule not in ("linear", "cosine", "constant"):
            raise ValueError(f'schedule={schedule!r} must be "linear", "cosine" or "constant"')
        # Plain numbers: NumPy's would reach the optimiser's state, and a weights-only checkpoint refuses them.
        self.learning_rate = float(learning_rate)
        self.weight_decay = float(weight_decay)
        self.warmup = float(warmup)
        self.schedule: Schedule = schedule
        self._source = pretrained
        self._trust_remote_code = trust_remote_code
        self._arguments = {name: _plain(value) for name, value in arguments.items()}
        self.save_hyperparameters(self._arguments)  # for loggers; kept out of checkpoints below
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(head_seed)
            self.model: PreTrainedModel = _load(
                model_class, pretrained, config_updates, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
            )
        self._give_pad_token()
        # from_pretrained returns eval mode, which Lightning would keep: no dropout in the whole training.
        self.model.train()
        self.model.requires_grad_(True)

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
        """Decoders come without one, and cannot find the last token of a padded text: theirs becomes the EOS token."""
        if self.model.config.pad_token_id is None and self.tokenizer is not None:
            self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total = self.trainer.estimated_stepping_batches
        factor = warmup_then(self.schedule, total_steps=total, warmup_steps=self._warmup_steps(total))
        optimizer = torch.optim.AdamW(
            decay_groups(self.parameters(), self.weight_decay), lr=self.learning_rate, fused=self._can_fuse()
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _warmup_steps(self, total: float) -> int:
        if self.warmup > 0 and total == float("inf"):
            raise ValueError(
                f"warmup={self.warmup} is a share of a training that has no end: set Trainer(max_epochs=...) or "
                "Trainer(max_steps=...), or warmup=0"
            )
        return round(self.warmup * total) if self.warmup > 0 else 0

    def _can_fuse(self) -> bool:
        # Fused optimisers unscale fp16 gradients inside step(), too late for clipping; Lightning refuses the pair.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        clips = bool(self.trainer.gradient_clip_val)
        return self.device.type in ("cpu", "cuda", "mps", "xpu") and not (scaled and clips)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # LightningCLI lays a checkpoint's hyper-parameters over the command line: `--model.learning_rate` would be
        # ignored when resuming. They travel under a key of our own.
        checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_KEY, None)
        checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_NAME, None)
        checkpoint[_KEY] = {
            "class": type(self).__name__,
            "arguments": self._arguments,
            "config": self.model.config.to_json_string(use_diff=False),
            "tokenizer": self._tokenizer_files,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if _KEY not in checkpoint:
            return
        stored, now = json.loads(checkpoint[_KEY]["config"]), self.model.config
        labels = {int(index): name for index, name in stored["id2label"].items()}
        if (labels, stored["problem_type"]) != (now.id2label, now.problem_type):
            raise ValueError(
                f"the checkpoint was trained with labels {list(labels.values())} ({stored['problem_type']}), and this "
                f"module has {list(now.id2label.values())} ({now.problem_type}): give labels=[...] in the checkpoint's "
                "order, to the data module where labels come from the data"
            )

    @cached_property
    def _tokenizer_files(self) -> dict[str, torch.Tensor]:
        if self.tokenizer is None:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            # As tensors: a weights-only checkpoint holds no bytes, and sentencepiece models are no text.
            contents = {path.relative_to(folder).as_posix(): bytearray(path.read_bytes()) for path in files}
            return {name: torch.frombuffer(data, dtype=torch.uint8) for name, data in contents.items() if data}

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
        stored = checkpoint[_KEY]
        if stored["class"] != cls.__name__:
            raise ValueError(f"{checkpoint_path} holds a {stored['class']}, not a {cls.__name__}")
        module = cls(_stored_architecture(stored), **stored["arguments"])
        module.load_state_dict(checkpoint["state_dict"])
        return module.to(map_location)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face folder (safetensors, configuration, tokenizer) that the Auto classes open."""
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint that one of our modules wrote, without running any code in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint of a lightning_ft module.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if _KEY not in checkpoint:
        raise ValueError(
            f"{path} was not written by a lightning_ft module (it has the keys {sorted(checkpoint)}): load it with the "
            "LightningModule class that wrote it"
        )
    return checkpoint


def _stored_architecture(stored: Mapping[str, Any]) -> Architecture:
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(stored["config"], encoding="utf-8")
        root = Path(folder).resolve()
        for name, content in stored["tokenizer"].items():
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                raise ValueError(f"the checkpoint names a tokenizer file {name!r} outside its folder: do not trust it")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.numpy().tobytes())
        config = json.loads(stored["config"])
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if stored["tokenizer"] else None
        return Architecture(AutoConfig.for_model(**config), tokenizer)


def _load(
    model_class: Any,
    pretrained: str | os.PathLike[str] | Architecture,
    config_updates: Mapping[str, Any],
    *,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> PreTrainedModel:
    from transformers import AutoConfig

    if isinstance(pretrained, Architecture):
        config = copy.deepcopy(pretrained.config)
        for name, value in config_updates.items():
            setattr(config, name, value)
        model: PreTrainedModel = model_class.from_config(config, dtype=torch.float32)
        return model
    config = AutoConfig.from_pretrained(pretrained, trust_remote_code=trust_remote_code, **config_updates)
    try:
        model = model_class.from_pretrained(
            pretrained,
            config=config,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
            # A head for another number of labels is a new head.
            ignore_mismatched_sizes=True,
        )
    except OSError as error:
        if allow_pickle:
            raise
        raise OSError(
            f"pretrained={os.fspath(pretrained)!r} could not be loaded from safetensors. If it holds pickle weights "
            "alone and you trust them, pass allow_pickle=True"
        ) from error
    return model


def _plain(value: Any) -> Any:
    """A value that a weights-only checkpoint may hold; an architecture is stored apart."""
    if isinstance(value, Architecture):
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's and torch's arrays and scalars
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def load_checkpoint(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> TransformerModule:
    """The module that a checkpoint holds, of whichever head.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint of a lightning_ft module.
    """
    from lightning_ft import modules

    name = read_checkpoint(path)[_KEY]["class"]
    head = getattr(modules, name, None)
    if not (isinstance(head, type) and issubclass(head, TransformerModule)):
        raise ValueError(f"{path} holds a {name}, which this version of lightning_ft does not have")
    return head.load_from_checkpoint(path, map_location)
