"""Figures that show each run of a study of seeds, drawn from the study's summary."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_ft.seeds.drawing import Axes, Drawing, Point, apart, padded, swarm
from lightning_ft.seeds.marks import (
    Figure,
    Summary,
    counted,
    is_chosen,
    listed,
    lucky,
    mark,
    metric,
    number,
    ranked,
    rule_of,
    said,
)

_NOTHING = "No run has been evaluated yet."
_LABELS = 12


def strip(summary: Summary) -> Figure:
    """Scores of all runs, at each rung and at the end."""
    study, runs, heading = summary["study"], summary["runs"], "Scores of all runs"
    columns = _columns(summary)
    values = [score for column in columns for score in column.scores if score is not None]
    lost = [run for run in runs if run["rung"] is None and not lucky(run)]
    if not values and not lost:
        return Figure("strip", heading, "", _NOTHING)
    chance = _within_sight(study["chance"], values)
    values += [] if chance is None else [chance]
    low, high = padded(values)
    low -= (high - low) * 0.12 * bool(lost)
    axes = Axes((-0.5, len(columns) - 0.4), (low, high), ("", metric(summary)), ticks=False)
    if chance is not None:
        axes.line([(axes.left, axes.y(chance)), (axes.right, axes.y(chance))], "chance")
        axes.text(axes.right, axes.y(chance) - 6, "always the commonest class", "tick", "end")
    for i, run in enumerate(lost):
        mark(axes, axes.left + 14 + 15 * i, axes.bottom - 12, run, chosen=False)
    if lost:
        axes.text(axes.left + 14 + 15 * len(lost), axes.bottom - 8, "no score", "tick")
    places = _places(axes, columns, runs)
    for run in runs:
        if len(spots := places.get(run["number"], [])) > 1:
            style = "link chosen-link" if is_chosen(summary, run) else "link"
            axes.line(spots, f"run-{run['number']} {style}")
    for i, column in enumerate(columns):
        axes.text(axes.x(i), axes.bottom + 21, f"at step {column.step:,}", "name", "middle")
        _mean(axes, i, column.found, len(columns))
    for run in sorted(runs, key=lambda run: is_chosen(summary, run)):
        for x, y in places.get(run["number"], []):
            mark(axes, x, y, run, chosen=is_chosen(summary, run))
    if (chosen := summary["chosen"]) and chosen["dev"] is not None:
        x, y = places[chosen["number"]][-1]
        axes.text(x, y - 14, f"run {chosen['number']}, chosen", "label chosen-text", "middle")
    caption = _strip_caption(summary, columns)
    return Figure("strip", heading, axes.svg(f"Strip plot of {metric(summary)}. {caption}"), caption)


class _Column(NamedTuple):
    """Where runs are judged.

    Args:
        step: After so many steps.
        where: The same in words.
        scores: Of each run; None where it did not come so far.
        found: Their mean and spread.
    """

    step: int
    where: str
    scores: list[float | None]
    found: dict[str, Any]


def _columns(summary: Summary) -> list[_Column]:
    study, runs = summary["study"], summary["runs"]
    end = "At the end, of the finished runs alone"
    last = _Column(study["horizon"], end, [run["end"] for run in runs], summary["at_end"])
    if study["rungs"][0] >= study["horizon"]:
        return [last]
    judged = [
        _Column(step, f"At step {step:,}" if i else "At the rung", [run["rungs"][i] for run in runs], found)
        for i, (step, found) in enumerate(zip(study["rungs"], summary["at_rungs"], strict=True))
    ]
    return [*judged, last]


def _within_sight(chance: float | None, scores: list[float]) -> float | None:
    """The score of chance, unless it lies so far from all others that nothing could be seen of them."""
    if chance is None or not scores:
        return chance
    spread = max(scores) - min(scores)
    return chance if min(scores) - spread / 2 <= chance <= max(scores) + spread / 2 else None


def _places(axes: Axes, columns: list[_Column], runs: list[dict[str, Any]]) -> dict[int, list[Point]]:
    """Where each run's marks stand, by its number, from the left to the right."""
    places: dict[int, list[Point]] = {}
    for i, column in enumerate(columns):
        shown = [(run, axes.y(score)) for run, score in zip(runs, column.scores, strict=True) if score is not None]
        offsets = swarm([y for _, y in shown], 11.5, 92 / max(2, len(columns)))
        for (run, y), offset in zip(shown, offsets, strict=True):
            places.setdefault(run["number"], []).append((axes.x(i) + offset, y))
    return places


def _mean(axes: Axes, place: int, found: dict[str, Any], columns: int) -> None:
    """A bar of mean ± standard deviation, beside the marks."""
    if found["std"] is None:
        return
    x = axes.x(place) - 152 / max(2, columns)
    title = f"mean {number(found['mean'])} ± {number(found['std'], 3)}"
    low, mid, high = (axes.y(found["mean"] + sign * found["std"]) for sign in (-1, 0, 1))
    axes.line([(x, low), (x, high)], "spread", title)
    axes.line([(x - 6, mid), (x + 6, mid)], "spread", title)
    if columns < 3:  # among more there is no room
        axes.text(x, low + 16, f"mean {number(found['mean'], 3)}", "tick", "middle")


def _strip_caption(summary: Summary, columns: list[_Column]) -> str:
    parts = ["One mark a run."]
    if len(columns) > 2:
        parts.append("A line joins the scores of a run that went on.")
    elif len(columns) == 2 and summary["at_end"]["count"]:
        parts.append("A line joins the two scores of a run that was finished.")
    for column in columns:
        if (std := column.found["std"]) is not None:
            said = f"{number(column.found['mean'])} ± {number(std, 3)}"
            parts.append(f"{column.where}: {said} (mean ± standard deviation).")
    if (chance := summary["study"]["chance"]) is not None:
        parts.append(f"Always the commonest class: {number(chance, 3)}.")
    if bad := sum(not lucky(run) for run in summary["runs"]):
        parts.append(f"{counted(bad, 'run')} collapsed or failed (×): in neither mean nor standard deviation.")
    return " ".join(parts)


def learning_curves(summary: Summary) -> Figure:
    """Score against step, a line for each run."""
    study, heading = summary["study"], "Learning curves"
    runs = [run for run in summary["runs"] if any(score is not None for _, score, _ in run["evaluations"])]
    if not runs:
        return Figure("curves", heading, "", _NOTHING)
    scores = [score for run in runs for _, score, _ in run["evaluations"] if score is not None]
    axes = Axes((0, study["horizon"]), padded(scores), ("optimiser step", metric(summary)), right=66)
    rungs = [step for step in study["rungs"] if step < study["horizon"]]
    for x in map(axes.x, rungs):
        axes.line([(x, axes.top), (x, axes.bottom)], "rung")
    if rungs:
        here = f"one in {study['reduction']} goes on" if study["reduction"] else f"the best {study['keep']} go on"
        axes.text(axes.x(rungs[0]) + 6, axes.bottom - 9, f"ranked here: {here}", "tick")
    ends = []
    for run in reversed(ranked({**summary, "runs": runs})):
        points = [None if score is None else axes.at(step, score) for step, score, _ in run["evaluations"]]
        axes.line(points, f"run-{run['number']} curve {_style(summary, run)}-curve", said(run))
        last = next(point for point in reversed(points) if point is not None)
        mark(axes, *last, run, chosen=is_chosen(summary, run), radius=3.5)
        if run["state"] == "finished":
            ends.append((last, run))
    ends = ends[-_LABELS:]  # the chosen one is last
    for ((x, _), run), y in zip(ends, apart([y for (_, y), _ in ends], 15, axes.top, axes.bottom), strict=True):
        axes.text(x + 10, y + 4, f"run {run['number']}", f"label {_style(summary, run)}-text")
    caption = f"{study['metric']} on the dev set at each evaluation, a line for each run."
    if rungs:
        ranked_by = f"each run is judged: {rule_of(study)}" if study["reduction"] else "runs are ranked"
        caption += (
            f" At step {listed(rungs)} of {study['horizon']:,} {ranked_by}; the learning rate follows the full run's "
            "schedule from the start."
        )
    return Figure("curves", heading, axes.svg(f"Line plot. {caption}"), caption)


def _style(summary: Summary, run: dict[str, Any]) -> str:
    if is_chosen(summary, run):
        return "chosen"
    return "bad" if not lucky(run) else "good" if run["state"] == "finished" else "plain"


def grid(summary: Summary) -> Figure | None:
    """The scores at the rung, initialisation by order; None where the runs are no grid."""
    if (table := summary["grid"]) is None:
        return None
    runs = {run["number"]: run for run in summary["runs"]}
    scores = [run["rung"] for run in runs.values() if run["rung"] is not None and lucky(run)] or [0.0]
    heading = "Initialisation by data order"
    if all(run["rung"] is None and lucky(run) for run in runs.values()):
        return Figure("grid", heading, "", _NOTHING)
    wide, high = min(430 / len(table["orders"]), 120), max(14.0, min(56.0, 250 / len(table["inits"])))
    drawing = Drawing(520, 56 + high * len(table["inits"]) + 8)
    drawing.text(74, 16, "seed of the data's order →", "name")
    drawing.text(6, 40, "init ↓", "name")
    for column, order in enumerate(table["orders"]):
        drawing.text(74 + wide * (column + 0.5), 40, str(order), "tick", "middle")
    best, worst = (max(scores), min(scores)) if summary["study"]["mode"] == "max" else (min(scores), max(scores))
    for row, init in enumerate(table["inits"]):
        y = 50 + high * row
        drawing.text(62, y + high / 2 + 4, str(init), "tick", "end")
        for column, cell in enumerate(table["runs"][row]):
            box = 74 + wide * column, y, wide - 3, high - 3
            _cell(drawing, box, runs.get(cell), worst, best, summary)
    caption = (
        f"{summary['study']['metric']} at the rung, by seed of the head's initialisation (rows) and of the data's "
        "order (columns); a stronger colour is better. A row of one colour speaks for the initialisation, a column of "
        "one colour for the order."
    )
    return Figure("grid", heading, drawing.svg(f"Heat map. {caption}"), caption)


def _cell(
    drawing: Drawing,
    box: tuple[float, float, float, float],
    run: dict[str, Any] | None,
    worst: float,
    best: float,
    summary: Summary,
) -> None:
    x, y, width, height = box
    centre = x + width / 2, y + height / 2
    if run is None:
        drawing.box(*box, "track")
        return
    style, title = f"run-{run['number']} mark", said(run)
    if run["rung"] is None or not lucky(run):
        drawing.box(*box, f"{style} track", title=title)
        if not lucky(run):
            drawing.cross(*centre, f"run-{run['number']} bad", title=title)
        return
    share = (run["rung"] - worst) / (best - worst) if best != worst else 0.5
    chosen = " picked" if is_chosen(summary, run) else ""
    drawing.box(*box, f"{style} heat{chosen}", title=title, shade=0.06 + 0.56 * share)
    if width >= 38 and height >= 16:
        drawing.text(centre[0], centre[1] + 4, number(run["rung"], 3), "label", "middle")
