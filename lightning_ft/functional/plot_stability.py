"""Gradient norms by layer group as a picture, with the signs of failure marked."""

from __future__ import annotations

import math
import os

from lightning_ft.functional.picture import new_figure, save_figure
from lightning_ft.functional.stability import StabilityRecord


def plot_stability(record: StabilityRecord, path: str | os.PathLike[str], *, title: str) -> None:
    """Draw the norm of each group against optimiser steps, on a logarithmic axis; gaps where a group was frozen.

    Args:
        record: What the run has shown.
        path: The picture's file; its ending says which format (``.png``, ``.svg``, ``.pdf``).
        title: What stands above it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is nothing to draw, or the file's ending is unknown.
    """
    if not record.steps:
        raise ValueError("there is nothing to draw: no norm was taken")
    figure = new_figure(path, 9, 5)
    from matplotlib import colormaps

    axes = figure.subplots()
    # Deep to light, as in the other pictures of layers; what is not of the body stands out.
    colours = colormaps["viridis"].resampled(max(2, len(record.groups)))
    for i, name in enumerate(record.groups):
        norms = [row[i] for row in record.norms]
        shown = [norm if norm is not None and 0 < norm < math.inf else math.nan for norm in norms]
        if not all(map(math.isnan, shown)):
            style = {"color": "#bb5533", "linewidth": 2} if name == "head" else {"color": colours(i)}
            axes.plot(record.steps, shown, label=name, marker="." if len(shown) < 40 else None, **style)
    if axes.lines:
        axes.set_yscale("log")
        figure.legend(loc="outside right center", fontsize="small")
    else:
        # A logarithmic axis has no place for them.
        axes.text(0.5, 0.5, "all norms are 0, or not finite", transform=axes.transAxes, ha="center")
        axes.set_xlim(0, 1.05 * record.steps[-1])
        axes.set_yticks([])
    for step in sorted({finding.step for finding in record.findings}):
        signs = ", ".join(finding.sign for finding in record.findings if finding.step == step)
        axes.axvline(step, color="#cc0000", linestyle="--", linewidth=1)
        axes.annotate(signs, (step, 0.99), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("‖gradient‖, before clipping")
    figure.suptitle(title)
    save_figure(figure, path)
