"""Figures of training.py: rows from passes, and their table."""

from __future__ import annotations

from statistics import median
from typing import Any

from _flops import flops_per_token, peak
from _training_plan import AGAIN, OURS, RANK, THEIRS, Model, Variant

Row = dict[str, Any]
COLUMNS = {"tokens_per_s": ("tokens/s", "{:,.0f}"), "mfu": ("MFU", "{:.1%}"), "peak_gib": ("GiB", "{:.2f}")}


def row(variant: Variant, trainer: str, model: Model, passes: list[Row], reason: str, gpu: str) -> Row:
    """A contestant's figures: medians over the segments of all passes."""
    found: Row = {"variant": variant.name, "trainer": trainer, **dict.fromkeys(COLUMNS), "not run": reason}
    if not passes:
        return found
    speed = model.rows * model.length / median(second for one in passes for second in one["steps"])
    flops = flops_per_token(model.config, model.length, lora_rank=None if variant.base == "full" else RANK)
    most = peak(gpu, variant.precision)
    peaks = [one["peak_gib"] for one in passes if one["peak_gib"] is not None]
    return {
        **found,
        "tokens_per_s": speed,
        "mfu": speed * flops / most if most else None,
        "peak_gib": max(peaks) if peaks else None,
        "not run": "",
        "passes": passes,
    }


def markdown(rows: list[Row], heading: str) -> str:
    """A table for each model, and below it the noise and what was not run."""
    lines = [heading, ""]
    if not any(one["mfu"] for one in rows):
        lines += ["No MFU: benchmarks/gpu/_flops.py does not know the peak of this device.", ""]
    for model in dict.fromkeys(one["model"] for one in rows):
        lines += _table(model, {(one["variant"], one["trainer"]): one for one in rows if one["model"] == model})
    return "\n".join(lines)


def _table(model: str, rows: dict[tuple[str, str], Row]) -> list[str]:
    heads = [f"{name}, {who}" for name, _ in COLUMNS.values() for who in (OURS, THEIRS)]
    lines = [f"**{model}**", "", f"| variant | {' | '.join(heads)} | speed, ratio |", f"|---|{'---|' * len(heads)}---|"]
    variants = list(dict.fromkeys(variant for variant, _ in rows))
    for variant in variants:
        pair = rows[variant, OURS], rows[variant, THEIRS]
        cells = [_cell(one, column) for column in COLUMNS for one in pair]
        lines.append(f"| {variant} | {' | '.join(cells)} | {_ratio(*pair)} |")
    first = variants[0]
    lines += ["", f"A/A, {first}, ours again over ours: {_ratio(rows[first, AGAIN], rows[first, OURS]) or '-'}.", ""]
    lost = [f"- {variant}, {trainer}: {one['not run']}" for (variant, trainer), one in rows.items() if one["not run"]]
    return [*lines, *lost, ""]


def _cell(one: Row, column: str) -> str:
    value = one[column]
    return "-" if value is None else COLUMNS[column][1].format(value)


def _ratio(above: Row, below: Row) -> str:
    """Of the speeds; in brackets the lowest and highest of single rounds, where there are several."""
    if above["not run"] or below["not run"]:
        return ""
    pairs = zip(above["passes"], below["passes"], strict=False)
    rounds = [median(b["steps"]) / median(a["steps"]) for a, b in pairs]
    spread = f" ({min(rounds):.3f}–{max(rounds):.3f})" if len(rounds) > 1 else ""
    return f"{above['tokens_per_s'] / below['tokens_per_s']:.3f}{spread}"
