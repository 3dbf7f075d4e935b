"""What enters the head of a module that we have never seen, batch by batch, with nothing left behind."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ft.core.undisturbed import eval_mode, same_randomness

Labels = int | str | Callable[[Any], Any]
IGNORED = -100
"""The label of positions that have none, as in transformers."""


class HeadInputs:
    """The input of a linear layer in a module's own steps, which are broken off there.

    The steps run in eval mode, without gradients and uncompiled, up to the layer: no loss, no backward pass, no metric
    and no log comes of them. Where the layer gives logits for every position they run on to the outermost module around
    it that the LightningModule calls: the model may pick one position (a decoder's last token), and its output tells
    which.

    Args:
        trainer: The trainer, in a fit.
        module: Its module.
        path: Path of the linear layer.
        labels: Where the labels of a batch are: see :class:`LPFT`.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, path: str, labels: Labels) -> None:
        self.trainer = trainer
        self.module = module
        self.path = path
        self.labels = labels
        self._run = _Run(torch.empty(0))

    def collect(self, loader: Iterable[Any], step: str, limit: float) -> tuple[Tensor, Tensor]:
        """Inputs of the layer, fp32, ``(rows, features)``, and labels, on the CPU, of a loader's first batches.

        Args:
            loader: The loader; where it stands, and every random state, is as before afterwards.
            step: Name of the module's method that runs on its batches.
            limit: How many batches; may be infinite.

        Raises:
            ValueError: Labels or rows are not to be found, or there is no batch.
        """
        inputs, targets = [], []
        with _undisturbed(self.module, loader), self._hooks():
            batches: Iterator[Any] = iter(loader)
            for index, raw in enumerate(batches if limit == float("inf") else itertools.islice(batches, int(limit))):
                batch = self.trainer.strategy.batch_to_device(raw, dataloader_idx=0)
                features, labels = self._of(self.trainer.precision_plugin.convert_input(batch), step, index)
                inputs.append(features)
                targets.append(labels)
        if not inputs:
            raise ValueError(f"LPFT: the data loader for {step} gave no batch")
        return torch.cat(inputs), torch.cat(targets)

    def _of(self, batch: Any, step: str, index: int) -> tuple[Tensor, Tensor]:
        run = self._run = _Run(find_labels(batch, self.labels))
        method = getattr(self.module, step)
        with contextlib.suppress(_Seen), self.trainer.precision_plugin.forward_context():
            method(*(batch, index)[: _arguments(method)])
        if run.rows is None:
            raise ValueError(self._why(run, step))
        features, targets = run.rows.detach().float().cpu(), run.targets.cpu()
        if features.ndim > 2:
            features, targets = features.flatten(0, -2), targets.flatten()
        if targets.ndim == 1 and not targets.is_floating_point():
            features, targets = features[targets != IGNORED], targets[targets != IGNORED]
        return features, targets

    def _why(self, run: _Run, step: str) -> str:
        if run.input is None:
            return f"LPFT: {step} never ran {self.path!r}: name the layer that gives the logits, head=..."
        return (
            f"LPFT: what enters {self.path!r} has the shape {tuple(run.input.shape)} and the labels have "
            f"{tuple(run.targets.shape)}: a head is probed where each label has one vector, or where the output of a "
            "module around it shows which position was taken. Check labels= and head="
        )

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        parts = self.path.split(".")
        layer, *around = (self.module.get_submodule(".".join(parts[:i])) for i in range(len(parts), 0, -1))

        def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
            self._run.enter(args[0] if args else kwargs["input"])

        def after(layer: nn.Module, args: Any, output: Tensor) -> None:
            self._run.leave(output, last=not around)

        def outer(module: nn.Module, args: Any, output: Any) -> None:
            self._run.look(output, last=module is around[-1])

        handles = [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
            *(module.register_forward_hook(outer) for module in around),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Seen(BaseException):
    """Ends a step when the head's input is known. No ``except Exception`` of the step may stop it."""


class _Run:
    """One step on one batch: what was seen of it, until ``rows``, a vector for each label, are known."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.rows: Tensor | None = None

    def enter(self, features: Tensor) -> None:
        self.input = features
        if features.ndim == 2:
            self._end(positions=True)

    def leave(self, output: Tensor, *, last: bool) -> None:
        self.output = output
        if last:
            self._end(positions=True)

    def look(self, output: Any, *, last: bool) -> None:
        if self.input is None or self.output is None:
            return
        if self.input.ndim == 3:
            for logits in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
                if isinstance(logits, Tensor) and logits.shape == (len(self.targets), self.output.shape[-1]):
                    self._pick(logits)
        if last:
            self._end(positions=True)

    def _pick(self, logits: Tensor) -> None:
        assert self.input is not None
        assert self.output is not None
        same = (self.output == logits[:, None].to(self.output.dtype)).all(-1)
        if same.any(1).all():
            self.rows = self.input[torch.arange(len(same), device=same.device), same.int().argmax(1)]
            self._end(positions=False)

    def _end(self, *, positions: bool) -> None:
        if positions and self.input is not None:
            shape = self.input.shape[:-1]
            self.rows = self.input if self.targets.shape[: len(shape)] == shape else None
        raise _Seen


def find_labels(batch: Any, labels: Labels) -> Tensor:
    """The labels of a batch.

    Raises:
        ValueError: They are not where ``labels`` says.
    """
    remedy = (
        'name their key (labels="labels") or position (labels=1) in a batch, or give a function that takes the batch '
        "and returns them"
    )
    if callable(labels):
        found = labels(batch)
    else:
        try:
            found = batch[labels]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"labels={labels!r} is not in the batches, which are {_shape(batch)}: {remedy}") from error
    try:
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(found).__name__
        raise ValueError(f"labels={labels!r} gave a {kind} of no numbers: {remedy}") from error


def _shape(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"mappings with the keys {', '.join(map(str, batch))}"
    name = type(batch).__name__
    return f"{name}s of {len(batch)}" if isinstance(batch, list | tuple) else f"of type {name}"


def _arguments(step: Callable[..., Any]) -> int:
    parameters = inspect.signature(step).parameters.values()
    return 2 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(parameters)


@contextlib.contextmanager
def _undisturbed(module: LightningModule, loader: Any) -> Iterator[None]:
    """Eval mode, no gradients, no compilation; afterwards every mode, flag, random state and position is as before."""
    flags = [(p, p.requires_grad) for p in module.parameters()]  # a step may toggle them
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    # Workers that persist, and loaders that tell their position, keep their iterator, and the fit has made its own.
    iterator = getattr(loader, "_iterator", None)
    try:
        if iterator is not None:
            loader._iterator = None
        with (
            torch.no_grad(),
            eval_mode(module.modules()),
            same_randomness(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for generator, state in states:
            generator.set_state(state)
        if hasattr(loader, "_iterator"):
            loader._iterator = iterator


def _generators(loader: Any) -> list[torch.Generator]:
    """A loader's own, in itself, its data set and its samplers."""
    holders = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))]
    holders += [getattr(holder, "sampler", None) for holder in holders]
    found = [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]
    return list({id(value): value for value in found if isinstance(value, torch.Generator)}.values())
