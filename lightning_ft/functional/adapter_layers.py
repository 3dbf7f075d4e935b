"""Bottleneck adapters as modules, where they hang in a model, and how several at one place work together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Reads = Literal["output", "block", "input"]
"""What an adapter takes: the sub-layer's own output, what the block would give, or the sub-layer's input."""
Nonlinearity = Literal["relu", "gelu", "swish", "tanh"]
Init = Literal["identity", "bert", "houlsby"]

CHILD = "adapters"
"""Name under which a module holds what follows it: ``...output.dense.adapters.task.down.weight``."""
_PHI: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu, "tanh": torch.tanh}


@dataclass(frozen=True)
class BottleneckConfig:
    """The shape of a bottleneck adapter. None: what is usual for its kind, see :func:`add_adapters`.

    Args:
        reduction: Width of the model over width m of the bottleneck.
        nonlinearity: φ, between the two maps: ``"relu"``, ``"gelu"``, ``"swish"`` or ``"tanh"``.
        init: ``"identity"``: W_up = 0, W_down uniform in ±1/√h, so that the adapted model is at first the model, bit
            for bit; ``"bert"``: both N(0, 0.02²); ``"houlsby"``: both N(0, 0.01²), cut off at two deviations. Biases
            are 0.
        scale: s, the factor of what the adapter adds.
        seed: Of the first weights. The global generator is left alone.

    Raises:
        ValueError: A value is unknown or out of range.
    """

    reduction: float | None = None
    nonlinearity: Nonlinearity | None = None
    init: Init = "identity"
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reduction is not None and not self.reduction > 0:
            raise ValueError(f"reduction={self.reduction!r} must be above 0: 16 makes 48 of a width of 768")
        if self.nonlinearity is not None and self.nonlinearity not in _PHI:
            raise ValueError(f"nonlinearity={self.nonlinearity!r} must be one of {', '.join(_PHI)}")
        if self.init not in get_args(Init):
            raise ValueError(f"init={self.init!r} must be one of {', '.join(get_args(Init))}")

    def plain(self) -> dict[str, Any]:
        """As a dictionary."""
        return asdict(self)


class Bottleneck(nn.Module):
    """s · W_up φ(W_down h + b_down) + s · b_up; W_down of shape (m, h), W_up of shape (h, m).

    In the dtype of its weights, and back in that of ``h``: over a base in 16 bits it learns in 32.

    Args:
        width: h.
        config: Complete: nothing in it is None.
        generator: Of the first weights; torch's own are left alone.
        like: A tensor on the device where the adapter is to be.

    Raises:
        ValueError: ``width / reduction`` is below 1.
    """

    def __init__(self, width: int, config: BottleneckConfig, generator: torch.Generator, like: Tensor) -> None:
        super().__init__()
        assert config.reduction is not None
        assert config.nonlinearity is not None
        assert config.scale is not None
        inner = int(width // config.reduction)
        if inner < 1:
            raise ValueError(f"reduction={config.reduction:g} must leave 1 or more of a width of {width}")
        self.config = config
        self.scale = config.scale
        self.nonlinearity = config.nonlinearity
        self.down = _linear(width, inner, config.init, generator, like, zero=False)
        self.up = _linear(inner, width, config.init, generator, like, zero=config.init == "identity")

    def forward(self, hidden: Tensor) -> Tensor:
        """What is to be added."""
        inner = _PHI[self.nonlinearity](self.down(hidden.to(self.down.weight.dtype)))
        added: Tensor = self.up(inner)
        return (added if self.scale == 1 else added * self.scale).to(hidden.dtype)


def _linear(
    inputs: int, outputs: int, init: Init, generator: torch.Generator, like: Tensor, *, zero: bool
) -> nn.Linear:
    weight = torch.empty(outputs, inputs)
    if zero:
        weight.zero_()
    elif init == "identity":
        weight.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    elif init == "bert":
        weight.normal_(0, 0.02, generator=generator)
    else:
        nn.init.trunc_normal_(weight, 0, 0.01, -0.02, 0.02, generator=generator)
    return linear(weight, like)


def linear(weight: Tensor, like: Tensor) -> nn.Linear:
    """A linear layer with these weights and no bias yet, made without a draw, on the device of ``like``."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, device="meta")
    layer.weight = nn.Parameter(weight.to(like.device))
    layer.bias = nn.Parameter(torch.zeros(outputs, device=like.device))
    return layer


class Tap:
    """Hands a tensor from where it is in a forward pass to where it is needed; empty between two passes.

    Args:
        path: Of the module whose input it is.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.value: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model must not hold on to (or fail on) a tensor of a pass that broke off.
        return {"path": self.path, "value": None}

    def catch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook: keep the module's input."""
        values = (*args, *kwargs.values())
        self.value = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)

    def take(self) -> Tensor | None:
        """The tensor, which is let go."""
        value, self.value = self.value, None
        return value


class Adapters(nn.Module):
    """The adapters behind one module, under their names, and which of all are at work.

    The module's output y goes through ``active`` in order: y ← y + f(h), where h is y (``reads="output"``), what the
    block would give, norm(y + r) (``"block"``), or the sub-layer's input (``"input"``). A list of names in ``active``
    is a fusion: y ← y + fusion(h, [f₁(h), f₂(h), …]).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.active: list[str | list[str]] = []
        self.reads: dict[str, Reads] = {}
        self.specs: dict[str, Any] = {}
        self.fused: list[str] = []
        self.taps: dict[Reads, Tap] = {}
        self.norm: list[nn.Module] = []  # not as a child: it is the block's

    def names(self) -> list[str]:
        """Of the adapters."""
        return list(self.reads)

    def adapter(self, name: str) -> Bottleneck:
        """One of them."""
        found = self._modules[name]
        assert isinstance(found, Bottleneck)
        return found

    def forward(self, output: Tensor) -> Tensor:
        """The output of the module, adapted."""
        caught = {reads: tap.take() for reads, tap in self.taps.items()}
        for element in self.active:
            if not self._here(element):
                continue
            names = [element] if isinstance(element, str) else element
            hidden = [self._input(self.reads[name], output, caught) for name in names]
            added = [self.adapter(name)(h) for name, h in zip(names, hidden, strict=True)]
            output = output + (added[0] if isinstance(element, str) else self._modules["fusion"](hidden[0], added))  # type: ignore[misc]
        return output

    def _here(self, element: str | list[str]) -> bool:
        """Adapters of several kinds are not all at the same places."""
        return element in self.reads if isinstance(element, str) else element == self.fused

    def _input(self, reads: Reads, output: Tensor, caught: dict[Reads, Tensor | None]) -> Tensor:
        if reads == "output":
            return output
        value = caught[reads]
        assert value is not None
        if reads == "input":
            return value
        return self.norm[0](output + value) if self.norm else output + value


def follow(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a module that has adapters; of a tuple the first part is the hidden state."""
    adapters = module._modules[CHILD]
    assert adapters is not None
    return (adapters(output[0]), *output[1:]) if isinstance(output, tuple) else adapters(output)


def adapters_at(module: nn.Module, width: int) -> Adapters:
    """The adapters behind a module, which hang there from now on.

    Beside the module and by a hook, not around it: the names, class and attributes of the pretrained weights stay (T5
    reads ``wo.weight.dtype``, PyTorch's encoder layer the weights of its attention), and PyTorch leaves out its fused
    encoder layer, which would pass adapters by, where hooks are.

    Raises:
        ValueError: The module has something else of that name.
    """
    found = getattr(module, CHILD, None)
    if found is None:
        found = Adapters(width)
        module.add_module(CHILD, found)
        module.register_forward_hook(follow)
    if not isinstance(found, Adapters):
        raise ValueError(f"{type(module).__name__} has an attribute {CHILD!r} of its own, a {type(found).__name__}")
    return found


def all_adapters(module: nn.Module) -> Iterator[tuple[str, Adapters]]:
    """Every place with adapters: the path of the module that they follow, and them."""
    for path, child in module.named_modules():
        if isinstance(child, Adapters):
            yield path.removesuffix(CHILD).rstrip("."), child


def check_hooked(module: nn.Module) -> None:
    """See that the modules before adapters still call them.

    Raises:
        RuntimeError: One was replaced, and its adapters taken along without their hook.
    """
    for path, _ in all_adapters(module):
        if follow not in module.get_submodule(path)._forward_hooks.values():
            raise RuntimeError(
                f"{path} has adapters and does not call them: what replaced this layer (a quantisation?) dropped its "
                "hook; do that before adapters are added"
            )


def flat(active: Sequence[str | Sequence[str]]) -> list[str]:
    """The names in a composition, in order."""
    return [name for element in active for name in ([element] if isinstance(element, str) else element)]
