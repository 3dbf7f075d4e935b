"""Graphs beside the model that they were made of: the shapes to compare on, and the model's own outputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_ft.export.graph import attention, inference_state
from lightning_ft.export.graphs import Graphs, Sessions, as_graphs
from lightning_ft.export.parity import check_parity, open_graph

if TYPE_CHECKING:
    from lightning_ft.export.heads import Exportable
    from lightning_ft.export.parity import Probe

CPU_ATTENTION = ("sdpa", "eager")
MIN_LENGTH = 8


def prepare(part: Exportable, *, max_length: int) -> tuple[Graphs, list[Probe]]:
    """What goes into graphs, and what to run them on.

    Args:
        part: A model with its head and tokenizer.
        max_length: Tokens in the longest row.
    """
    graphs = as_graphs(part.head.wrap(part.model))
    return graphs, graphs.probes(part.tokenizer, max_length=max_length)


def reference(part: Exportable, probes: Sequence[Probe]) -> list[dict[str, Tensor]]:
    """What the source computes, in :func:`~lightning_ft.export.graph.inference_state`, of each probe.

    Raises:
        ValueError: It fails on the longest one.
    """
    graphs = as_graphs(part.head.wrap(part.original))
    config = getattr(part.original, "config", None)
    # Flash attention has no CPU kernel; eager computes the same.
    name = getattr(config, "_attn_implementation", "")
    expected = []
    with attention(part.original, name if name in CPU_ATTENTION else "eager"):
        for probe in probes:
            try:
                expected.append(graphs.expected(probe))
            except (IndexError, RuntimeError) as error:
                if probe.length < MIN_LENGTH:  # nothing to do with length
                    raise
                raise ValueError(
                    f"max_length: the model fails on {probe.length} tokens, got max_length={probes[-1].length}: "
                    "give the number of tokens it was trained for (max_position_embeddings in its config is "
                    f"{getattr(config, 'max_position_embeddings', None)}; RoBERTa-like models keep two of them)"
                ) from error
    return expected


def compare(part: Exportable, folder: Path, *, max_length: int, tolerance: float) -> list[dict[str, Any]]:
    """A row for each shape, as :func:`lightning_ft.export.parity.check_parity` gives them.

    Raises:
        ParityError: The graphs in the folder differ from the source.
    """
    with inference_state(part.original), inference_state(part.model):
        graphs, probes = prepare(part, max_length=max_length)
        expected = reference(part, probes)
        sessions = {name: open_graph(folder / name) for name in graphs.files}
        return check(graphs, sessions, probes, expected, tolerance=tolerance)


def check(
    graphs: Graphs,
    sessions: Sessions,
    probes: Sequence[Probe],
    expected: Sequence[dict[str, Tensor]],
    *,
    tolerance: float,
) -> list[dict[str, Any]]:
    """:func:`lightning_ft.export.parity.check_parity` of graphs that are open.

    Raises:
        ParityError: They differ from what is expected of them.
    """
    return check_parity(
        partial(graphs.run, sessions),
        probes,
        expected,
        tolerance=tolerance,
        per_token=graphs.per_token,
        rounding=graphs.rounding,
    )
