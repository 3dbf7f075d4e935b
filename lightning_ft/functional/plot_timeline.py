"""A timeline as a picture: layer groups against time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from lightning_ft.core.timeline import Timeline
from lightning_ft.functional.picture import new_figure, save_figure

_FROZEN = "#e4e4e4"


def plot_timeline(
    timeline: Timeline,
    path: str | os.PathLike[str],
    *,
    title: str,
    costs: Mapping[int, float] | None = None,
    relative: bool = False,
) -> None:
    """Draw groups, bottom to top, against optimiser steps: grey where frozen, else coloured by the learning rate.

    Args:
        timeline: What to draw.
        path: The picture's file; its ending says which format (``.png``, ``.svg``, ``.pdf``).
        title: What stands above it.
        costs: Predicted cost of a step, as a share of training everything, from each of some steps on; drawn above.
        relative: Whether the rates are multiples of the optimiser's own, and not rates.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw, or the file's ending is unknown.
    """
    if not timeline.steps:
        raise ValueError("there is nothing to draw: nothing was planned or trained")
    figure = new_figure(path, 9, 1.6 + 0.28 * max(len(timeline.groups), 4))
    from matplotlib.colors import LogNorm, Normalize

    rows = 2 if costs else 1
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[1, 4][-rows:])[:, 0]
    main = panels[-1]
    table = [[rates.get(name, math.nan) for rates in timeline.rates] for name in timeline.groups]
    known = [rate for row in table for rate in row if rate > 0]
    low, high = min(known, default=1.0), max(known, default=1.0)
    # A warm-up begins at 0, which no logarithm has; and rates that hardly differ need no logarithm.
    low = max(low, high / 1000)
    scale: Any = LogNorm(low, high, clip=True) if high > 1.5 * low else Normalize(0, high)
    edges = [*timeline.steps, max(timeline.end, timeline.steps[-1] + 1)]
    main.set_facecolor(_FROZEN)
    mesh = main.pcolormesh(edges, range(len(timeline.groups) + 1), _masked(table), norm=scale, cmap="viridis_r")
    main.set_yticks([i + 0.5 for i in range(len(timeline.groups))], timeline.groups)
    main.set_ylim(0, len(timeline.groups))
    main.set_xlim(edges[0], edges[-1])
    main.set_xlabel("optimiser step (grey: frozen)")
    for change in timeline.changes()[1:]:
        main.axvline(change, color="white", linewidth=0.8)
    figure.colorbar(mesh, ax=main, label="rate / the optimiser's own" if relative else "learning rate", pad=0.01)
    if costs:
        above = panels[0]
        above.stairs([100 * cost for cost in costs.values()], [*costs, edges[-1]], fill=True, color="#7a8fa6")
        above.set_ylim(0, 105)
        above.set_ylabel("cost of\na step, %")
    figure.suptitle(title)
    save_figure(figure, path)


def _masked(table: list[list[float]]) -> Any:
    import numpy as np

    return np.ma.masked_invalid(np.array(table))
