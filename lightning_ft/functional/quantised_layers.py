"""Linear layers whose frozen weight is kept in four or eight bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.functional.quantised_tensor import Format, Parts, QuantisedTensor, import_bitsandbytes


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D`` (GPT-2): a linear layer whose weight has the shape (in, out)."""
    # Without transformers no model has one.
    return type(module) is getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


class QuantisedLinear(nn.Linear):
    """y = x Ŵᵀ + b with Ŵ packed as a :class:`Format` says; gradients flow to x and b, never to the weight.

    Under autocast it computes in autocast's dtype, otherwise in that of its input: where ``nn.Linear`` would.
    ``weight`` holds the codes, as int8 in either case (transformers' T5 casts activations to the dtype of a weight
    unless it is that); scales move with it and keep their fp32. The bias stays the float parameter that it was.

    In state dicts ``weight`` is one :class:`QuantisedTensor` of the float weight's shape. Loading takes the bits of
    such a tensor in the same format, and quantises what else it finds.

    Args:
        layer: The ``nn.Linear``, or transformers' ``Conv1D``, whose place it takes, with its bias, mode and hooks.
        form: How to pack.
        threshold: LLM.int8's: inputs of this magnitude or more are multiplied in their own precision; 0: none.
    """

    def __init__(self, layer: nn.Module, form: Format, *, threshold: float = 0.0) -> None:
        nn.Module.__init__(self)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        # Hooks, mode and whatever a project or another method has noted on the layer.
        vars(self).update(
            {name: value for name, value in vars(layer).items() if name not in ("_parameters", "forward")}
        )
        self.transposed = is_conv1d(layer)
        self.replaced = type(layer)
        matrix = weight.t() if self.transposed else weight
        self.out_features, self.in_features = matrix.shape
        self.form = form
        self.threshold = threshold
        self.float_dtype = weight.dtype
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.int8), requires_grad=False)
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
        # Not buffers: DDP would send them before each forward, and .half() would round them.
        self.scales: Parts = {}
        self._hold(form.pack(matrix))

    def _hold(self, parts: Parts) -> None:
        codes, *_ = parts.values()
        self.weight.data = codes.view(torch.int8)
        self.scales = {name: part for name, part in parts.items() if name != "codes"}

    def parts(self) -> Parts:
        """What is packed, without copying it."""
        codes = self.weight.data if self.form.kind == "int8" else self.weight.data.view(torch.uint8)
        return {"codes": codes, **self.scales}

    def packed(self) -> QuantisedTensor:
        """The weight as it stands in state dicts."""
        return QuantisedTensor(self.parts(), self.form, self.float_dtype, transposed=self.transposed)

    def dequantised(self) -> Tensor:
        """Ŵ, of shape (out, in), in the dtype that the weight had."""
        return self.form.unpack(self.parts(), self.float_dtype)

    def take(self, weight: Tensor) -> None:
        """Hold another weight of the same shape: the bits of a :class:`QuantisedTensor`, or floats quantised anew."""
        device = self.weight.device
        if isinstance(weight, QuantisedTensor) and weight.settings == self.packed().settings:
            self._hold({name: part.to(device, copy=True) for name, part in weight.parts.items()})
            return
        if isinstance(weight, QuantisedTensor):
            weight = weight.dequantised()
        weight = weight.to(device, self.float_dtype)
        self._hold(self.form.pack(weight.t() if self.transposed else weight))

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        device = input.device.type
        autocast = torch.is_autocast_enabled(device)
        input = input.to(torch.get_autocast_dtype(device)) if autocast else input
        # Autocast would round the integers of the 8-bit product.
        with torch.autocast(device, enabled=False):
            output = self._product(input.reshape(-1, self.in_features)).view(*input.shape[:-1], self.out_features)
        # Outside the kernel, which sums a bias gradient over one dimension alone.
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _product(self, input: Tensor) -> Tensor:
        product: Tensor
        if self.form.kind == "int8":
            absmax = self.scales["absmax"]
            product = _Int8Product.apply(input, self.weight, absmax, self.threshold)  # type: ignore[no-untyped-call]
            return product
        parts = self.parts()
        state = self.form.state(parts, torch.Size((self.out_features, self.in_features)), input.dtype)
        product = import_bitsandbytes().matmul_4bit(input, parts["codes"].view(-1, 1), state)
        return product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = {name: part.to(self.weight.device) for name, part in self.scales.items()}
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.packed()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *others: Any) -> None:
        key = f"{prefix}weight"
        weight = state_dict.get(key)
        if weight is not None:
            shape = self.packed().shape
            *_, errors = others
            if weight.shape == shape:
                self.take(weight)
            else:
                errors.append(
                    f"size mismatch for {key}: {tuple(weight.shape)} in the file, {tuple(shape)} in the module"
                )
            state_dict = {**state_dict, key: self.weight.data}
        super()._load_from_state_dict(state_dict, prefix, metadata, *others)

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"{super().extra_repr()}, {self.form.kind}"


class _Int8Product(torch.autograd.Function):
    """LLM.int8: x and W in int8 by rows, what is above the threshold apart; the gradient is that of x Ŵᵀ."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, codes: Tensor, absmax: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(codes, absmax)
        import_bitsandbytes()
        kernels = torch.ops.bitsandbytes
        # A copy: the kernel zeroes the outliers in its input for a while.
        rows, scales, outliers = kernels.int8_vectorwise_quant(input.to(torch.float16, copy=True), threshold)
        output: Tensor
        if threshold:
            output, _ = kernels.int8_mixed_scaled_mm(input, rows, codes, scales, absmax, outliers, None)
        else:
            output = kernels.int8_scaled_mm(rows, codes, scales, absmax, bias=None, dtype=input.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        codes, absmax = ctx.saved_tensors
        return gradients[0] @ (codes * (absmax / 127)[:, None]).to(gradients[0].dtype), None, None, None
