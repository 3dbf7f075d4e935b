"""One run of a model observed: which modules ran, on what; and runs that are changed for a while or left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_MISSING = object()


@dataclass(frozen=True)
class Event:
    """A module was entered (``values`` are its arguments) or left (``values`` is its output)."""

    module: nn.Module
    entered: bool
    values: Any


def trace(module: nn.Module, kwargs: Mapping[str, Any]) -> tuple[list[Event], Any]:
    """Run a module; return what its submodules took and gave, in order, and its own output."""
    events: list[Event] = []

    def enter(child: nn.Module, args: Any, kwargs: Any) -> None:
        events.append(Event(child, True, (args, kwargs)))

    def leave(child: nn.Module, args: Any, output: Any) -> None:
        events.append(Event(child, False, output))

    handles = [child.register_forward_pre_hook(enter, with_kwargs=True) for child in module.modules()]
    handles += [child.register_forward_hook(leave) for child in module.modules()]
    try:
        return events, module(**kwargs)
    finally:
        for handle in handles:
            handle.remove()


class _Caught(Exception):  # noqa: N818 - nothing failed
    pass


def run_until(module: nn.Module, kwargs: Mapping[str, Any], stop: nn.Module, *, output: bool) -> Any:
    """Run a module no further than to ``stop``, and return the output of that one, or its arguments.

    Args:
        module: What is run.
        kwargs: Its arguments.
        stop: A module inside.
        output: Whether to run ``stop`` and return its output, or to return its arguments ``(args, kwargs)``.
    """
    caught: list[Any] = []

    def take(value: Any) -> None:
        caught.append(value)
        raise _Caught

    handle = (
        stop.register_forward_hook(lambda module, args, out: take(out))
        if output
        else stop.register_forward_pre_hook(lambda module, args, kwargs: take((args, kwargs)), with_kwargs=True)
    )
    try:
        module(**kwargs)
    except _Caught:
        return caught[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(stop).__name__} was not called in a forward pass of {type(module).__name__}")


@contextmanager
def apart() -> Iterator[None]:
    """A run beside the one that is under way: no gradients, and autocast forgets the weights that it cast in it.

    Autocast would else hand the copies, cast without gradients, to the real run: what trains would get no gradient.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


class Forwards:
    """Replaces the ``forward`` of single modules, in the instances: classes and the module tree stay as they are."""

    def __init__(self) -> None:
        self._saved: list[tuple[nn.Module, Any]] = []

    def replace(self, forwards: Mapping[nn.Module, Callable[..., Any]]) -> None:
        """Call once before :meth:`restore`."""
        for module, forward in forwards.items():
            self._saved.append((module, vars(module).get("forward", _MISSING)))
            vars(module)["forward"] = forward

    def restore(self) -> None:
        """Put back what was there."""
        for module, saved in reversed(self._saved):
            if saved is _MISSING:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = saved
        self._saved.clear()


class Stand:
    """What a skipped module gives in place of its output: the same structure and shape, made of NaN.

    Nothing may use it; what does shows at once.

    Args:
        output: An output of the module.
        rows, length: Sizes of the batch that it came from; they must differ from each other.

    Raises:
        ValueError: The output is more than tensors of one row for each row of the batch, in tuples and lists.
    """

    def __init__(self, output: Any, rows: int, length: int) -> None:
        self._build = self._plan(output, rows, length)

    def _plan(self, output: Any, rows: int, length: int) -> Callable[[int, int], Any]:
        if output is None:
            return lambda rows, length: None
        if isinstance(output, Tensor) and output.is_floating_point() and output.shape[:-1] in ((rows,), (rows, length)):
            width, wide = output.shape[-1], output.ndim == 3
            like = torch.full((), float("nan"), dtype=output.dtype, device=output.device)
            return lambda rows, length: like.expand(rows, length, width) if wide else like.expand(rows, width)
        if type(output) in (tuple, list):
            parts, kind = [self._plan(part, rows, length) for part in output], type(output)
            return lambda rows, length: kind(part(rows, length) for part in parts)
        raise ValueError(f"{type(output).__name__} cannot be stood in for")

    def __call__(self, rows: int, length: int) -> Any:
        """The placeholder for a batch of other sizes."""
        return self._build(rows, length)


def as_forward(value: Callable[[], Any]) -> Callable[..., Any]:
    """A ``forward`` that takes anything and returns what ``value`` gives."""
    return partial(_ignore_arguments, value)


def _ignore_arguments(value: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
    return value()


def float_tensors(values: Any) -> Iterator[Tensor]:
    """The floating-point tensors in tuples, lists and mappings, in order."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, (tuple, list, Mapping)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from float_tensors(value)
