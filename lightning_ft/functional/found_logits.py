"""The logits in a training step that we have never seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_ft.functional.perturbed_embeddings import CallStack, Hook

Logits = str | Callable[[Any], Any] | None
"""Where logits are: the path of a module that returns them, a key of what the model returns, or a function of that."""


class FoundLogits:
    """Hears what the model returns in each call that a step makes of it, and finds the logits in it.

    The model is the outermost module that the step calls and that embeds the tokens: often the LightningModule itself,
    by ``self(batch)``. Without further word its logits are ``logits`` in what it returns, else all that ends in
    ``_logits`` (start and end of an answer), else the tensor (or the tensors of one shape) that it returns where no
    parameter lies outside it, which could be a head that is still to come.

    Args:
        module: The LightningModule.
        calls: The calls under way in it.
        where: What else to look for: the path of a module (``"classifier"``) whose output they are; a key or an
            attribute of the model's output (``"scores"``, ``"answer.start"``, ``"1"``); or a function of it.

    Attributes:
        path: The module, where ``where`` names one.
        calls: Module and arguments of each call of the model in the first pass.
        logits: What was found since :meth:`begin`.
    """

    def __init__(self, module: nn.Module, calls: CallStack, where: Logits = None) -> None:
        self.where = where
        self.path: nn.Module | None = None
        self.calls: list[tuple[nn.Module, Any, Any]] = []
        self.logits: list[Tensor] = []
        self.enough: Callable[[], None] | None = None
        self._outputs: list[str] = []
        self._records = False
        self._active = False
        self._module = module
        self._whole: dict[nn.Module, bool] = {}
        self._handles: list[RemovableHandle] = []
        if isinstance(where, str) and where and where in dict(module.named_modules()):
            self.path = module.get_submodule(where)
            self._handles.append(self.path.register_forward_hook(Hook(self._hear)))
        else:
            calls.on_outermost = self._outermost

    def begin(self, *, record: bool) -> None:
        """Listen from now on; ``record`` the calls for a repetition."""
        self.logits, self._outputs, self._records, self._active = [], [], record, True
        if record:
            self.calls = []

    def end(self) -> None:
        """Listen no more."""
        self._active = False
        self.enough = None

    def take(self) -> list[Tensor]:
        """What was found.

        Raises:
            ValueError: Nothing was.
        """
        if not self.logits:
            said = f"logits={self.where!r} names none of it" if self.where is not None else "none has `logits`"
            raise ValueError(
                f"the logits are not found: the model returned {', '.join(self._outputs) or 'nothing'}, and {said}. "
                'Say where they are: logits="classifier", the path of the module that returns them; logits="scores", a '
                'key of what the model returns; or logits=lambda output: output["scores"]'
            )
        return self.logits

    def forget(self) -> None:
        """Let go of the batch and of its graphs."""
        self.calls, self.logits = [], []

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def _hear(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._active:
            return
        self._outputs.append(_named(output))
        self.logits += _tensors(output) or _by_name(output)
        if self.enough is not None:
            self.enough()

    def _outermost(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._active or output is None:
            return
        self._outputs.append(_named(output))
        self.logits += self._of(module, output)
        if self._records:
            self.calls.append((module, args, kwargs))

    def _of(self, module: nn.Module, output: Any) -> list[Tensor]:
        if callable(self.where):
            found = _tensors(self.where(output))
            if not found:
                raise ValueError(
                    f"logits={self.where!r} gave no tensor of floats from what the model returned ({_named(output)})"
                )
            return found
        if isinstance(self.where, str):
            return _tensors(_at(output, self.where))
        return _by_name(output) or (_tensors(output) if self._holds_all(module) else [])

    def _holds_all(self, module: nn.Module) -> bool:
        if module not in self._whole:
            inside = set(module.parameters())
            self._whole[module] = all(parameter in inside for parameter in self._module.parameters())
        return self._whole[module]


def _by_name(output: Any) -> list[Tensor]:
    fields = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    if found := _tensors(fields.get("logits", getattr(output, "logits", None))):
        return found
    return [value for name, value in fields.items() if str(name).endswith("_logits") and _is_float(value)]


def _tensors(value: Any) -> list[Tensor]:
    """A tensor of floats, or several of one shape."""
    values = [value] if isinstance(value, Tensor) else value
    if not (isinstance(values, Sequence) and values and all(map(_is_float, values))):
        return []
    alike = len({v.shape for v in values}) == 1
    return list(values) if alike and values[0].ndim else []


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _at(output: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(output, Mapping):
            output = output.get(part)
        elif isinstance(output, Sequence) and part.isdigit():
            output = output[int(part)] if int(part) < len(output) else None
        else:
            output = getattr(output, part, None)
    return output


def _named(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(str, output))}"
    return f"a {type(output).__name__}"
