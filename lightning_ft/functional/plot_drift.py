"""The drift of layers as a picture: layer groups against time."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from lightning_ft.functional.picture import new_figure, save_figure


def plot_drift(
    groups: Sequence[str],
    steps: Sequence[int],
    table: Sequence[Sequence[float]],
    path: str | os.PathLike[str],
    *,
    title: str,
    label: str = "‖θ − θ⁰‖ / ‖θ⁰‖",
) -> None:
    """Draw groups, bottom to top, against optimiser steps, coloured by how far they have moved.

    Args:
        groups: Their names.
        steps: When was measured, growing.
        table: Of each measurement the groups' values.
        path: The picture's file; its ending says which format (``.png``, ``.svg``, ``.pdf``).
        title: What stands above it.
        label: What the values are.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw, or the file's ending is unknown.
    """
    if not steps:
        raise ValueError("there is nothing to draw: nothing was measured")
    figure = new_figure(path, 9, 1.6 + 0.28 * max(len(groups), 4))
    axes = figure.subplots()
    # A measurement stands for the steps since the one before it.
    edges = [min(0, steps[0] - 1), *steps]
    columns = [[row[i] if math.isfinite(row[i]) else 0.0 for row in table] for i in range(len(groups))]
    mesh = axes.pcolormesh(edges, range(len(groups) + 1), columns, cmap="magma", vmin=0)
    axes.set_yticks([i + 0.5 for i in range(len(groups))], groups)
    axes.set_xlabel("optimiser step")
    figure.colorbar(mesh, ax=axes, label=label, pad=0.01)
    figure.suptitle(title)
    save_figure(figure, path)
