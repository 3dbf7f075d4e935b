"""From a PyTorch model to a clean graph file, with the model left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram
    from transformers import PreTrainedModel

    from lightning_ft.export.wrappers import GraphWrapper

AXES = {0: "batch", 1: "sequence"}


@contextmanager
def inference_state(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, on the CPU, without a key-value cache or autograd; everything is restored afterwards.

    Args:
        model: Changed in place, never copied. Each submodule gets its own training flag back: a model whose frozen
            blocks are in evaluation mode inside a model in training mode returns to just that.
    """
    modes = [(module, module.training) for module in model.modules()]
    device, cache = model.device, getattr(model.config, "use_cache", None)
    try:
        model.eval().to("cpu")
        if cache:
            model.config.use_cache = False
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        if cache:
            model.config.use_cache = cache
        for module, training in modes:
            module.training = training
        model.to(device)  # last: it alone can fail, for want of memory


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run the model with another attention implementation; the former one is restored afterwards.

    Args:
        model: Changed in place.
        implementation: A name that transformers knows, such as ``"eager"``.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    former = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    try:
        model.set_attn_implementation(implementation)
        yield
    finally:
        for config, name in former:
            config._attn_implementation = name


def trace(wrapper: GraphWrapper, sample: Mapping[str, Tensor], *, opset: int) -> ONNXProgram:
    """Export with dynamic axes named ``batch`` and ``sequence``.

    Args:
        wrapper: In evaluation mode.
        sample: Inputs of the graph, each ``(batch, sequence)``, of different sizes above 1: the exporter freezes an
            axis of size 1.
        opset: Version of the ONNX operators.

    Returns:
        The graph with nothing in it of where and how it was traced.
    """
    with warnings.catch_warnings():
        # One is about the exporter's own code; the other comes for each input that shares an axis, as ours do.
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"# The axis name: .* will not be used", category=UserWarning)
        program = torch.onnx.export(
            wrapper,
            tuple(sample.values()),
            dynamo=True,
            opset_version=opset,
            input_names=list(sample),
            output_names=list(wrapper.outputs),
            dynamic_shapes=tuple(AXES for _ in sample),
            verbose=False,
        )
    assert program is not None  # only the TorchScript exporter returns None
    _strip(program)
    return program


def _strip(program: ONNXProgram) -> None:
    """Remove stack traces, paths and module names, and the shapes of initialisers.

    The weights carry their shapes themselves; a second statement of them makes ``quantize_dynamic`` fail with
    "Inferred shape and existing shape differ".
    """
    model = program.model
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in graph.inputs:
            value.metadata_props.clear()
        for value in graph.initializers.values():
            value.metadata_props.clear()
            value.shape = value.type = None
