"""Mixout: put random input units back to their pretrained weights in training, instead of dropping them."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_ft.callbacks._anchoring import Anchoring, Named, pretrained_and_new, warn_without_head
from lightning_ft.callbacks._trainer import refuse_asleep, refuse_deepspeed, training_progress
from lightning_ft.core.anchor import Storage
from lightning_ft.core.layers import Layers
from lightning_ft.core.schedule import Duration
from lightning_ft.functional.mixed_layers import MixedLayers, linear_weights
from lightning_ft.functional.mixout import Per, check_mixout


class Mixout(Callback):
    """Mix the weights of linear layers with the pretrained ones: W̃ = [M⊙W + (1−M)⊙W⁰ − pW⁰] / (1−p).

    M ~ Bernoulli(1−p), one draw for all outgoing weights of an input unit, anew at each forward in train mode; the
    mean of W̃ is W, and in eval mode W itself is used. Dropout pulls weights towards zero; this pulls them towards W⁰
    the more, the farther they have gone. See :func:`lightning_ft.functional.mixout`.

    Mixed are the weights of linear layers outside the head that train (embeddings, biases, norms and output layers
    tied to an embedding are not): from ``on_fit_start``, when W⁰ is taken before any checkpoint is restored, to the end
    of the fit. The mixed weight exists only while its layer runs. The parameters stay plain: state dicts, checkpoints
    and saved folders hold W under its own name. Under DDP each process draws its own units.
    Under FSDP2 (ModelParallelStrategy) W⁰ is sharded as W is, and gathered at each forward of its layer.

    Gradients are 1/(1−p) times larger on kept units: look at ``gradient_clip_val`` again. The authors' code forgets
    this factor, and treats the head, too (with dropout); here the head is left alone.

    Mixout acts in train mode only, and models come from ``from_pretrained`` in eval mode: that is an error here.

    Args:
        p: Share of input units that are put back, in [0, 1): 0.7 to 0.9 in the paper, 0.1 in later work.
        per: ``"column"``, one draw an input unit, as published; ``"element"``, one a weight ("mixconnect").
        warmup: Over this stretch of training ``p`` rises from 0 in proportion: ``0.1``, ``"500 steps"``,
            ``"1 epochs"``. (A compiled model is compiled anew for each value: leave it out there.)
        dropout: Set the rate of all dropout modules of the pretrained part to this for the fit; the authors take 0, as
            Mixout replaces dropout. None leaves them. Rates that a model passes as plain numbers are its own matter.
        legacy_gradient: Reproduce the authors' gradient M instead of M/(1−p).
        layers: Where the head is, if it is not found by itself. It is left alone, and so are layers drawn anew
            (LayerReinit).
        storage: Where W⁰ is kept, see :class:`~lightning_ft.callbacks.L2SP`, with which it is shared. ``"cpu"`` and
            ``"disk"`` copy it to the device at each forward.

    Raises:
        ValueError: An argument is out of range; the pretrained weights are adapted by peft or quantised; nothing is
            there to mix; on resume, the model does not start from the same weights; FSDP1, DeepSpeed.
        RuntimeError: A layer to mix is in eval mode; none of the layers runs.

    Example:
        >>> Mixout(0.9, dropout=0.0).p
        0.9

    Reference:
        Lee, Cho and Kang 2020, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models".
    """

    def __init__(
        self,
        p: float = 0.7,
        *,
        per: Per = "column",
        warmup: float | str | None = None,
        dropout: float | None = None,
        legacy_gradient: bool = False,
        layers: Layers | None = None,
        storage: Storage | None = None,
    ) -> None:
        check_mixout(p, per)
        if dropout is not None and not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r} must be in [0, 1), or None to leave the model's own")
        self.p = p
        self.per = per
        self.warmup = None if warmup is None else Duration.parse(warmup, "warmup")
        self.dropout = dropout
        self.legacy_gradient = legacy_gradient
        self.layers = layers or Layers()
        self._anchoring = Anchoring(self, self._weights, storage)
        self._mixing: MixedLayers | None = None
        self._checked = False
        self._rates: list[tuple[nn.Module, str, float]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release()
            self._anchoring.watch(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._anchoring.restoring()

    def _weights(self, module: LightningModule) -> Named:
        _refuse_adapted(module)
        linear = {id(weight.parameter) for weight in linear_weights(module)}
        pretrained, _ = pretrained_and_new(self, module, self.layers)
        chosen = [(name, parameter) for name, parameter in pretrained if id(parameter) in linear]
        if not chosen:
            raise ValueError(
                f"Mixout found no linear layer that trains outside the head of {type(module).__name__}: it mixes the "
                "weights of nn.Linear, nn.MultiheadAttention and transformers' Conv1D"
            )
        return chosen

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        named = self._weights(pl_module)
        warn_without_head(self, pl_module, self.layers)
        references = self._anchoring.take(named).like(named)
        by_parameter = {id(p): reference for (_, p), reference in zip(named, references, strict=True)}
        chosen = {
            weight: by_parameter[id(weight.parameter)]
            for weight in linear_weights(pl_module)
            if id(weight.parameter) in by_parameter
        }
        self._checked = False
        if self.dropout is not None:
            self._set_dropout(pl_module, self.dropout)
        self._mixing = MixedLayers(chosen, self.p, per=self.per, legacy_gradient=self.legacy_gradient)

    def _set_dropout(self, module: LightningModule, rate: float) -> None:
        body, _ = pretrained_and_new(self, module, self.layers)
        wanted = {id(parameter) for _, parameter in body}
        paths = [name.split(".")[:-1] for name, p in module.named_parameters() if id(p) in wanted]
        common = takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
        backbone = module.get_submodule(".".join(level[0] for level in common))
        for child in backbone.modules():
            # nn.MultiheadAttention keeps its rate as a number.
            attribute = "dropout" if isinstance(child, nn.MultiheadAttention) else "p"
            if isinstance(child, nn.modules.dropout._DropoutNd | nn.MultiheadAttention):
                self._rates.append((child, attribute, getattr(child, attribute)))
                setattr(child, attribute, rate)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._anchoring.recheck(trainer)
        if self.warmup is not None:
            self.warmup.share(training_progress(trainer, 0))  # refuses a fraction of an endless training

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._checked = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._mixing is not None
        if not self._checked:  # here, since a resumed epoch has no start, and others freeze in theirs
            self._check_modes(pl_module)
        if self.warmup is not None:
            self._mixing.p = self.p * min(1.0, self.warmup.share(training_progress(trainer, batch_idx)))

    def _check_modes(self, module: LightningModule) -> None:
        assert self._mixing is not None
        asleep = [
            name for name, reader in module.named_modules() if not reader.training and self._mixing.trains(reader)
        ]
        refuse_asleep(self, asleep, "layers")
        self._checked = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._mixing is not None
        if self._mixing.p and not self._mixing.used and self._mixing.trains():
            raise RuntimeError(
                f"Mixout mixed no weight in a training batch: {type(pl_module).__name__} reads the weights of its "
                "linear layers without calling the layers"
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._mixing is not None:
            self._mixing.remove()
            self._mixing = None
        for module, attribute, rate in self._rates:
            setattr(module, attribute, rate)
        self._rates.clear()
        self._anchoring.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._anchoring.fingerprint}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._anchoring.fingerprint = state_dict["fingerprint"]


def _refuse_adapted(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if type(child).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{name} is an adapter of peft: the pretrained weights below it are frozen, so there is nothing to put "
                "back; use the adapter's own dropout (LoraConfig(lora_dropout=...)), or train all weights"
            )
        # A convolution's weight norm is none of its business.
        if parametrize.is_parametrized(child) and not isinstance(child, nn.modules.conv._ConvNd):
            raise ValueError(
                f"{name} has a weight that is computed ({type(child).__name__}; MovementPruning, weight norm), and "
                "Mixout mixes weights that are parameters: leave one of the two out"
            )
        weight = getattr(child, "weight", None)
        if isinstance(child, nn.Linear) and isinstance(weight, nn.Parameter) and not weight.is_floating_point():
            raise ValueError(
                f"{name} has quantised weights ({type(child).__name__}), which cannot be mixed: load the model without "
                "quantisation, or leave Mixout out"
            )
