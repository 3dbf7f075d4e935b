"""Hooks on the modules around a frozen prefix, there while one training batch runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_ft.functional.prefix_layout import PrefixLayout


class Hook:
    """A hook that copies of its module do not inherit: a weight average neither caches nor holds a cache."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(_nothing)


class PrefixHooks:
    """Knows which calls of modules above the owner are under way, and tells when the owner is entered and left.

    Args:
        layout: The modules.
        enter: Called with the arguments of the owner, ``(args, kwargs)``, before it runs.
        leave: Called when it has run, also with an error.
    """

    def __init__(self, layout: PrefixLayout, enter: Callable[[Any, Any], None], leave: Callable[[], None]) -> None:
        self._layout = layout
        self._enter, self._leave = enter, leave
        self.calls: list[tuple[nn.Module, Any, Any]] = []
        """Module, args and kwargs of the calls under way, outermost first."""
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Hook the modules; those of a batch before are removed."""
        self.remove()
        owner = self._layout.owner
        for module in self._layout.above:
            self._handles += [
                module.register_forward_pre_hook(Hook(self._push), with_kwargs=True),
                module.register_forward_hook(Hook(self._pop), always_call=True),
            ]
        self._handles += [
            owner.register_forward_pre_hook(Hook(self._entered), with_kwargs=True),
            owner.register_forward_hook(Hook(self._left), always_call=True),
        ]

    def attach_to(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Add a forward pre-hook, ``hook(module, args, kwargs)``."""
        self._handles.append(module.register_forward_pre_hook(Hook(hook), with_kwargs=True))

    def remove(self) -> None:
        """Leave nothing behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.calls.clear()

    def _push(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls.append((module, args, kwargs))

    def _pop(self, module: nn.Module, *_: Any) -> None:
        if self.calls and self.calls[-1][0] is module:
            self.calls.pop()

    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._enter(args, kwargs)

    def _left(self, *_: Any) -> None:
        self._leave()


def _nothing(*_: Any) -> None:
    return None
