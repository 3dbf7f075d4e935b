"""The one way in which every perturbation enters a model: added to the embedded tokens of its input."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lightning_ft.core.token_inputs import TokenInputs


@dataclass(frozen=True)
class Place:
    """One call of an embedding, and which of its tokens may be perturbed.

    Args:
        embedded: What the table gave, ``(examples, seq, width)``, detached.
        real: Tokens that are no padding and not excluded, ``(examples, seq)``.
    """

    embedded: Tensor
    real: Tensor

    @property
    def mask(self) -> Tensor:
        """``real`` as 1 and 0 in fp32, ``(examples, seq, 1)``."""
        return self.real.float().unsqueeze(-1)


Make = Callable[[Place], Tensor | None]
"""The perturbation of a place, ``(examples, seq, width)`` in fp32; None for none."""


class PerturbedEmbeddings:
    """Adds δ to what the embeddings of a model's input give: a forward hook, so that the model stays as it is.

    This is the pathway of ``inputs_embeds`` for models that are called with token ids: positions, types and norms come
    after it and are the model's own. δ is a tensor of its own: a frozen table, one that the output layer shares and one
    that is quantised serve alike. It is added in fp32; padding (by the ``attention_mask`` that the model was called
    with, else by the table's ``padding_idx``) and excluded ids are left as they are. An example is one sequence of the
    call: a choice, where there are several in a row.

    Args:
        module: Any module; it is hooked until :meth:`remove`.
        inputs: Which embeddings, and which tokens are left alone.

    Attributes:
        places: The calls since :meth:`begin`, in order.
        deltas: What was added in each of them.

    Raises:
        ValueError: See :meth:`TokenInputs.of`.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten())
        >>> words = PerturbedEmbeddings(model, TokenInputs(embedding="0"))
        >>> words.begin(lambda place: torch.ones_like(place.embedded))
        >>> ids = torch.tensor([[1, 2]])
        >>> moved = model(ids)
        >>> words.remove()
        >>> (moved - model(ids)).round().unique()
        tensor([1.], grad_fn=<Unique2Backward0>)
    """

    def __init__(self, module: nn.Module, inputs: TokenInputs | None = None) -> None:
        inputs = inputs or TokenInputs()
        embeddings = inputs.of(module)
        self.exclude = tuple(inputs.exclude)
        self.places: list[Place] = []
        self.deltas: list[Tensor] = []
        self.calls = CallStack(module, embeddings.modules)
        self._first_call = embeddings.first_call
        self._make: Make | None = None
        self._detach = False
        self._active = False
        self._transposed = False
        self._module = module
        hook = Hook(self._shift)
        self._handles: list[RemovableHandle] = [
            child.register_forward_hook(hook, with_kwargs=True) for child in embeddings.modules
        ]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards weights of the module."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return False
        from torch.distributed.fsdp import FSDPModule

        return any(isinstance(module, FSDPModule) for module in self._module.modules())

    def begin(self, make: Make | None = None, *, detach: bool = False) -> None:
        """Perturb what runs from now on.

        Args:
            make: Called at each place; None: places are noted, and nothing is added.
            detach: Cut the embedding off, so that no gradient reaches its table.
        """
        self.places, self.deltas = [], []
        self._make, self._detach, self._active = make, detach, True

    def again(self, deltas: Sequence[Tensor], *, detach: bool = False) -> None:
        """Perturb a run over the same tokens by these, one a place."""
        left = iter(deltas)

        def given(place: Place) -> Tensor:
            delta = next(left, None)
            if delta is None or delta.shape != place.embedded.shape:
                raise ValueError(
                    "a further pass over the same batch embedded other tokens than the first: perturbation methods "
                    "need a training_step that does the same when it is called again on a batch"
                )
            return delta

        self.begin(given, detach=detach)

    def end(self) -> None:
        """Perturb nothing; what was noted stays."""
        self._active, self._make = False, None

    def check_resolution(self, size: float, argument: str) -> None:
        """Refuse a perturbation that rounds to nothing when it is added.

        Raises:
            ValueError: The embeddings are of half precision.
        """
        for place in self.places:
            dtype = place.embedded.dtype
            if dtype in (torch.float16, torch.bfloat16) and 0 < size < torch.finfo(dtype).eps:
                raise ValueError(
                    f"{argument}={size} rounds to nothing beside embeddings in {dtype}: keep fp32 weights, "
                    'Trainer(precision="bf16-mixed") or "16-mixed"'
                )

    def remove(self) -> None:
        """Take the hooks off."""
        self.end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.calls.remove()
        self.places, self.deltas = [], []

    def _shift(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if not self._active or (self._first_call and self.calls.inner_calls(module) > 1):
            return None
        # No documented way tells a recomputation in backward from a call.
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "the embeddings are computed again in the backward pass, without their perturbation: let gradient "
                "checkpointing wrap the blocks alone (the callback ActivationCheckpointing does)"
            )
        ids = args[0] if args else kwargs["input"]
        real = self._real(module, ids)
        turn = self._transposed
        place = Place(_turned(output.detach(), turn), _turned(real, turn))
        delta = None if self._make is None else self._make(place)
        self.places.append(place)
        embedded = output.detach() if self._detach else output
        if delta is None:
            return embedded
        self.deltas.append(delta)
        return (embedded.float() + _turned(delta, turn)).to(output.dtype)

    def _real(self, module: nn.Module, ids: Tensor) -> Tensor:
        """Which ids are perturbed, shaped as they are; also finds out whether they come ``(seq, batch)`` (XLNet)."""
        mask = self.calls.mask_of(ids.shape)
        if mask is not None:
            self._transposed = False
        elif ids.ndim == 2 and ids.shape[0] != ids.shape[1]:
            self._transposed = self.calls.holds(ids.shape[::-1]) and not self.calls.holds(ids.shape)
        if self._transposed:
            mask = self.calls.mask_of(ids.shape[::-1])
            mask = None if mask is None else mask.T
        padding = getattr(module, "padding_idx", None)
        if mask is not None:
            real = mask.to(ids.device)
        else:
            real = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
        for special in self.exclude:
            real = real & (ids != special)
        return real


class CallStack:
    """The calls under way of the modules above some others, with their arguments.

    Args:
        module: The outermost module.
        inner: Modules in it; calls of these are counted.
    """

    def __init__(self, module: nn.Module, inner: Sequence[nn.Module]) -> None:
        self.calls: list[tuple[nn.Module, Any, Any]] = []
        """Outermost first."""
        self.on_outermost: Callable[[nn.Module, Any, Any, Any], None] | None = None
        """Called with module, args, kwargs and output when an outermost call has returned."""
        self._count: dict[nn.Module, int] = {}
        above = [child for child in module.modules() if child not in inner and _holds(child, inner)]
        self._handles: list[RemovableHandle] = [child.register_forward_pre_hook(Hook(self._note)) for child in inner]
        for child in above:
            self._handles += [
                child.register_forward_pre_hook(Hook(self._push), with_kwargs=True),
                child.register_forward_hook(Hook(self._pop), with_kwargs=True, always_call=True),
            ]
        if "torch._dynamo" in sys.modules:
            # What was compiled before runs on without hooks that come later: it guards against none.
            torch.compiler.reset()

    def inner_calls(self, module: nn.Module) -> int:
        """Calls of an inner module since the outermost call began."""
        return self._count.get(module, 0)

    def mask_of(self, shape: torch.Size) -> Tensor | None:
        """The innermost mask of this shape among the arguments of the calls under way: True where tokens are real."""
        for name, value in self._arguments():
            if not isinstance(value, Tensor) or value.shape != shape:
                continue
            if name in ("attention_mask", "input_mask", "mask"):
                return value != 0
            if name.endswith("padding_mask"):  # torch's own layers are told which positions are padding
                return value == 0
        return None

    def holds(self, shape: torch.Size) -> bool:
        """Whether integers of this shape are among the arguments of the calls under way."""
        return any(
            isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()
            for _, value in self._arguments()
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.calls.clear()

    def _arguments(self) -> Iterator[tuple[str, Any]]:
        for module, args, kwargs in reversed(self.calls):
            try:
                values = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            except TypeError:
                values = dict(kwargs)
            for name, value in values.items():
                if isinstance(value, Mapping):
                    yield from ((str(key), inner) for key, inner in value.items())
                else:
                    yield name, value

    def _note(self, module: nn.Module, args: Any) -> None:
        self._count[module] = self._count.get(module, 0) + 1

    def _push(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.calls:
            self._count.clear()
            args, kwargs = fresh(args), fresh(kwargs)
        self.calls.append((module, args, kwargs))

    def _pop(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.calls or self.calls[-1][0] is not module:
            return
        _, args, kwargs = self.calls.pop()
        if not self.calls and self.on_outermost is not None:
            self.on_outermost(module, args, kwargs, output)


def fresh(arguments: Any) -> Any:
    """The same values in containers of their own: a step may take items out of its batch, and is called again."""
    return tree_map(lambda leaf: copy.copy(leaf) if isinstance(leaf, MutableMapping) else leaf, arguments)


class Hook:
    """A hook that copies of its module do not inherit, and that torch.compile leaves as it is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        # Which imports the compiler: not where nothing is compiled.
        if "torch._dynamo" in sys.modules:
            function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(_nothing)


def _nothing(*_: Any) -> None:
    return None


def _holds(module: nn.Module, inner: Sequence[nn.Module]) -> bool:
    return any(child in inner for child in module.modules())


def _turned(values: Tensor, turn: bool) -> Tensor:
    return values.transpose(0, 1) if turn else values
