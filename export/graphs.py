"""The graphs that together compute what a model does: how they are traced, run, compared and put in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ft.export.parity import Probe, make_probes, run_onnx, run_torch
from lightning_ft.export.wrappers import GraphWrapper, graph_inputs

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.modules import TransformerModule
    from lightning_ft.modules.base import Batch

Sessions = Mapping[str, "InferenceSession"]
"""Open graphs by the names of their files."""

MODEL = "model.onnx"


class Graphs(ABC):
    """One graph or several, each in a file of its own.

    Args:
        model: What they compute.
        files: By file name, what goes into each.
    """

    per_token: tuple[str, ...] = ()
    """Outputs of :meth:`run` that are compared where the attention mask is 1 alone."""

    def __init__(self, model: nn.Module, files: Mapping[str, GraphWrapper]) -> None:
        self.model: Any = model
        self.files = dict(files)

    @abstractmethod
    def probes(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[Probe]:
        """Inputs to compare on."""

    @abstractmethod
    def samples(self, probes: Sequence[Probe]) -> dict[str, dict[str, Tensor]]:
        """By file name, the inputs that each graph is traced on."""

    @abstractmethod
    def expected(self, probe: Probe) -> dict[str, Tensor]:
        """The model's outputs, by name."""

    @abstractmethod
    def run(self, sessions: Sessions, probe: Probe) -> dict[str, Tensor]:
        """The same outputs, computed by the graphs."""

    @abstractmethod
    def replacements(self, module: TransformerModule, sessions: Sessions) -> dict[str, Callable[..., Any]]:
        """Methods of a module, by name, with the graphs in its model's place."""

    rounding: Callable[[Probe], Iterable[Mapping[str, Tensor]]] | None = None
    """The outputs with other rounding errors; None where errors are the same on all inputs, see ``check_parity``."""

    def prove(self, sessions: Sessions, probes: Sequence[Probe], *, error: float) -> dict[str, Any]:
        """What else is to be equal, beyond outputs.

        Args:
            sessions: The graphs.
            probes: What they were compared on.
            error: The largest difference seen there.

        Returns:
            What was found, for the report.

        Raises:
            ParityError: It is not equal.
        """
        return {}


class OneGraph(Graphs):
    """A graph that computes everything at once, as ``model.onnx``.

    Args:
        wrapper: What goes into it.
    """

    def __init__(self, wrapper: GraphWrapper) -> None:
        super().__init__(wrapper.model, {MODEL: wrapper})
        self.wrapper = wrapper
        self.per_token = wrapper.per_token

    def probes(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> list[Probe]:
        """Random tokens, and what the wrapper makes of them."""
        generator = torch.Generator().manual_seed(0)
        names = graph_inputs(self.model, tokenizer)
        return [
            probe._replace(inputs=self.wrapper.sample(probe.inputs, generator))
            for probe in make_probes(tokenizer, names, max_length=max_length)
        ]

    def samples(self, probes: Sequence[Probe]) -> dict[str, dict[str, Tensor]]:
        """The first padded probe."""
        return {MODEL: padded(probes).inputs}

    def expected(self, probe: Probe) -> dict[str, Tensor]:
        """What the wrapper gives."""
        return run_torch(self.wrapper, probe)

    def run(self, sessions: Sessions, probe: Probe) -> dict[str, Tensor]:
        """What the graph gives."""
        return run_onnx(sessions[MODEL], probe)

    def replacements(self, module: TransformerModule, sessions: Sessions) -> dict[str, Callable[..., Any]]:
        """Its ``forward``."""
        return {"forward": graph_forward(module, sessions[MODEL])}


def padded(probes: Sequence[Probe]) -> Probe:
    """The first probe with padding: all its axes are longer than 1."""
    return next(probe for probe in probes if probe.padded)


def as_graphs(made: GraphWrapper | Graphs) -> Graphs:
    """What the ``wrap`` of a head made, as graphs."""
    return made if isinstance(made, Graphs) else OneGraph(made)


def graph_forward(module: TransformerModule, session: InferenceSession) -> Callable[[Batch], Any]:
    """A module's ``forward``, computed by a graph."""
    names = [entry.name for entry in session.get_inputs()]

    def forward(batch: Batch) -> Any:
        # What a module is not given is 0 to it.
        given = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
        if "gap" in names:
            given["gap"] = module.gap(batch)  # type: ignore[operator]
        values = session.run(None, {name: given[name].numpy() for name in names})
        tensors = tuple(torch.from_numpy(value) for value in values)
        return tensors if len(tensors) > 1 else tensors[0]

    return forward
