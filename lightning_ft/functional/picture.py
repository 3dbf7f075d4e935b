"""What every picture does alike: matplotlib on demand, the format by the ending, a file that is whole or absent."""

from __future__ import annotations

import os
from typing import Any

from lightning_ft.core.files import atomic_file


def new_figure(path: str | os.PathLike[str], width: float, height: float) -> Any:
    """An empty figure for a file.

    Args:
        path: The file; its ending says which format (``.png``, ``.svg``, ``.pdf``).
        width: In inches.
        height: In inches.

    Returns:
        A ``matplotlib.figure.Figure``, of no window.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The file's ending is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "lightning-ft[plot]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if _ending(path) not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"path={os.fspath(path)!r} must end in .png, .svg or .pdf, which say the picture's format")
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure whole or not at all.

    Args:
        figure: Of :func:`new_figure`.
        path: The same file.
    """
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=_ending(path), dpi=130)


def _ending(path: str | os.PathLike[str]) -> str:
    return os.path.splitext(path)[1].lstrip(".")
