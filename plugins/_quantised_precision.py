"""What the precision plugins of few bits share: when they quantise, and the precision in which the rest computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ft.core.layers import Layers, plain_layers
from lightning_ft.core.report import Report
from lightning_ft.functional.alterations import alter, altered
from lightning_ft.functional.quantise import quantised_layers, restore_quantised
from lightning_ft.functional.quantised_tensor import Format, import_bitsandbytes

Compute = Literal["32-true", "bf16-mixed", "16-mixed"]
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


class QuantisedPrecision(Precision):
    """Quantises the module once, and leaves all else to a precision plugin of Lightning.

    Args:
        form: How to pack.
        threshold: Of LLM.int8.
        compute: Precision of all that is not packed, or the plugin that decides on it.
        skip: Regular expressions on the paths of layers to leave alone.
        layers: Where the head is.

    Raises:
        ValueError: The precision is another one.
        ImportError: bitsandbytes is not installed.
    """

    def __init__(
        self,
        form: Format,
        *,
        threshold: float,
        compute: Compute | Precision,
        skip: str | Sequence[str],
        layers: Layers | None,
    ) -> None:
        import_bitsandbytes()
        name = compute.precision if isinstance(compute, Precision) else compute
        if name not in get_args(Compute):
            raise ValueError(
                f"compute={name!r} must be one of {', '.join(get_args(Compute))}, or a plugin of one of these: what "
                "trains beside the packed weights is kept in fp32"
            )
        self.precision: Any = name
        self._settings = {
            **asdict(form),
            "threshold": threshold,
            "skip": [skip] if isinstance(skip, str) else list(skip),
            "layers": plain_layers(layers),
        }
        self.report: Report | None = None
        self._module: Callable[[], nn.Module | None] = lambda: None
        self._inner = compute if isinstance(compute, Precision) else Precision()
        self._given = isinstance(compute, Precision)

    def quantise(self, module: nn.Module) -> Report:
        """Quantise a built module in place, if that was not done yet. Callbacks that change the model call this first.

        Raises:
            ValueError: See :func:`lightning_ft.functional.quantise.quantise`.
        """
        if not altered(module, "quantise", self._settings):
            if quantised_layers(module):
                raise ValueError(
                    f"{type(module).__name__} is quantised in another way already, and {type(self).__name__} would do "
                    f"it as {self._settings}: use the same plugin as before, or build the module anew"
                )
            self.report = alter(module, "quantise", self._settings)
            rank_zero_info(str(self.report))
        elif self.report is None:
            self.report = Report("Quantised before", {"layers": len(quantised_layers(module))})
        self._module = weakref.ref(module)
        return self.report

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, LightningModule)
        trainer = module.trainer
        strategy = next((k.__name__ for k in type(trainer.strategy).__mro__ if k.__name__ in _SHARDED), None)
        if strategy is not None:
            raise ValueError(
                f"{type(self).__name__} does not run under {strategy}, which shards float parameters: packed weights "
                "are whole on each device. Use DDP or one device"
            )
        if self.precision != "32-true" and not self._given:
            self._inner = MixedPrecision(self.precision, trainer.strategy.root_device.type)
            self._given = True
        self.quantise(module)
        if trainer.training and not any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"nothing trains: {type(self).__name__} froze all that {type(module).__name__} trained, as packed "
                "weights take no gradient. Add adapters (LoRA), or leave a head or biases trainable"
            )
        return self._inner.convert_module(module)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        module = self._module()
        if module is not None:
            restore_quantised(module, checkpoint.get("state_dict", {}))
        self._inner.on_load_checkpoint(checkpoint)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._inner.on_save_checkpoint(checkpoint)

    # ---- the rest is the other plugin's

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16, if there is one."""
        return getattr(self._inner, "scaler", None)

    @override
    def connect(self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> Any:
        return self._inner.connect(model, optimizers, lr_schedulers)

    @override
    def convert_input(self, data: Any) -> Any:
        return self._inner.convert_input(data)

    @override
    def convert_output(self, data: Any) -> Any:
        return self._inner.convert_output(data)

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        return self._inner.forward_context()

    @override
    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        return self._inner.pre_backward(tensor, module)

    @override
    def backward(self, tensor: Tensor, model: LightningModule, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self._inner.backward(tensor, model, *args, **kwargs)

    @override
    def post_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        return self._inner.post_backward(tensor, module)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        return self._inner.optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    @override
    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        self._inner.clip_gradients(*args, **kwargs)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict)

    @override
    def teardown(self) -> None:
        self._inner.teardown()
