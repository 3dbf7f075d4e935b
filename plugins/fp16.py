"""fp16 training whose skipped steps are told, explained, and not counted by the schedule."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional.overflow import ForwardWatch, OverflowLog, find_overflow

_HALF = (torch.float16, torch.bfloat16)


class FP16(MixedPrecision):
    """fp16 autocast over fp32 weights with a dynamic loss scale, in place of ``precision="16-mixed"``.

    The loss is multiplied by a scale S before backward, and gradients by 1/S after it. If one is inf or nan the step is
    skipped and S halved; after ``growth_interval`` steps without, S is doubled. What this adds to Lightning's own:

    - *Which layer.* At a skipped step, and only then, the gradients are searched, before clipping turns all of them to
      nan: the topmost layer with inf or nan began it. Where the loss itself was not finite the forward pass did, and
      the next one is watched for the first module with such an output. :attr:`report` tells it all when the fit ends;
      a warning comes when steps are skipped at the lowest scale, or three in a row for a loss of inf or nan.
    - *Schedulers wait.* A scheduler of ``interval: step`` advances only if the optimiser stepped since it last did,
      whatever the module's ``lr_scheduler_step`` does. Metric-driven and epoch-wise ones, and those that a module steps
      by hand (manual optimisation; see :attr:`skipped`), are left alone. ``trainer.global_step`` still counts tries.
    - *Fused optimisers* get unscaled gradients like all others, so that ``gradient_clip_val`` works with them, and what
      penalties (L2SP, EWC) add in ``on_before_optimizer_step`` is to scale.

    As with every optimiser that is not fused under Lightning's plugin, one value is read from the device a step.
    Gradients that overflowed are never repaired. All ranks of DDP skip together, since reduced gradients share their
    inf. The scale, the report and the schedulers' count are in checkpoints; the scale of one that Lightning's plugin
    wrote is taken over. For ``lightning.pytorch``, not for ``pytorch_lightning``.

    Args:
        init_scale: S at the start; 65,536 is torch's.
        growth_interval: Steps without overflow after which S is doubled.
        min_scale: S never falls below it: a gradient that overflows at 1 does so without scaling.
        layers: Where the blocks and the head are, for the report, if they are not found by themselves.

    Attributes:
        skipped: Whether the last step was skipped.
        unscales_fused: For what adds to gradients: those of fused optimisers are unscaled as well.

    Raises:
        ValueError: An argument is out of range; weights that train are fp16 or bf16: small updates of them are lost,
            and Adam's ε = 1e-8 is zero in fp16.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[FP16()], accelerator="cpu", logger=False)
        >>> trainer.precision
        '16-mixed'

    Reference:
        Micikevicius et al. 2018, "Mixed Precision Training".
    """

    unscales_fused = True

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
        *,
        min_scale: float = 1.0,
        layers: Layers | None = None,
    ) -> None:
        if not 0 < min_scale <= init_scale:
            raise ValueError(f"min_scale={min_scale!r} must be above 0, and at most init_scale={init_scale!r}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval={growth_interval!r} must be 1 step or more")
        self.init_scale, self.growth_interval, self.min_scale = float(init_scale), growth_interval, float(min_scale)
        self.layers = layers or Layers()
        super().__init__("16-mixed", "cpu", self._new_scaler("cpu"))
        self._connected: weakref.ref[Optimizer] | None = None
        self._forget()

    def _new_scaler(self, device: str) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device, init_scale=self.init_scale, growth_interval=self.growth_interval)

    def _forget(self) -> None:
        self.skipped = False
        self._log = OverflowLog()
        self._loss: Tensor | None = None
        self._watch: ForwardWatch | None = None
        self._warned = False
        self._updates = 0
        self._advanced_at: list[int] = []
        self._module: LightningModule | None = None
        self._fitted = False

    @override
    def connect(self, model: Any, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        self.device = next((p.device.type for p in model.parameters()), "cpu")
        # A validation after the fit connects the optimisers of that fit once more.
        if optimizers and (self._connected is None or self._connected() is not optimizers[0]):
            self._connected = weakref.ref(optimizers[0])
            _refuse_half(model, optimizers)
            self._forget()
            self.scaler = self._new_scaler(self.device)
            self._advanced_at = [0] * len(lr_schedulers)
        return super().connect(model, optimizers, lr_schedulers)

    @property
    def report(self) -> Report:
        """How many steps were skipped, and which layers made it so. Waits for the device."""
        return self._log.report(self._scale())

    def _scale(self) -> float:
        assert self.scaler is not None
        return float(self.scaler.get_scale())

    @override
    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        with super().train_step_context():
            if self._watch is None or self._module is None:
                yield
            else:
                with self._watch.on(self._module):
                    yield

    @override
    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        # One sum over the micro-batches of a step: inf and nan never leave it.
        loss = tensor.detach().float().sum()
        self._loss = loss if self._loss is None else self._loss + loss
        return super().pre_backward(tensor, module)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if isinstance(optimizer, LBFGS):
            raise ValueError("FP16 cannot scale the losses of LBFGS, which runs backward several times in a step")
        assert self.scaler is not None
        self._hold_schedulers(model)
        result = closure()
        # Without a loss there is nothing to unscale, and Lightning makes no step.
        empty = result is None and model.automatic_optimization
        checked = False if empty else self._unscale(optimizer)
        self.skipped = checked and self._overflowed(optimizer)
        if self.skipped:
            self._tell(model, optimizer)
        self._loss = None
        self._after_closure(model, optimizer)
        if not self.skipped:
            self._updates += 1
            if not empty:
                self._log.stepped()
                # Not scaler.step: it would wait for the device a second time, and fused optimisers would step at once.
                result = optimizer.step(**kwargs)
        if checked:
            self.scaler.update()
            if self.skipped and self._scale() < self.min_scale:
                self.scaler.update(self.min_scale)
        return result

    def _unscale(self, optimizer: Optimizer) -> bool:
        assert self.scaler is not None
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            return False
        self.scaler.unscale_(optimizer)
        self._fitted = True
        return True

    def _overflowed(self, optimizer: Optimizer) -> bool:
        assert self.scaler is not None
        # The scaler's own flags: under FSDP2 they are those of all processes.
        flags = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        return any(flag.item() for flag in flags.values())

    def _tell(self, module: LightningModule, optimizer: Optimizer) -> None:
        scale = self._scale()
        own = [p for group in optimizer.param_groups for p in group["params"]]
        found = find_overflow(module, own, layers=self.layers)
        forward = self._loss is not None and not bool(self._loss.isfinite())
        source = self._watch.first() if self._watch is not None else None
        self._watch = ForwardWatch() if forward else None
        layers = found.layers if found is not None else {}
        began = found.began if found is not None else "(another process)"
        if forward:
            began = f"forward pass: {source}" if source else "forward pass"
        self._log.overflowed(scale, layers, began=began, forward=forward)
        if (scale <= self.min_scale or self._log.in_forward >= 3) and not self._warned:
            self._warned = True
            where = f"the {began}" if forward else f"{began} ({layers.get(began, 'no gradient here')})"
            cause = "the loss is inf or nan" if forward else f"gradients overflow even at loss scale {scale:g}"
            rank_zero_warn(
                f"FP16: {cause}, and {self._log.in_a_row} steps in a row were skipped. It begins in {where}. "
                'Use precision="bf16-mixed" if the hardware has it; else compute that layer in fp32 '
                "(torch.autocast(device, enabled=False)), lower the learning rate, or look there for a logarithm or a "
                "division of zero"
            )

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        # Lightning's refuses fused optimisers, whose gradients it leaves scaled.
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)

    def _hold_schedulers(self, module: LightningModule) -> None:
        if self._module is not None or not module.automatic_optimization:
            self._module = module
            return
        self._module = module
        advance = module.lr_scheduler_step
        configs = module.trainer.lr_scheduler_configs

        # A function, which copies of the module share: a bound method would take this plugin along.
        def advance_after_a_step(scheduler: Any, metric: Any) -> None:
            for i, config in enumerate(configs):
                if config.scheduler is scheduler and config.interval == "step" and not config.reduce_on_plateau:
                    if self._advanced_at[i] == self._updates:
                        return
                    self._advanced_at[i] = self._updates
            advance(scheduler, metric)

        vars(module)["lr_scheduler_step"] = advance_after_a_step

    @override
    def teardown(self) -> None:
        if self._module is not None:
            vars(self._module).pop("lr_scheduler_step", None)
        self._module = self._watch = self._loss = None
        if self._fitted:
            self._fitted = False
            rank_zero_info(str(self.report))
        super().teardown()

    @override
    def state_dict(self) -> dict[str, Any]:
        counts = {"updates": self._updates, "advanced_at": list(self._advanced_at)}
        return {"scaler": super().state_dict(), "log": self._log.state(), **counts}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["scaler"])
        self._log.load(state_dict["log"])
        self._updates = state_dict["updates"]
        self._advanced_at = list(state_dict["advanced_at"])

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        lightnings = checkpoint.get(MixedPrecision.__qualname__)
        if lightnings and type(self).__qualname__ not in checkpoint:
            super().load_state_dict(lightnings)


def _refuse_half(model: Any, optimizers: list[Optimizer]) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.requires_grad and p.dtype in _HALF:
                raise ValueError(
                    f"FP16 trains fp32 weights under autocast, and {names.get(id(p), 'a parameter')} is {p.dtype}: "
                    "updates below its last place would be lost, and the gradients cannot be unscaled. Load the model "
                    "in fp32 (dtype=torch.float32, or .float()); what is frozen may stay in half precision"
                )
