"""Figures that show a study of seeds as a whole, drawn from its summary."""

from __future__ import annotations

import math
from typing import Any

from lightning_ft.seeds.drawing import Axes, Drawing, padded
from lightning_ft.seeds.marks import Figure, Summary, counted, metric, number

_STYLES = ("first", "second")


def variance(summary: Summary) -> Figure:
    """Bars of the components of variance."""
    found, heading = summary["variance"], "Where the variance comes from"
    left = f"{counted(found['left_out'], 'collapsed or failed run')} left out." if found["left_out"] else ""
    if found["init"] is None:
        return Figure("variance", heading, "", f"{found['note']} {left}".strip())
    parts = [("initialisation", found["init"]), ("data order", found["order"]), ("all else", found["residual"])]
    whole = sum(value for _, value in parts)
    drawing = Drawing(520, 186)
    words = []
    for i, (name, value) in enumerate(parts):
        share, deviation, y = value / whole if whole else 0.0, number(math.sqrt(value), 2), 12 + i * 58
        words.append(f"{name}: {share:.0%} of the variance, standard deviation {deviation}")
        drawing.text(6, y + 14, name, "label")
        drawing.text(514, y + 14, f"{share:.0%}  (± {deviation})", "label", "end")
        drawing.box(6, y + 22, 508, 16, "track")
        drawing.box(6, y + 22, 508 * share, 16, ("first", "second", "rest")[i], title=words[-1])
    caption = (
        f"Variance of the scores at the rung over {counted(found['runs'], 'run')}, split into the seed of the head's "
        "initialisation, the seed of the data's order and all else (both together, dropout, chance). In brackets each "
        f"part's standard deviation. From few seeds the shares are rough. {found['note']} {left}"
    )
    return Figure("variance", heading, drawing.svg("Bars. " + "; ".join(words)), caption.strip())


def expected_best(summary: Summary) -> Figure:
    """What more runs are worth."""
    curves, heading = summary["expected_best"], "What more runs are worth"
    if not curves:
        return Figure("best", heading, "", "No run has a score yet.")
    values = [value for curve in curves for part in ("low", "high") for value in curve[part]]
    furthest = max(cost for curve in curves for cost in curve["cost"])
    axes = Axes(
        (0, furthest), padded(values), ("budget, in full runs", f"expected best {metric(summary)}"), right=24, top=58
    )
    for curve, style in zip(curves, _STYLES, strict=False):
        places = {part: [axes.at(*at) for at in zip(curve["cost"], curve[part], strict=True)] for part in _PARTS}
        if len(curve["n"]) > 1:
            axes.area(places["high"], places["low"], f"band {style}")
        axes.line(places["expected"], f"curve {style}-line", curve["name"])
        radius = 2.5 if len(curve["n"]) <= 60 else 1.0
        for at, n, value in zip(places["expected"], curve["n"], curve["expected"], strict=True):
            axes.dot(*at, style, radius=radius, title=f"best of {n}, {curve['name']}: {number(value)}")
    _names(axes, curves)
    return Figure("best", heading, axes.svg(f"Line plot. {_caption(curves)}"), _caption(curves))


_PARTS = ("expected", "low", "high")


def _names(axes: Axes, curves: list[dict[str, Any]]) -> None:
    """A key above the plot."""
    for i, curve in enumerate(curves):
        x = 6 + 240 * i
        axes.box(x, 31, 16, 10, _STYLES[i])
        axes.text(x + 22, 41, curve["name"], "label")


def _caption(curves: list[dict[str, Any]]) -> str:
    caption = (
        "The score to expect of the best of n runs, with a bootstrap band of 95 % for which runs happened to be made. "
        "It takes the best dev score, which is optimistic by construction, and never exceeds the best one seen."
    )
    if any(curve["name"].startswith("as") for curve in curves):
        caption += " A run of this study costs its share of the whole, the stopped and the finished together."
    if missing := max(curve["without_score"] for curve in curves):
        caption += f" {counted(missing, 'collapsed run')} without a score counted as the worst seen."
    return caption


def cost(summary: Summary) -> Figure:
    """What was spent, against running all in full."""
    found, study, heading = summary["cost"], summary["study"], "What it cost"
    bars = [("planned", found["planned"], "rest"), ("spent", found["spent"], "first")]
    bars = [*[bar for bar in bars if bar[1] is not None], ("all in full", float(found["all"]), "track strong-track")]
    longest = max(value for _, value, _ in bars)
    if not longest:
        return Figure("cost", heading, "", "Nothing was spent yet.")
    drawing = Drawing(520, 12 + 58 * len(bars))
    for i, (name, value, style) in enumerate(bars):
        y = 12 + 58 * i
        drawing.text(6, y + 14, name, "label")
        drawing.text(514, y + 14, f"{number(value, 3)} full runs", "label", "end")
        drawing.box(6, y + 22, 508 * value / longest, 16, style, title=f"{name}: {number(value)} full runs")
    parts = [f"In units of one full run of {study['horizon']:,} optimiser steps."]
    if found["planned"] is not None:
        parts.append(
            f"Planned: t f + p (1 − f), for t = {found['all']} runs ranked after f = {study['stop_at']:g} of "
            f"the steps, of which p = {study['keep']} go on."
        )
    parts.append(f"Spent: {found['steps']:,} steps, those lost to interruptions included.")
    return Figure(
        "cost", heading, drawing.svg("Bars. " + "; ".join(f"{n}: {number(v)}" for n, v, _ in bars)), " ".join(parts)
    )
