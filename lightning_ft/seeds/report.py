"""The report on a study of seeds: a table for the terminal, a page for people, JSON for programs."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lightning_ft.core.files import atomic_file
from lightning_ft.core.report import Report
from lightning_ft.seeds.marks import counted, number, ranked
from lightning_ft.seeds.page import notice, page
from lightning_ft.seeds.record import SeedStudy
from lightning_ft.seeds.summary import summarise


def write_report(study: SeedStudy, folder: str | os.PathLike[str]) -> Report:
    """Write ``report.html`` and ``report.json`` into a folder.

    The page holds its figures itself and loads nothing. The JSON holds every number that the page shows or draws. A
    study that is not finished, has one run, or of which every run collapsed, has a report, too, which says so.

    Args:
        study: What was found so far.
        folder: Made when absent; earlier reports in it are replaced.

    Returns:
        What the terminal shows: the study's main results, and a row for each run, best first.
    """
    summary, folder = summarise(study), Path(folder)
    with atomic_file(folder / "report.json") as path:
        path.write_text(json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    with atomic_file(folder / "report.html") as path:
        path.write_text(page(summary), encoding="utf-8")
    facts = _facts(summary) | {"page": str(folder / "report.html")}
    return Report(f"Study of seeds: {study.name}", facts, [_row(run) for run in ranked(summary)])


def _facts(summary: dict[str, Any]) -> dict[str, Any]:
    study, chosen, cost = summary["study"], summary["chosen"], summary["cost"]
    states = ", ".join(f"{count} {state}" for state, count in summary["states"].items())
    facts: dict[str, Any] = {"runs": f"{len(summary['runs'])} ({states})" if states else "none"}
    if text := notice(summary):
        facts["note"] = text
    judged = [(f"at step {step:,}", found) for step, found in zip(study["rungs"], summary["at_rungs"], strict=True)]
    for where, found in [*judged, ("of finished runs", summary["at_end"])]:
        if found["std"] is not None:
            facts[f"{study['metric']} {where}"] = f"{number(found['mean'])} ± {number(found['std'], 3)}"
    facts |= _variance(summary["variance"])
    facts["cost in full runs"] = f"{number(cost['spent'], 3)} of {cost['all']}"
    if chosen:
        seeds = ", ".join(f"{name} {chosen[name]}" for name in ("init", "order", "dropout"))
        facts["chosen"] = f"run {chosen['number']} ({seeds})"
        best = f"optimistic by construction, the best of {counted(len(summary['runs']), 'run')}"
        facts["dev score of the chosen run"] = f"{number(chosen['dev'])} ({best})"
        facts["test score of the chosen run"] = chosen["test"]
    return facts


def _variance(found: dict[str, Any]) -> dict[str, Any]:
    if found["init"] is None:
        return {"variance": found["note"]}
    parts = {"initialisation": found["init"], "data order": found["order"], "all else": found["residual"]}
    said = ", ".join(f"{name} {number(math.sqrt(value), 2)}" for name, value in parts.items())
    return {"standard deviation by source": said}


def _row(run: dict[str, Any]) -> dict[str, Any]:
    shown = {name: run[name] for name in ("init", "order", "dropout", "state")}
    scores = {f"at {name}": number(run[name]) for name in ("rung", "end")}
    return {
        "run": run["number"],
        **shown,
        **scores,
        "loss": number(run["loss"]),
        "steps": run["steps"],
        "why": run["reason"] or "",
    }
