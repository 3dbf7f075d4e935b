"""A weight in four or eight bits: how it is packed, and the tensor that stands for it in checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Kind = Literal["nf4", "fp4", "int8"]
Parts = dict[str, Tensor]
_ABSMAX_BLOCK = 256


@functools.cache
def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, whose kernels do the work.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError('4 and 8 bits need bitsandbytes: pip install "lightning-ft[quant]"') from error
    module: ModuleType = bitsandbytes
    return module


@dataclass(frozen=True)
class Format:
    """How weights are packed.

    ``nf4`` and ``fp4``: w ≈ absmax_b · code[c], c of 4 bits, one absmax in fp32 for each block b of ``block_size``
    weights: 4 + 32/64 = 4.5 bits a weight. ``double`` keeps the absmax values, less their mean, in 8 bits, one fp32
    scale for 256 of them: 4 + 8/64 + 32/(64·256) = 4.127. nf4's codes are quantiles of a normal distribution, fp4's a
    tiny float.
    ``int8``: w ≈ absmax_r · c/127, one absmax in fp32 a row: 8 + 32/in bits.

    Args:
        kind: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        block_size: Of the 4-bit kinds: 32, 64, 128, ... 4096.
        double: Of the 4-bit kinds: quantise the scales, too.

    Raises:
        ValueError: The kind is unknown, or the block size no power of two from 32 to 4096.

    Example:
        >>> Format("int8").bits_per_weight(rows=2, columns=64)
        8.5
    """

    kind: Kind
    block_size: int = 64
    double: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(get_args(Kind))}")
        sizes = [2**i for i in range(5, 13)]
        if self.block_size not in sizes:
            raise ValueError(f"block_size={self.block_size!r} must be one of {sizes}: 64 in the paper")

    def pack(self, weight: Tensor) -> Parts:
        """The parts of a float matrix of shape (out, in); the first is ``codes``.

        Args:
            weight: Finite values. For the 4-bit kinds, ``in`` is even.
        """
        weight = weight.detach().contiguous()
        if self.kind == "int8":
            weight = weight.float()
            absmax = weight.abs().amax(1)
            return {
                "codes": (weight * (127 / absmax.clamp_min(1e-38))[:, None]).round_().to(torch.int8),
                "absmax": absmax,
            }
        functional = import_bitsandbytes().functional
        codes, state = functional.quantize_4bit(
            weight, blocksize=self.block_size, compress_statistics=self.double, quant_type=self.kind
        )
        parts = {"codes": codes.view(weight.shape[0], -1), "absmax": state.absmax}
        return {**parts, "scale": state.state2.absmax, "mean": state.offset} if self.double else parts

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The float matrix that the parts stand for, of shape (out, in)."""
        codes = parts["codes"]
        if self.kind == "int8":
            return (codes * (parts["absmax"] / 127)[:, None]).to(dtype)
        state = self.state(parts, torch.Size((codes.shape[0], 2 * codes.shape[1])), dtype)
        unpacked: Tensor = import_bitsandbytes().functional.dequantize_4bit(codes.view(torch.uint8).view(-1, 1), state)
        return unpacked

    def state(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Any:
        """bitsandbytes' ``QuantState`` of the 4-bit parts."""
        functional = import_bitsandbytes().functional
        device = parts["codes"].device
        scales = None
        if self.double:
            table = _absmax_table(device)
            scales = functional.QuantState(parts["scale"], code=table, blocksize=_ABSMAX_BLOCK, dtype=torch.float32)
        return functional.QuantState(
            parts["absmax"],
            shape=shape,
            code=_code_table(self.kind, device),
            blocksize=self.block_size,
            quant_type=self.kind,
            dtype=dtype,
            offset=parts.get("mean"),
            state2=scales,
        )

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Bits that a matrix of this shape takes for each of its weights, scales included."""
        if self.kind == "int8":
            return 8 + 32 / columns
        blocks = -(rows * columns // -self.block_size)
        scales = 8 * blocks + 32 * -(blocks // -_ABSMAX_BLOCK) + 32 if self.double else 32 * blocks
        return 4 + scales / (rows * columns)


@functools.lru_cache
def _code_table(kind: str, device: torch.device) -> Tensor:
    table: Tensor = import_bitsandbytes().functional.get_4bit_type(kind, device=device)
    return table


@functools.lru_cache
def _absmax_table(device: torch.device) -> Tensor:
    table: Tensor = import_bitsandbytes().functional.create_dynamic_map().to(device)
    return table


class QuantisedTensor(Tensor):
    """Stands in state dicts for the float weight that a quantised layer came from: of its shape and dtype, packed.

    So names of a state dict, and what ``strict`` loading compares, are those of the model before quantisation. Copied
    into a float parameter, and in any other operation, it gives the dequantised values; a quantised layer takes the
    bits. Checkpoints with it are read with ``weights_only=True`` by programs that imported this module.

    Args:
        parts: See :meth:`Format.pack`.
        form: How they are packed.
        dtype: Of the float weight.
        transposed: The float weight is the packed matrix transposed (transformers' ``Conv1D``).
    """

    parts: Parts
    settings: dict[str, Any]

    @staticmethod
    def __new__(cls, parts: Parts, form: Format, dtype: torch.dtype, *, transposed: bool = False) -> QuantisedTensor:  # noqa: D102
        codes = parts["codes"]
        rows, columns = codes.shape[0], codes.shape[1] * (1 if form.kind == "int8" else 2)
        shape = (columns, rows) if transposed else (rows, columns)
        self: QuantisedTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        self.parts = parts
        self.settings = {**asdict(form), "transposed": transposed}
        return self

    def __init__(self, parts: Parts, form: Format, dtype: torch.dtype, *, transposed: bool = False) -> None:
        super().__init__()

    @property
    def form(self) -> Format:
        """How the parts are packed."""
        return Format(**{name: value for name, value in self.settings.items() if name != "transposed"})

    def dequantised(self) -> Tensor:
        """The plain float tensor."""
        weight = self.form.unpack(self.parts, self.dtype)
        return weight.t() if self.settings["transposed"] else weight

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Not torch's own way for such tensors, which a loader with a callable map_location (Lightning's) refuses.
        return _rebuild, (dict(self.parts), dict(self.settings), self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantisedTensor({tuple(self.shape)}, {self.dtype}, {self.settings['kind']})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        same = func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default)
        moved = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype)
        if same or moved:
            to = {"device": kwargs["device"]} if kwargs.get("device") is not None else {}
            parts = {name: part.clone() if not to else part.to(**to) for name, part in args[0].parts.items()}
            return cls(parts, args[0].form, args[0].dtype, transposed=args[0].settings["transposed"])

        def as_float(value: Any) -> Any:
            # Its strides are told to be those of a contiguous tensor, and a view relies on them.
            return value.dequantised().contiguous() if isinstance(value, cls) else value

        plain = tree_map(as_float, (args, kwargs))
        return func(*plain[0], **plain[1])


def _rebuild(parts: Parts, settings: dict[str, Any], dtype: torch.dtype) -> QuantisedTensor:
    form = {name: value for name, value in settings.items() if name != "transposed"}
    return QuantisedTensor(parts, Format(**form), dtype, transposed=settings["transposed"])


torch.serialization.add_safe_globals([_rebuild])  # it checks and stores: a file cannot make it run anything
