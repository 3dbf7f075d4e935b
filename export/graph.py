"""From a PyTorch model to a clean graph file, with the model left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ft.core.undisturbed import eval_mode

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

    from lightning_ft.export.wrappers import GraphWrapper


@contextmanager
def inference_state(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, on the CPU, without a key-value cache or autograd; everything is restored afterwards.

    Args:
        model: Changed in place, never copied. Each submodule gets its own training flag back: a model whose frozen
            blocks are in evaluation mode inside a model in training mode returns to just that.
    """
    device = next(model.parameters()).device
    caching = [config for config in _configs(model) if getattr(config, "use_cache", False)]
    try:
        with eval_mode(model.modules()):
            model.to("cpu")
            for config in caching:
                config.use_cache = False
            with torch.inference_mode(False), torch.no_grad():
                yield
    finally:
        for config in caching:
            config.use_cache = True
        model.to(device)  # last: it alone can fail, for want of memory


@contextmanager
def attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Run the model with another attention implementation; the former one is restored afterwards.

    Args:
        model: Changed in place; what of it is not of transformers stays as it is.
        implementation: A name that transformers knows, such as ``"eager"``.
    """
    former = [(c, c._attn_implementation) for c in _configs(model) if hasattr(c, "_attn_implementation")]
    try:
        for module in model.modules():
            if callable(choose := getattr(module, "set_attn_implementation", None)):
                choose(implementation)
        yield
    finally:
        for config, name in former:
            config._attn_implementation = name


@contextmanager
def rounded(model: nn.Module, *, seed: int, unit: float = 2.0**-22) -> Iterator[None]:
    """Run the model with noise at the size of rounding errors: on what each of its layers gives.

    Args:
        model: Has hooks in the meantime.
        seed: Of the noise, whose generator is private.
        unit: Its standard deviation, relative to each value. The last place of fp32 is 2⁻²³, and sums have several.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        return output * (1 + unit * torch.randn(output.shape, generator=generator))

    leaves = [module for module in model.modules() if not any(module.children())]
    handles = [module.register_forward_hook(disturb) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _configs(model: nn.Module) -> list[Any]:
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if config is not None}.values())


def trace(wrapper: GraphWrapper, sample: Mapping[str, Tensor], *, opset: int) -> ONNXProgram:
    """Export with dynamic, named axes.

    Args:
        wrapper: In evaluation mode.
        sample: Inputs of the graph, with different sizes above 1 in all axes: the exporter freezes an axis of size 1.
        opset: Version of the ONNX operators.

    Returns:
        The graph with nothing in it of where and how it was traced.
    """
    with quiet():
        program = torch.onnx.export(
            wrapper,
            kwargs=wrapper.arguments(sample),
            dynamo=True,
            opset_version=opset,
            input_names=list(sample),
            output_names=list(wrapper.outputs),
            dynamic_shapes=wrapper.arguments({name: dict(wrapper.axes(name)) for name in sample}),
            verbose=False,
        )
    assert program is not None  # only the TorchScript exporter returns None
    strip(program.model)
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters warn of, which no user can act on."""
    with warnings.catch_warnings():
        # One is about the exporter's own code; the other comes for each input that shares an axis, as ours do.
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"# The axis name: .* will not be used", category=UserWarning)
        yield


def strip(model: Any) -> None:
    """Remove stack traces, paths and module names, the shapes of initialisers, and second uses of outputs' names.

    The weights carry their shapes themselves; a second statement of them makes ``quantize_dynamic`` fail with
    "Inferred shape and existing shape differ".

    Args:
        model: An ``onnx_ir.Model``, changed in place.
    """
    names = {value.name for value in model.graph.outputs}
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                # The exporter names values after variables in the model's code: one may have an output's name.
                if value.name in names and value not in model.graph.outputs:
                    value.name = f"{value.name}.inner"
        for value in graph.inputs:
            value.metadata_props.clear()
        for value in graph.initializers.values():
            value.metadata_props.clear()
            value.shape = value.type = None
