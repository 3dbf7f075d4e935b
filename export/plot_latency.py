"""Latencies as a picture: how many times as fast as PyTorch, for each shape."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ft.functional.picture import new_figure, save_figure

_CHARACTER = 0.09
"""Inches of a character of 10 points, at most."""


def plot_latency(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw a panel for each shape and a bar for each runtime: the speed over that of the first one.

    Args:
        rows: Of :func:`lightning_ft.export.benchmark`.
        path: The picture's file; its ending says which format (``.png``, ``.svg``, ``.pdf``).

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The file's ending is unknown.
    """
    shapes = list(dict.fromkeys((row["batch"], row["tokens"]) for row in rows))
    names = list(dict.fromkeys(row["runtime"] for row in rows))
    faster = next(column for column in rows[0] if column.startswith("times "))
    # A runtime may be the path of a folder: the panels keep their width beside the longest name.
    margin = 0.5 + _CHARACTER * max(map(len, names))
    figure = new_figure(path, margin + 2.6 * len(shapes), 1.4 + 0.36 * len(names))
    panels = figure.subplots(1, len(shapes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (batch, tokens) in zip(panels, shapes, strict=True):
        timed = {row["runtime"]: row for row in rows if (row["batch"], row["tokens"]) == (batch, tokens)}
        places = [names.index(name) for name in timed]
        bars = panel.barh(places, [row[faster] for row in timed.values()], color="#4878a8")
        panel.bar_label(bars, [f" {row['ms']:.3g} ms" for row in timed.values()], fontsize=8)
        panel.set_title(f"{batch} x {tokens} tokens", fontsize=10)
        panel.margins(x=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel(f"times as fast as {faster.removeprefix('times ')}", fontsize=10)
    save_figure(figure, path)
