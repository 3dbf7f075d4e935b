"""Bytes of a training step by part, from one that is taken without data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ft.core.undisturbed import same_randomness
from lightning_ft.functional.activation_checkpointing import CheckpointedBlocks
from lightning_ft.functional.activation_fit import fit_activations
from lightning_ft.functional.batch_shapes import example_batch, is_shapes
from lightning_ft.functional.live_memory import PARTS, LiveMemory, state_tensors

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
Step = Callable[[Any, Any], Any]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": None}


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a training step, by part: weights, gradients, optimiser, activations, workspace.

    Args:
        parts: The most that each part has at any moment.
        peak: What each part has when all together have the most.
        fit: Whether activations are extrapolated from small passes, and their workspace not known.
    """

    parts: Mapping[str, int]
    peak: Mapping[str, int]
    fit: bool = False

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())


def predict_memory_use(
    module: nn.Module,
    batch: Any,
    *,
    optimizer: Optimizer | MakeOptimizer | None = None,
    precision: Precision = "32-true",
    step: Step | None = None,
    checkpointed: Sequence[str] = (),
) -> MemoryUse:
    """Bytes that a training step takes, found by taking one with tensors that hold no data.

    A copy of the module, in which each weight is a shape, a type and a device, runs forward, backward and the
    optimiser's step. All storages are counted while they live. What is told is the second step, in which the optimiser
    has its states, and, in Lightning's order, the last gradients are freed after the forward pass. Nothing is
    allocated, and the module and the random generators are not touched. What is saved for backward is *activations*;
    what else comes and goes is *workspace*: temporaries, gradients of activations. Not in it: what an allocator rounds
    up and what lies unused between its blocks, libraries' own buffers, DDP's buckets (as much as the gradients again).

    Where a step cannot be taken without data (a value decides a shape), activations are fitted to small forward passes
    of the copy with data instead, see :func:`~lightning_ft.functional.activation_fit.fit_activations`.

    Args:
        module: A LightningModule, or any module with ``step``. Modes and ``requires_grad`` flags count as they are.
        batch: A batch, on any device; or shapes of token ids by name, such as ``{"input_ids": (8, 128)}``.
        optimizer: The optimiser of its parameters, or what makes one of parameters; AdamW by default. An own one is
            not stepped.
        precision: As the Trainer's.
        step: ``step(module, batch)`` gives the loss; a LightningModule's ``training_step`` by default.
        checkpointed: Paths of blocks as if they were under :class:`~lightning_ft.callbacks.ActivationCheckpointing`.

    Raises:
        ValueError: An argument is out of range; the step gives no loss; neither way of running it works; the module
            cannot be copied.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(10, 10)
        >>> use = predict_memory_use(net, {"x": (4, 10)}, step=lambda net, batch: net(batch["x"].float()).sum())
        >>> use.parts["weights"], use.parts["gradients"], use.parts["optimiser"]
        (440, 440, 888)
    """
    kind = _parse(precision)
    if step is None and not getattr(module, "automatic_optimization", hasattr(module, "training_step")):
        raise ValueError(
            f"step= is needed: {type(module).__name__} optimises by hand, or has no training_step. Pass "
            "step=lambda module, batch: loss"
        )
    run = _Run(module, optimizer, precision, kind, step or _training_step, checkpointed)
    try:
        return run.without_data(batch)
    except Exception as error:  # noqa: BLE001 - a stranger's step may do anything with a tensor that holds nothing
        first = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    try:
        return run.fitted(batch)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} could not take a step on tensors without data ({first}), nor a small one with "
            f"data ({type(error).__name__}: {str(error).partition(chr(10))[0]}): pass step= with one that can"
        ) from error


@dataclass(frozen=True)
class _Run:
    """What a prediction is of."""

    module: nn.Module
    optimizer: Optimizer | MakeOptimizer | None
    precision: str
    kind: torch.dtype | None
    step: Step
    checkpointed: Sequence[str]

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def without_data(self, batch: Any, *, forward: bool = True) -> MemoryUse:
        """A step of a copy without data; ``forward=False``: of the optimiser alone, on gradients out of nowhere."""
        fakes, memory = FakeTensorMode(allow_non_fake_inputs=True), LiveMemory()
        with fakes:
            memo: dict[int, Any] = {id(tensor): self._fake(tensor) for tensor in self._tensors() if _plain(tensor)}
        with _copies(partial(self._on, fakes)):
            twin = _copied(self.module, memo) if forward else None
        trained = [memo.get(id(p), p) for p in self.module.parameters() if p.requires_grad]
        with same_randomness(), torch.inference_mode(False), torch.enable_grad(), fakes, memory, _Readable():  # type: ignore[no-untyped-call]
            memory.tag((memo.get(id(t), t) for t in (*self.module.parameters(), *self.module.buffers())), "weights")
            optimizer = self._optimizer(trained, memo)
            memory.tag(state_tensors(optimizer.state), "optimiser")
            before = memory.live["optimiser"]
            phases = []
            if twin is not None:
                inputs = example_batch(batch, self.device)
                memory.reset()
                with _saved(memory):
                    loss = self._forward(twin, inputs)
                phases.append((memory.peak, memory.largest))
                memory.reset()
                with _tagging(trained, memory):
                    loss.backward()  # type: ignore[no-untyped-call]
                del loss
                phases.append((memory.peak, memory.largest))
            for parameter in trained if twin is None else ():
                parameter.grad = torch.empty_like(parameter)
                memory.tag([parameter.grad], "gradients")
            optimizer.step()
            memory.tag(state_tensors(optimizer.state), "optimiser")
            memory.reset()
            optimizer.step()
            phases.append((memory.peak, memory.largest))
        # From the second step on, states are there all the time, and the last gradients in the forward pass.
        states, gradients = memory.live["optimiser"] - before, memory.live["gradients"]
        for number, (peak, _) in enumerate(phases[:-1]):
            peak["optimiser"] += states
            peak["gradients"] += gradients if number == 0 else 0
        largest = {part: max(most[part] for _, most in phases) for part in PARTS}
        return MemoryUse(largest, max((peak for peak, _ in phases), key=lambda peak: sum(peak.values())))

    def fitted(self, batch: Any) -> MemoryUse:
        """Activations from small forward passes with data, all else from the optimiser's step without."""
        batch = example_batch(batch, self.device) if is_shapes(batch) else batch
        twin = _copied(self.module, {id(p): p for p in self.module.parameters()})
        own = (*twin.parameters(), *twin.buffers())
        with same_randomness(), torch.inference_mode(False), torch.enable_grad():
            kept = fit_activations(lambda part: self._forward(twin, part), batch, own)
        if self.kind is not None and self.precision.endswith("true"):
            kept = kept * self.kind.itemsize // torch.float32.itemsize
        use = self.without_data(None, forward=False)
        parts = {**use.parts, "activations": kept}
        # At the end of the forward pass gradients of the last step are still there.
        return MemoryUse(parts, max({**parts, "workspace": 0}, dict(use.peak), key=lambda p: sum(p.values())), fit=True)

    def _tensors(self) -> list[Tensor]:
        states = state_tensors(self.optimizer.state) if isinstance(self.optimizer, Optimizer) else ()
        return [*self.module.parameters(), *self.module.buffers(), *states]

    def _fake(self, tensor: Tensor) -> Any:
        halved = self.kind is not None and self.precision.endswith("true") and tensor.is_floating_point()
        dtype = self.kind if halved else tensor.dtype
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    def _on(self, fakes: FakeTensorMode, tensor: Tensor) -> Any:
        with fakes:
            return self._fake(tensor)

    def _optimizer(self, trained: list[nn.Parameter], memo: dict[int, Any]) -> Optimizer:
        if isinstance(self.optimizer, Optimizer):
            return copy.deepcopy(self.optimizer, dict(memo))
        return (self.optimizer or torch.optim.AdamW)(trained)

    def _forward(self, twin: nn.Module, batch: Any) -> Tensor:
        mixed = self.precision.endswith("mixed")
        autocast = torch.autocast(self.device.type, self.kind, cache_enabled=False) if mixed else nullcontext()
        blocks = CheckpointedBlocks([twin.get_submodule(path) for path in self.checkpointed])
        try:
            with autocast:
                return _loss(self.step(twin, batch))
        finally:
            blocks.remove()


def _plain(tensor: Tensor) -> bool:
    """Quantised weights are of classes of their own, and take part as they are."""
    return type(tensor) in (nn.Parameter, Tensor)


def _parse(precision: str) -> torch.dtype | None:
    width, _, mode = precision.partition("-")
    if width not in _DTYPES or mode not in ("true", "mixed") or precision == "32-mixed":
        choices = "32-true, bf16-mixed, 16-mixed, bf16-true, 16-true"
        raise ValueError(f"precision={precision!r} must be one of {choices}")
    return _DTYPES[width]


@contextmanager
def _copies(make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Tensors that are no weights (a hook's, a metric's) are copied without data as well."""
    original: Any = Tensor.__deepcopy__

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Any:
        if type(tensor) is not Tensor:
            return original(tensor, memo)
        return memo.setdefault(id(tensor), make(tensor))

    Tensor.__deepcopy__ = copied  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.__deepcopy__ = original  # type: ignore[method-assign]


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy with the tensors of ``memo``, of the same trainer, which logs nothing."""
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be copied, as a prediction needs it ({type(error).__name__}: {error})"
        ) from error
    for original, copied in zip(module.modules(), twin.modules(), strict=True):
        if "_trainer" in vars(original):
            # Copies of a LightningModule lose their trainer.
            vars(copied).update(_trainer=vars(original)["_trainer"], log=_ignore, log_dict=_ignore)
    return twin


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log``, which only a running loop has room for."""


def _training_step(module: Any, batch: Any) -> Any:
    return module.training_step(batch, 0)


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"the step must give a loss, a tensor or a mapping with one; it gave {type(output).__name__}")
    return loss


@contextmanager
def _saved(memory: LiveMemory) -> Iterator[None]:
    """What is saved for backward are activations, weights excepted."""

    def pack(tensor: Tensor) -> Tensor:
        memory.tag([tensor], "activations", only="workspace")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@contextmanager
def _tagging(parameters: Iterable[nn.Parameter], memory: LiveMemory) -> Iterator[None]:
    def tag(parameter: Tensor) -> None:
        if parameter.grad is not None:
            memory.tag([parameter.grad], "gradients")

    handles: list[Any] = [p.register_post_accumulate_grad_hook(tag) for p in parameters]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Readable(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets a step read numbers and flags that hold no data (``loss.item()``, ``if mask.all()``): 1.0 and False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default or args[0].dtype not in (torch.bool, torch.float):
                raise
            return args[0].dtype == torch.float and 1.0
