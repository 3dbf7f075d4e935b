"""Which block of a model each parameter feeds first, read off the autograd graph of one run on the meta device."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ft.core.sharding import unwrapped


def first_fed(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    shapes: Mapping[nn.Parameter, torch.Size] | None = None,
    runs: Counter[int] | None = None,
) -> tuple[dict[nn.Parameter, int], Exception | None]:
    """The first block whose input each parameter reaches in a forward pass (``len(blocks)``: only the output).

    Walks the autograd graph of a copy of ``module`` on the meta device, run on token ids. Where the run breaks off,
    what was learnt before counts, and the error is returned; empty where the first block run takes no hidden state.
    ``shapes`` are the whole shapes of parameters of which this process holds a piece; ``runs`` counts how often each
    block is run.
    """
    feeds: dict[nn.Parameter, int] = {}
    twins: dict[nn.Module, nn.Module] = {}
    whole: Mapping[Any, torch.Size] = shapes or {}
    tensors: dict[Tensor, Tensor] = {}
    met: set[Any] = set()

    def mark(index: int, values: Any) -> None:
        nodes = [get_gradient_edge(tensor).node for tensor in _tensors(values) if tensor.requires_grad]
        while nodes:
            node = nodes.pop()
            if node not in met:
                met.add(node)
                nodes += [parent for parent, _ in node.next_functions if parent is not None]
                if (original := originals.get(getattr(node, "variable", None))) is not None:
                    feeds.setdefault(original, index)

    def enter(index: int, _: nn.Module, args: Any, kwargs: Any) -> None:
        if runs is not None:
            runs[index] += 1
        if index not in met:
            met.add(index)
            if not next(_tensors((args, kwargs))).requires_grad:
                raise ValueError("the blocks receive no hidden state computed from token ids")
            mark(index, (args, kwargs))

    try:
        with torch.enable_grad(), meta_run(module, twins, tensors, whole) as (twin, ids):
            originals: dict[Any, Any] = {copied: tensor for tensor, copied in tensors.items()}
            for index, block in enumerate(blocks):
                twins[block].register_forward_pre_hook(partial(enter, index), with_kwargs=True)
            output = list(_tensors(twin(**ids)))
            if not any(tensor.requires_grad for tensor in output):
                raise ValueError("the output holds no tensor in tuples, lists or mappings")
            mark(len(blocks), output)
    except Exception as error:  # noqa: BLE001 - a stranger's forward may raise anything
        return feeds, error
    return feeds, None


@contextmanager
def meta_run(
    module: nn.Module,
    twins: dict[nn.Module, nn.Module],
    tensors: dict[Tensor, Tensor] | None = None,
    shapes: Mapping[Any, torch.Size] | None = None,
) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """A copy of a module, on the meta device and in eval mode, and token ids to call it with; for the run of it.

    Args:
        module: Left as it is.
        twins: Filled with the copy of each module.
        tensors: Filled with the copy of each tensor.
        shapes: Whole shapes of parameters of which this process holds a piece.
    """
    with (
        torch.inference_mode(False),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        _ZeroScalars(),  # type: ignore[no-untyped-call]
        _no_autocast(),
    ):
        warnings.simplefilter("ignore")
        twin = _meta_twin(module, twins, {} if tensors is None else tensors, shapes or {})
        yield twin, _dummy_ids(twin)


class _ZeroScalars(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets a forward pass on meta tensors read a value (``if mask.all()``): it reads zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Meta tensors know no autocast, not even to switch it off as rotary embeddings do; the graph is the same."""
    originals = torch.autocast, torch.is_autocast_enabled
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment, misc]
    torch.is_autocast_enabled = lambda *_: False
    try:
        yield
    finally:
        torch.autocast, torch.is_autocast_enabled = originals  # type: ignore[misc]


def _meta_twin(
    module: nn.Module,
    twins: dict[nn.Module, nn.Module],
    tensors: dict[Tensor, Tensor],
    shapes: Mapping[Any, torch.Size],
) -> nn.Module:
    """A copy in eval mode, without hooks, on meta tensors; attributes are shared, containers are copied one deep."""
    if module in twins:
        return twins[module]
    source = _source(module)
    twin: nn.Module = object.__new__(type(source))
    nn.Module.__init__(twin)
    twins[module] = twins[source] = twin

    def on_meta(tensor: Tensor) -> Tensor:
        if tensor not in tensors:
            copied = torch.empty(shapes.get(tensor, tensor.shape), dtype=tensor.dtype, device="meta")
            learns = isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex())
            tensors[tensor] = nn.Parameter(copied, learns) if isinstance(tensor, nn.Parameter) else copied
        return tensors[tensor]

    for key, value in vars(source).items():
        if key in vars(twin) or key == "_compiled_call_impl":
            continue
        if isinstance(value, MethodType) and value.__self__ is source:
            # One that hides a method of the class (accelerate's `forward`, FSDP2's forward methods) wraps the original.
            if not hasattr(type(source), key):
                vars(twin)[key] = MethodType(value.__func__, twin)
        elif key != "forward":
            plain = on_meta(value) if isinstance(value, Tensor) else value
            vars(twin)[key] = copy.copy(plain) if isinstance(plain, (list, dict, set)) else plain
    vars(twin)["training"] = False
    twin._parameters = {k: p if p is None else on_meta(p) for k, p in source._parameters.items()}  # type: ignore[misc]
    twin._buffers = {k: b if b is None else on_meta(b) for k, b in source._buffers.items()}
    twin._modules = {k: m if m is None else _meta_twin(m, twins, tensors, shapes) for k, m in source._modules.items()}
    return twin


def _source(module: nn.Module) -> nn.Module:
    """What a wrapper stands for: torch.compile's would compile the original, FSDP1's would gather it."""
    source = unwrapped(module)
    compiled = source._modules.get("_orig_mod")
    return source if compiled is None else _source(compiled)


def _dummy_ids(module: nn.Module) -> dict[str, Tensor]:
    """Token ids (batch 2, seq 7) for every required argument of ``forward``, and for each named ``*input_ids``."""
    arguments = inspect.signature(module.forward).parameters.values()
    required = [a.name for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
    names = required + [a.name for a in arguments if a.name.endswith("input_ids")]
    return {name: torch.zeros(2, 7, dtype=torch.long, device="meta") for name in names}


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, Mapping)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)
