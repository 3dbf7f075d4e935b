"""A metric along the line between two sets of weights, as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning_ft.functional.picture import new_figure, save_figure


def plot_interpolation(
    alphas: Sequence[float], values: Sequence[float], path: str | os.PathLike[str], *, label: str, chosen: float
) -> None:
    """Draw a metric against α.

    Args:
        alphas: Where was measured, growing.
        values: What was found there.
        path: The picture's file; its ending says which format (``.png``, ``.svg``, ``.pdf``).
        label: The metric's name.
        chosen: The α that was taken; marked.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The file's ending is unknown.
    """
    figure = new_figure(path, 6, 4)
    axes = figure.subplots()
    axes.plot(alphas, values, marker="o")
    axes.axvline(chosen, color="#888888", linestyle="--", label=f"chosen: {chosen:g}")
    axes.set_xlabel("α (0: pretrained, 1: fine-tuned)")
    axes.set_ylabel(label)
    axes.legend()
    save_figure(figure, path)
