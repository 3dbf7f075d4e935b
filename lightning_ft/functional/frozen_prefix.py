"""The frozen lower part of a model: computes activations of rows, and is stood in for by those computed before."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_ft.core.undisturbed import eval_mode, same_randomness
from lightning_ft.functional.module_trace import (
    Event,
    Forwards,
    Stand,
    apart,
    as_forward,
    float_tensors,
    run_until,
    trace,
)
from lightning_ft.functional.prefix_layout import PrefixLayout
from lightning_ft.functional.prefix_rows import MASK, Inputs, Row, Unsuited, batch_of, rows_of


@dataclass(frozen=True)
class Callee:
    """A module that can be run on rows: which column each argument is, and its other arguments."""

    module: nn.Module
    names: Mapping[str, str]
    options: Mapping[str, Any]

    @classmethod
    def around(cls, module: nn.Module, values: Mapping[str, Any], columns: Mapping[str, Tensor]) -> Callee | None:
        """How to run a module above the owner, if it takes what the owner takes, and what can be left out (labels)."""
        parameters = inspect.signature(module.forward).parameters
        names, options = {}, {}
        for name, value in values.items():
            column = next((c for c, tensor in columns.items() if tensor is value), None)
            if column is not None:
                names[name] = column
            elif isinstance(value, bool | int | float | str):
                options[name] = value
            elif name in parameters and parameters[name].default is inspect.Parameter.empty:
                return None
        return cls(module, names, options) if names else None

    def kwargs(self, columns: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of a call on the columns."""
        return {name: columns[column] for name, column in self.names.items()} | dict(self.options)


@final
class FrozenPrefix:
    """The embeddings and the lowest ``depth`` blocks of a model, known from one call of their owner.

    Activations are taken, and later put back, at one of two places: at the output of block ``depth - 1``, a vector for
    each token; or, where all that lies below the head is frozen and the model makes one vector of each row, at the
    first module that receives that vector (``pooled``). In between nothing of the frozen part runs: blocks, embeddings
    and pooler give placeholders of NaN in their outputs' shape. That this changes nothing is proved on a few rows of
    the call, each computed by itself and put back in one batch, before it is relied on.

    Args:
        layout: The modules.
        depth: Blocks of the prefix, 1 or more.
        inputs: What the owner is called with.
        enclosing: Modules above the owner whose call is under way, innermost first, with the names and values of their
            arguments.
        dtype: Type in which activations will be kept: how exact the proof can be.

    Raises:
        Unsuited: The prefix cannot be skipped; the message says why.
    """

    def __init__(
        self,
        layout: PrefixLayout,
        depth: int,
        inputs: Inputs,
        enclosing: Sequence[tuple[nn.Module, Mapping[str, Any]]] = (),
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layout, self.depth, self.dtype = layout, depth, dtype
        self._forwards = Forwards()
        self._pending: Tensor | None = None
        self.entry: nn.Module | None = None
        """The module that takes the pooled vectors; None where a vector is kept for each token."""
        self.like = {name: column[:1] for name, column in inputs.columns.items()}
        probe = _probe(rows_of(inputs.columns))
        owner = Callee(layout.owner, {name: name for name in inputs.columns}, inputs.options)
        callees = [owner]
        for module, values in enclosing:
            callee = Callee.around(module, values, inputs.columns)
            if callee is not None and self._comparable(callee, probe):
                callees.append(callee)
        self._outermost = callees[-1]
        self._learn_owner(owner, probe)
        if depth == len(layout.blocks) and any(self._proved_pooled(callee, inputs, probe) for callee in callees[1:]):
            return
        self.callee = owner
        self.entry = None
        self.stop: nn.Module = layout.blocks[depth - 1]
        self._skipped, self.width, self._value_dtype = self._skipped_by_owner, self._hidden_width, self._hidden_dtype
        self.prove(inputs)

    def _comparable(self, callee: Callee, probe: Sequence[Row]) -> bool:
        """Whether a module above the owner runs on what the owner is given, and returns tensors."""
        try:
            with apart(), same_randomness(), eval_mode(list(callee.module.modules())):
                return any(True for _ in float_tensors(callee.module(**callee.kwargs(batch_of(probe, self.like)))))
        except Exception:  # noqa: BLE001 - a stranger's forward may raise anything where labels are left out
            return False

    def _proved_pooled(self, callee: Callee, inputs: Inputs, probe: Sequence[Row]) -> bool:
        try:
            if not self._learn_entry(callee, probe):
                return False
            self.prove(inputs)
        except Exception:  # noqa: BLE001 - a stranger's forward may raise anything; the prefix is then kept by token
            return False
        return True

    @property
    def pooled(self) -> bool:
        """Whether one vector is kept for each row, not for each token."""
        return self.entry is not None

    @property
    def place(self) -> str:
        """Where activations are taken and put back, in words."""
        return (
            "what enters the head" if self.pooled else f"the output of block {self.depth} of {len(self.layout.blocks)}"
        )

    def _learn_owner(self, owner: Callee, probe: Sequence[Row]) -> None:
        with ExitStack() as stack:
            _observed(stack, self._outermost.module)
            columns = batch_of(probe, self.like)
            try:
                events, _ = trace(owner.module, owner.kwargs(columns))
            except Exception as error:
                raise Unsuited(
                    f"{type(owner.module).__name__} does not run on three of its rows ({error!r})"
                ) from error
        rows, length = next(iter(columns.values())).shape
        blocks = self.layout.blocks
        entered = [[i for i, e in enumerate(events) if e.entered and e.module is block] for block in blocks]
        if any(len(times) != 1 for times in entered) or entered != sorted(entered):
            raise Unsuited("the blocks do not run once each, in order")
        outputs = {e.module: e.values for e in events if not e.entered}
        skipped: dict[nn.Module, Stand] = {}
        for block in blocks[: self.depth]:
            hidden = list(float_tensors(outputs[block]))
            if len(hidden) != 1 or hidden[0].shape[:2] != (rows, length) or hidden[0].ndim != 3:
                raise Unsuited("a block gives something other than one hidden state (batch, seq, width)")
            try:
                skipped[block] = Stand(outputs[block], rows, length)
            except ValueError as error:
                raise Unsuited(f"a block's output: {error}") from None
        self._skipped_by_owner = skipped | self._feeders(events, entered[0][0], rows, length)
        top = next(float_tensors(outputs[blocks[self.depth - 1]]))
        self._hidden_width, self._hidden_dtype, self._needs_grad = top.shape[-1], top.dtype, top.requires_grad

    def _feeders(self, events: Sequence[Event], first: int, rows: int, length: int) -> dict[nn.Module, Stand]:
        """What runs before the first block, has parameters, and gives a hidden state: embeddings and projections."""
        later = {e.module for e in events[first:] if e.entered} | set(self.layout.around)
        before = [e for e in events[:first] if not e.entered and e.module not in later]
        return _stands((e for e in before if _has_parameters(e.module)), rows, length)

    def _learn_entry(self, callee: Callee, probe: Sequence[Row]) -> bool:
        """Whether a call of ``callee`` makes one vector of each row, of nothing that trains; which module takes it."""
        with ExitStack() as stack:
            _observed(stack, self._outermost.module)
            columns = batch_of(probe, self.like)
            events, _ = trace(callee.module, callee.kwargs(columns))
        rows, length = next(iter(columns.values())).shape
        left = [i for i, e in enumerate(events) if e.module is self.layout.owner and not e.entered]
        above = set(self.layout.above)
        later = [(i, e) for i, e in enumerate(events) if left and i > left[0] and e.entered and e.module not in above]
        entry = next(((i, e) for i, e in later if _vector(e.values, rows) is not None), None)
        if len(left) != 1 or entry is None:
            return False
        vector = _vector(entry[1].values, rows)
        assert vector is not None
        if vector.requires_grad:
            return False
        self.callee, self.stop = callee, entry[1].module
        self.entry = self.stop
        with ExitStack() as stack:
            # Dropout before that module, in modules that keep their mode, would be lost: then the vector changes here.
            _observed(stack, self.layout.owner)
            drawn = _vector(run_until(callee.module, callee.kwargs(columns), self.stop, output=False), rows)
        self._value_dtype = vector.dtype
        if drawn is None or _difference(vector, drawn, None, self._tolerance()):
            return False
        self.width, self._value_dtype = vector.shape[-1], vector.dtype
        first_block = next(i for i, e in enumerate(events) if e.module is self.layout.blocks[-1] and not e.entered)
        inner = set(self.layout.owner.modules()) - set(self.layout.around)
        tail = [e for e in events[first_block : left[0]] if not e.entered and e.module in inner]
        skipped = _stands((e for e in tail if _has_parameters(e.module)), rows, length)
        self._skipped = self._skipped_by_owner | skipped
        return True

    def watched(self, prefix: Iterable[nn.Parameter]) -> list[Tensor]:
        """The tensors on which activations depend: ``prefix``, those frozen on the way to the head, and buffers."""
        frozen = [p for p in self.callee.module.parameters() if not p.requires_grad] if self.pooled else list(prefix)
        buffers = [b for module in self._skipped for b in module.buffers()]
        return list({id(tensor): tensor for tensor in (*frozen, *buffers)}.values())

    def describe(self) -> str:
        """The structure that computes the activations, and how: part of what names a store that outlives the run."""
        where = "entry" if self.pooled else "block"
        kind = next(iter(self.like.values())).device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        modules = [repr(module) for module in self._skipped]
        return repr(
            (where, self.depth, self.width, self._value_dtype, self.dtype, cast, dict(self.callee.options), modules)
        )

    def compute(self, rows: Sequence[Row]) -> list[Tensor]:
        """The activations of each row, ``(length, width)`` or pooled ``(1, width)``, from one run in eval mode."""
        with apart(), same_randomness(), eval_mode(list(self.callee.module.modules())):
            kwargs = self.callee.kwargs(batch_of(rows, self.like))
            found = run_until(self.callee.module, kwargs, self.stop, output=not self.pooled)
        if self.pooled:
            vectors = _vector(found, len(rows))
            assert vectors is not None
            return list(vectors[:, None].to("cpu", self.dtype))
        hidden = next(float_tensors(found)).to("cpu", self.dtype)
        return [hidden[i, row.start : row.stop] for i, row in enumerate(rows)]

    def begin(self, values: Tensor, length: int) -> None:
        """Stand in for the prefix in the owner's call that is about to run.

        Args:
            values: Activations ``(batch, seq, width)``, or pooled ``(batch, 1, width)``.
            length: Positions of the call's sequences.
        """
        device = next(iter(self.like.values())).device
        rows = len(values)
        if self.pooled:
            self._pending = values[:, 0].to(device, self._value_dtype)
        forwards: dict[nn.Module, Callable[..., Any]] = {
            module: as_forward(partial(stand, rows, length)) for module, stand in self._skipped.items()
        }
        if not self.pooled:
            hidden = values.to(device, self._hidden_dtype)
            if self._needs_grad:  # as where inputs were made to require gradients, for re-entrant checkpointing
                hidden.requires_grad_(True)
            output = _with_tensor(self._skipped[self.stop](rows, length), hidden)
            forwards[self.stop] = as_forward(lambda: output)
        self._forwards.replace(forwards)

    def end(self) -> None:
        """The owner's call is over, with or without an error."""
        self._forwards.restore()

    def discard(self) -> None:
        """Forget a vector that no head has asked for."""
        self._pending = None

    def on_entry(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook of :attr:`entry`: puts the pooled vectors in place of its argument."""
        if self._pending is None:
            return None
        vectors, self._pending = self._pending, None
        given = _vector((args, kwargs), len(vectors))

        def put(value: Any) -> Any:
            return vectors if value is given else value

        return tuple(put(value) for value in args), {name: put(value) for name, value in kwargs.items()}

    def agree(self, held: Tensor, computed: Tensor) -> bool:
        """Whether two activations of one row are the same but for rounding."""
        return not _difference(computed, held, None, self._tolerance())

    def prove(self, inputs: Inputs) -> None:
        """Compare the outputs of the model with and without its prefix, on a few rows of a call.

        Raises:
            Unsuited: They differ.
        """
        if set(inputs.columns) != set(self.like):
            raise Unsuited(f"called with {sorted(inputs.columns)}, before with {sorted(self.like)}")
        owner = Callee(self.layout.owner, {name: name for name in inputs.columns}, inputs.options)
        # A pooled vector is put back above the owner, whose own output nothing then uses.
        outer = [] if self._outermost.module is owner.module else [self._outermost]
        for callee in outer if self.pooled else [owner, *outer]:
            self._compare(callee, _probe(rows_of(inputs.columns)))

    def _compare(self, callee: Callee, probe: Sequence[Row]) -> None:
        columns = batch_of(probe, self.like)
        real = columns[MASK] != 0 if MASK in columns else None
        width = 1 if self.pooled else next(iter(columns.values())).shape[1]
        values = torch.zeros(len(probe), width, self.width, dtype=self.dtype)
        for i, row in enumerate(probe):
            vectors, start = self.compute([row])[0], 0 if self.pooled else row.start
            values[i, start : start + len(vectors)] = vectors
        with apart(), same_randomness(), eval_mode(list(callee.module.modules())):
            wanted = list(float_tensors(callee.module(**callee.kwargs(columns))))
            try:
                got = list(float_tensors(self._stood_in(callee, columns, values)))
            except Exception as error:
                raise Unsuited(f"without its prefix {type(callee.module).__name__} raises {error!r}") from error
        name = type(callee.module).__name__
        if len(wanted) != len(got) or not wanted:
            raise Unsuited(f"the output of {name} cannot be compared")
        for a, b in zip(wanted, got, strict=True):
            if found := _difference(a, b, real, self._tolerance()):
                raise Unsuited(f"without its prefix {name} gives something else ({found})")

    def _stood_in(self, callee: Callee, columns: Mapping[str, Tensor], values: Tensor) -> Any:
        def enter(*_: Any) -> None:
            self.begin(values, next(iter(columns.values())).shape[1])

        owner = self.layout.owner
        handles = [
            owner.register_forward_pre_hook(enter),
            owner.register_forward_hook(lambda *_: self.end(), always_call=True),
        ]
        if self.entry is not None:
            handles.append(self.entry.register_forward_pre_hook(self.on_entry, with_kwargs=True))
        try:
            return callee.module(**callee.kwargs(columns))
        finally:
            self.end()
            self.discard()
            for handle in handles:
                handle.remove()

    def _tolerance(self) -> float:
        kind = next(iter(self.like.values())).device.type
        dtypes = {self.dtype, self._value_dtype}
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
        return max(1e-4, *(20 * torch.finfo(dtype).eps for dtype in dtypes))


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """A cheap number that changes when a tensor is written in place or given other memory; equal content may differ."""
    total, places = 0, 0
    for i, tensor in enumerate(tensors):
        total += tensor._version
        places ^= hash((i, tensor.data_ptr()))
    return total, places


def digest(tensors: Iterable[Tensor], also: str = "") -> str:
    """A hash of the content of tensors, byte by byte, and of a text."""
    result = hashlib.blake2b(also.encode(), digest_size=16)
    for tensor in tensors:
        result.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        flat = tensor.detach().to("cpu").contiguous().flatten()
        if flat.numel():
            result.update(flat.view(torch.uint8).numpy().data)
    return result.hexdigest()


def _observed(stack: ExitStack, module: nn.Module) -> None:
    """A run of ``module`` in eval mode, with an autograd graph to read off, that leaves nothing behind."""
    stack.enter_context(apart())
    stack.enter_context(same_randomness())
    stack.enter_context(eval_mode(list(module.modules())))
    stack.enter_context(torch.enable_grad())


def _probe(rows: Sequence[Row]) -> list[Row]:
    """The longest row, half of it where a mask can hide the rest, and another; their number is not their length."""
    order = sorted(rows, key=lambda row: (row.stop, row.start))
    longest, other = order[-1], order[len(order) // 2]
    stop = longest.start + (longest.length + 1) // 2 if MASK in longest.columns else longest.stop
    half = longest._replace(stop=stop, columns={name: c[:stop] for name, c in longest.columns.items()})
    return [longest, half] if longest.stop == 3 else [longest, half, other]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _stands(events: Iterable[Event], rows: int, length: int) -> dict[nn.Module, Stand]:
    """Stands for the outermost of the modules whose output can be stood in for."""
    stands: dict[nn.Module, Stand] = {}
    for event in events:
        try:
            stands[event.module] = Stand(event.values, rows, length)
        except ValueError:
            continue
    inner = {child for module in stands for child in module.modules() if child is not module}
    return {module: stand for module, stand in stands.items() if module not in inner}


def _vector(values: Any, rows: int) -> Tensor | None:
    """The first tensor (rows, width) among the arguments of a call."""
    return next((t for t in float_tensors(values) if t.ndim == 2 and t.shape[0] == rows), None)


def _with_tensor(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, (tuple, list)):
        return type(output)(_with_tensor(part, tensor) for part in output)
    return output


def _difference(wanted: Tensor, got: Tensor, real: Tensor | None, tolerance: float) -> str:
    if wanted.shape != got.shape:
        return f"shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    wanted, got = wanted.double(), got.double()
    if real is not None and wanted.shape[:2] == real.shape:
        wanted, got = wanted[real], got[real]
    if wanted.numel() == 0:
        return ""
    scale, off = wanted.abs().max(), (wanted - got).abs().max()
    return "" if bool(off <= tolerance * (0.1 + scale)) else f"by {float(off):.1e}"
