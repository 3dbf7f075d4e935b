"""What the figures of a report share: a run's mark, its words, numbers for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_ft.seeds.drawing import Drawing

Summary = dict[str, Any]
_RANKS = ("finished", "running", "at rung", "stopped", "waiting", "collapsed", "failed")


class Figure(NamedTuple):
    """A figure of a page; without a drawing, its caption says why.

    Args:
        name: Its id.
        heading: Above it.
        drawing: SVG.
        caption: Below it.
    """

    name: str
    heading: str
    drawing: str
    caption: str


def number(value: float | None, digits: int = 4) -> str:
    """A number for people, with all its digits for those who compare; or a dash."""
    return "–" if value is None else f"{value:#.{digits}g}".rstrip(".")


def counted(count: int, noun: str) -> str:
    """Such as "1 run" and "3 runs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(steps: Sequence[int]) -> str:
    """Such as "10", "10 and 20", "10, 20 and 1,000"."""
    *others, last = (f"{step:,}" for step in steps)
    return f"{', '.join(others)} and {last}" if others else last


def rule_of(study: dict[str, Any]) -> str:
    """What ASHA does at a rung."""
    return f"one in {study['reduction']} goes on, the best of those that came as far before"


def metric(summary: Summary) -> str:
    """The metric's name, and which end of it is good where that is not the usual one."""
    study = summary["study"]
    return str(study["metric"]) + (" (lower is better)" if study["mode"] == "min" else "")


def is_chosen(summary: Summary, run: dict[str, Any]) -> bool:
    """Whether it is the chosen run."""
    return summary["chosen"] is not None and summary["chosen"]["number"] == run["number"]


def lucky(run: dict[str, Any]) -> bool:
    """Whether it neither collapsed nor failed."""
    return run["state"] not in ("collapsed", "failed")


def ranked(summary: Summary) -> list[dict[str, Any]]:
    """The runs, best first: the chosen one, then by how far they came, then by score and loss."""
    sign = -1 if summary["study"]["mode"] == "max" else 1

    def place(run: dict[str, Any]) -> tuple[bool, int, float, float]:
        score = math.inf if run["last"] is None else sign * run["last"]
        loss = math.inf if run["loss"] is None else run["loss"]
        return not is_chosen(summary, run), _RANKS.index(run["state"]), score, loss

    return sorted(summary["runs"], key=place)


def said(run: dict[str, Any]) -> str:
    """A run in one line, for whoever points at it."""
    why = f" ({run['reason']})" if run["reason"] else ""
    judged = [score for score in run["rungs"] if score is not None] or [None]
    scores = f"at the rung{'s' * (len(judged) > 1)} {', '.join(map(number, judged))}"
    if run["end"] is not None:
        scores += f", at the end {number(run['end'])}"
    seeds = f"init {run['init']}, order {run['order']}, dropout {run['dropout']}"
    return f"run {run['number']}, {run['state']}{why}; {scores}; {seeds}"


def mark(drawing: Drawing, x: float, y: float, run: dict[str, Any], *, chosen: bool, radius: float = 5) -> None:
    """A run's mark: a diamond for the chosen one, a cross for one that collapsed or failed, a dot for another."""
    style, title = f"run-{run['number']} mark ", said(run)
    if chosen:
        drawing.diamond(x, y, style + "chosen", radius=radius * 1.6, title=title)
    elif not lucky(run):
        drawing.cross(x, y, style + "bad", radius=radius * 0.9, title=title)
    else:
        drawing.dot(x, y, style + ("good" if run["state"] == "finished" else "plain"), radius=radius, title=title)
