"""A metric along the line between two sets of weights, as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning_ft.core.files import atomic_file


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "lightning-ft[plot]"') from error
    ending = os.path.splitext(path)[1].lstrip(".")
    figure = Figure(figsize=(6, 4), layout="constrained")
    if ending not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"path={os.fspath(path)!r} must end in .png, .svg or .pdf, which say the picture's format")
    axes = figure.subplots()
    axes.plot(alphas, values, marker="o")
    axes.axvline(chosen, color="#888888", linestyle="--", label=f"chosen: {chosen:g}")
    axes.set_xlabel("α (0: pretrained, 1: fine-tuned)")
    axes.set_ylabel(label)
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=ending, dpi=130)
