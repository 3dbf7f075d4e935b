"""A score against the dimension of the subspace in which a model was trained, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lightning_ft.functional.picture import new_figure, save_figure


def plot_dimension(
    scores: Mapping[int, float],
    full: float,
    path: str | os.PathLike[str],
    *,
    label: str,
    share: float,
    found: int | None,
) -> None:
    """Draw scores against dimensions, with the full score and the share of it that is asked for.

    Args:
        scores: Of each dimension.
        full: The score of full fine-tuning.
        path: The picture's file; its ending says which format (``.png``, ``.svg``, ``.pdf``).
        label: The score's name.
        share: Of the full score.
        found: The smallest dimension that reaches it; marked. None for none.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The file's ending is unknown.
    """
    figure = new_figure(path, 6, 4)
    axes = figure.subplots()
    dimensions = sorted(scores)
    axes.plot(dimensions, [scores[d] for d in dimensions], marker="o")
    axes.set_xscale("log")
    axes.axhline(full, color="#444444", linestyle="-", linewidth=1, label=f"full: {full:.3g}")
    axes.axhline(share * full, color="#888888", linestyle="--", label=f"{share:.0%} of it: {share * full:.3g}")
    if found is not None:
        axes.axvline(found, color="#bb5533", linestyle=":", label=f"d{share * 100:.0f} = {found:,}")
    axes.set_xlabel("dimension of the subspace")
    axes.set_ylabel(label)
    axes.legend()
    save_figure(figure, path)
