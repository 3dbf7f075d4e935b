"""All runs of a study, as a table of its page."""

from __future__ import annotations

from html import escape
from typing import Any

from lightning_ft.seeds.drawing import Drawing
from lightning_ft.seeds.marks import Summary, is_chosen, mark, number, ranked

_NAMES = ("run", "state", "init", "order", "dropout", "at rung", "at end", "loss", "steps", "time", "")
_CLASSES = ("n", "", *["n"] * 8, "why")


def run_table(summary: Summary) -> str:
    """The table, in HTML. It scrolls by itself where the page is narrow."""
    runs = ranked(summary)
    shown = len(_NAMES) - (not any(run["reason"] for run in runs))
    head = "".join(f'<th scope="col" class="{_CLASSES[i]}">{_NAMES[i]}</th>' for i in range(shown))
    rows = "".join(_row(summary, run, shown) for run in runs)
    return (
        '<section><h2>All runs, best first</h2><div class="scroll" role="region" aria-label="All runs" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(summary: Summary, run: dict[str, Any], shown: int) -> str:
    chosen, glyph = is_chosen(summary, run), Drawing(16, 16)
    mark(glyph, 8, 8, run, chosen=chosen)
    texts = [
        run["number"],
        "chosen" if chosen else run["state"],
        *(run[seed] for seed in ("init", "order", "dropout")),
        *(number(run[score]) for score in ("rung", "end", "loss")),
        f"{run['steps']:,}",
        duration(run["seconds"]),
        run["reason"] or "",
    ]
    cells = [escape(str(text)) for text in texts[:shown]]
    cells[1] = glyph.svg("") + cells[1]
    body = "".join(f'<td class="{_CLASSES[i]}">{cell}</td>' for i, cell in enumerate(cells))
    return f'<tr class="run-{run["number"]}{" picked" * chosen}">{body}</tr>'


def duration(seconds: float | None) -> str:
    """A time for people."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )
