"""A graph beside the model that it was made of: the shapes to compare on, and the model's own outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ft.export.graph import attention, inference_state
from lightning_ft.export.parity import check_parity, load_session, make_probes, run_torch
from lightning_ft.export.wrappers import GraphWrapper, graph_inputs

if TYPE_CHECKING:
    from torch import nn

    from lightning_ft.export.heads import Exportable
    from lightning_ft.export.parity import Probe

CPU_ATTENTION = ("sdpa", "eager")
MIN_LENGTH = 8


def prepare(part: Exportable, model: nn.Module, *, max_length: int) -> tuple[GraphWrapper, list[Probe]]:
    """A model with the signature of its graph, and what to run both on.

    Args:
        part: Its head and tokenizer.
        model: Which of its models.
        max_length: Tokens in the longest row.
    """
    graph = part.head.wrap(model).eval()
    generator = torch.Generator().manual_seed(0)
    probes = make_probes(part.tokenizer, graph_inputs(part.model, part.tokenizer), max_length=max_length)
    return graph, [probe._replace(inputs=graph.sample(probe.inputs, generator)) for probe in probes]


def reference(part: Exportable, *, max_length: int) -> tuple[list[Probe], list[dict[str, Tensor]]]:
    """What the source computes, in :func:`~lightning_ft.export.graph.inference_state`: the probes, and its outputs.

    Raises:
        ValueError: It fails on ``max_length`` tokens.
    """
    graph, probes = prepare(part, part.original, max_length=max_length)
    config, expected = getattr(part.original, "config", None), []
    # Flash attention has no CPU kernel; eager computes the same.
    name = getattr(config, "_attn_implementation", "")
    with attention(part.original, name if name in CPU_ATTENTION else "eager"):
        for probe in probes:
            try:
                expected.append(run_torch(graph, probe))
            except (IndexError, RuntimeError) as error:
                if probe.length < MIN_LENGTH:  # nothing to do with length
                    raise
                raise ValueError(
                    f"max_length: the model fails on {probe.length} tokens, got max_length={probes[-1].length}: "
                    "give the number of tokens it was trained for (max_position_embeddings in its config is "
                    f"{getattr(config, 'max_position_embeddings', None)}; RoBERTa-like models keep two of them)"
                ) from error
    return probes, expected


def compare(part: Exportable, folder: Path, *, max_length: int, tolerance: float) -> list[dict[str, Any]]:
    """A row for each shape, as :func:`lightning_ft.export.parity.check_parity` gives them.

    Raises:
        ParityError: The graph in the folder differs from the source.
    """
    with inference_state(part.original):
        probes, expected = reference(part, max_length=max_length)
        graph = part.head.wrap(part.original)
    return check_parity(load_session(folder), probes, expected, tolerance=tolerance, per_token=graph.per_token)
