"""A mean of a module's weights, kept beside them, that can take their place for a while."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.core.sharding import is_piece, local, plain_name


class WeightAverage:
    """Means of the floating-point parameters that the optimisers hold, in fp32 (fp64 for fp64).

    What no optimiser holds never changes, and buffers have no mean: both stay as they are. Of sharded parameters
    (FSDP2) each process averages its own part.

    Args:
        trainer: The trainer, when its optimisers exist.
        module: The module.
    """

    def __init__(self, trainer: Trainer, module: nn.Module) -> None:
        self._module = module
        held = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter in held and parameter.is_floating_point():
                names.setdefault(parameter, []).append(plain_name(name))
        self.names = list(names.values())
        """The names of each parameter: a tied one has several."""
        self.parameters = list(names)
        self.mean: list[Tensor] | None = None
        self._raw: list[Tensor] | None = None

    def locals(self) -> list[Tensor]:
        """This process's part of each parameter, as it is now."""
        with torch.no_grad():
            return [local(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def update(self, weight: float, values: Sequence[Tensor] | None = None, members: Iterable[int] = ()) -> None:
        """mean ← mean + ``weight`` (θ − mean), in one fused pass.

        Args:
            weight: In (0, 1]; 1 copies.
            values: θ, in the order of the parameters; by default the module's.
            members: Which parameters; by default all.
        """
        values = self.locals() if values is None else values
        if self.mean is None:
            self.mean = [value.detach().to(_wide(value), copy=True) for value in values]
            if weight == 1:
                return
        indices = list(members) or range(len(values))
        means = [self.mean[i] for i in indices]
        if means:
            torch._foreach_lerp_(means, [values[i].to(self.mean[i]) for i in indices], weight)

    @property
    def is_in(self) -> bool:
        """Whether the module holds the mean."""
        return self._raw is not None

    @torch.no_grad()
    def put_in(self) -> None:
        """Let the module hold the mean."""
        assert self.mean is not None
        assert self._raw is None
        present = self.locals()
        self._raw = [value.clone() for value in present]
        self._write(self.mean)

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the module hold the weights that it trains, again."""
        if self._raw is not None:
            self._write(self._raw)
            self._raw = None

    def _write(self, values: Sequence[Tensor]) -> None:
        for present, value in zip(self.locals(), values, strict=True):
            # What is as it was keeps its version: caches of what frozen layers compute live on.
            if not torch.equal(present, value := value.to(present)):
                present.copy_(value)
        for child in self._module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()  # whole copies that the last forward pass left hold the old values

    # ---- checkpoints

    def whole(self, values: Sequence[Tensor], *, copy: bool = False) -> dict[str, Tensor]:
        """By name, gathered from all processes, all of which must call this."""
        result = {}
        for names, parameter, value in zip(self.names, self.parameters, values, strict=True):
            gathered = _whole(parameter, value.detach())
            result[names[0]] = gathered.to("cpu", copy=True) if copy else gathered
        return result

    def state(self, *, copy: bool = False) -> dict[str, Any]:
        """The mean and the weights that train, in types that a weights-only load admits.

        They share memory with the module unless ``copy``, so that a file holds each value once.
        """
        raw = self._raw if self._raw is not None else self.locals()
        mean = None if self.mean is None else self.whole(self.mean, copy=copy)
        return {"mean": mean, "raw": None if mean is None else self.whole(raw, copy=copy)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Take over the mean, and put the weights that train into the module: a checkpoint's may be the mean.

        Raises:
            ValueError: The mean is of other parameters.
        """
        if state["mean"] is None:
            return
        self.mean = [mean.to(_wide(mean), copy=True) for mean in self.parts(state["mean"])]
        self._write(self.parts(state["raw"]))

    def parts(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """This process's part of whole tensors.

        Raises:
            ValueError: They are other parameters.
        """
        known = {names[0]: p.shape for names, p in zip(self.names, self.parameters, strict=True)}
        if known != {name: tensor.shape for name, tensor in whole.items()}:
            raise ValueError(
                f"the checkpoint holds a mean of {len(whole)} weights, and the optimisers hold {len(known)} here, "
                "with other names or shapes: resume with the module and the optimisers that the run began with"
            )
        return [_part(p, whole[names[0]]) for names, p in zip(self.names, self.parameters, strict=True)]

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Put the mean in the place of the weights in a checkpoint. Call on all processes."""
        if self.mean is None or self._raw is not None:
            return
        state = checkpoint["state_dict"]
        for names, parameter, mean in zip(self.names, self.parameters, self.mean, strict=True):
            gathered: Tensor | None = None
            for name in names:
                if hasattr(state.get(name), "placements"):
                    state[name] = _sharded(parameter, mean.to(state[name].dtype))
                    continue
                gathered = _whole(parameter, mean) if gathered is None else gathered
                if name in state:  # of a gathered checkpoint rank 0 has it
                    state[name] = gathered.to(state[name])


class CheckpointWriter:
    """Calls ``write`` on every checkpoint that is written, weights-only ones among them.

    Lightning asks callbacks about a full checkpoint only, and the module about each: its hook is stood in for.
    """

    def __init__(self, module: LightningModule, write: Any) -> None:
        self._module = module
        original = module.on_save_checkpoint

        def hook(checkpoint: dict[str, Any]) -> None:
            write(checkpoint)
            original(checkpoint)

        self._before = vars(module).get("on_save_checkpoint")
        vars(module)["on_save_checkpoint"] = hook

    def remove(self) -> None:
        """Leave the module as it was."""
        vars(self._module).pop("on_save_checkpoint", None)
        if self._before is not None:
            vars(self._module)["on_save_checkpoint"] = self._before


def check_averaging(trainer: Trainer, module: nn.Module, callback: Callback) -> None:
    """Call in ``on_fit_start``.

    Raises:
        ValueError: DeepSpeed, FSDP1, or two callbacks that average weights.
    """
    refuse_deepspeed(trainer, callback)
    name = type(callback).__name__
    if any(is_piece(parameter) for parameter in module.parameters()):
        raise ValueError(
            f"{name} does not run under FullyShardedDataParallel (FSDP1), whose pieces do not tell their place in the "
            "whole: use FSDP2, that is Trainer(strategy=ModelParallelStrategy()) and fully_shard in configure_model"
        )
    known = ("CheckpointAverage", "EMA", "WeightAveraging", "StochasticWeightAveraging")
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averaging = [c for c in callbacks if any(k.__name__ in known for k in type(c).__mro__)]
    if len(averaging) > 1:
        raise ValueError(
            f"{' and '.join(type(c).__name__ for c in averaging)} would both put their means in the place of the "
            "weights: keep one of them"
        )
    norms = [n for n, child in module.named_modules() if isinstance(getattr(child, "running_mean", None), Tensor)]
    if norms:
        rank_zero_warn(
            f"{name} averages weights, and the statistics of {norms[0]} and {len(norms) - 1} more are those of the "
            "weights that train, not of the mean: compute them anew on training batches after the fit "
            "(torch.optim.swa_utils.update_bn)"
        )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _sharded(parameter: Any, value: Tensor) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _whole(parameter: Tensor, value: Tensor) -> Tensor:
    """Sharded ones go to the CPU: the whole model may not fit anywhere else."""
    if not hasattr(parameter, "placements"):
        return value
    gathered: Tensor = _sharded(parameter, value).full_tensor().cpu()
    return gathered


def _part(parameter: Any, whole: Tensor) -> Tensor:
    if not hasattr(parameter, "placements"):
        return whole.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    device = local(parameter.detach()).device
    # Each process has the whole: nothing need be sent.
    placed = distribute_tensor(whole.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    part: Tensor = placed.to_local()
    return part
